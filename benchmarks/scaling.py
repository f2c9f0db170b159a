"""What a chip holds and sends, from 64 chips to 1,024, at the same rows a chip.

  python benchmarks/scaling.py unified_1b clip_l14 --plot=docs/scaling.png

  chips      64     128     256      512          1,024
  v5e        8x8    8x16    16x16    2 x 16x16    4 x 16x16     slices, beyond 256

The training step of each config is compiled for each number of chips, as `mmjax.plan`
does (which keeps what it read), and read out: nothing runs, nothing is timed. A chip's
rows are those that it has on 256; those of a step grow with the chips. Prints a table.
"""

import argparse
import pathlib

import compiled  # noqa: F401  before JAX

from mmjax.plan import CACHE, topology
from mmjax.plan.chips import GIB
from mmjax.plan.compile import plan
from mmjax.train import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
SLICES = {
  64: ('v5e:8x8', 1),
  128: ('v5e:8x16', 1),
  256: ('v5e:16x16', 1),
  512: ('v5e:16x16', 2),
  1024: ('v5e:16x16', 4),
}
COLUMNS = (
  'config',
  'chips',
  'rows',
  'HBM GiB',
  'sent in a slice',
  'between slices',
  'MFU',
)
COLOURS = ('#2563eb', '#f08c2e', '#0f9d78', '#7c3aed')


def point(name, chips):
  """{'rows', 'gib', 'links', 'slices', 'mfu'} of a chip, of so many."""
  config = config_lib.load(f'{ROOT}/configs/{name}.py')
  config.data.rows = config.data.rows * chips // 256
  config_lib.check(config)
  made = plan(config, topology.parse(*SLICES[chips]), CACHE)
  sent = made.readout.wire_by(lambda c: c.between_slices)
  return {
    'rows': made.rows,
    'gib': made.peak / GIB,
    'links': sent.get(False, 0),
    'slices': sent.get(True, 0),
    'mfu': made.mfu(made.readout.modelled_seconds),
  }


def line(name, chips, p):
  """A row of the table."""
  between = f'{p["slices"] / 1e6:.1f} MB' if p['slices'] else ''
  cells = (name, f'{chips:,}', f'{p["rows"]:,}', f'{p["gib"]:.2f}')
  cells += (f'{p["links"] / 1e9:.1f} GB', between, f'{p["mfu"]:.3f}')
  return f'| {" | ".join(cells)} |'


def draw(points, path):
  """HBM and bytes sent over the number of chips, a line per config."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(11, 4), dpi=120, layout='constrained', facecolor='white')
  panels = {
    'HBM of a chip, GiB': lambda p: p['gib'],
    'sent in a slice, each step, GB': lambda p: p['links'] / 1e9,
    'sent between slices, MB': lambda p: p['slices'] / 1e6,
  }
  for axes, (title, value) in zip(figure.subplots(1, 3), panels.items(), strict=True):
    for colour, (name, by_chips) in zip(COLOURS, points.items(), strict=False):
      values = [value(p) for p in by_chips.values()]
      axes.plot(list(by_chips), values, marker='o', ms=4, color=colour, label=name)
    axes.set_title(title, loc='left', fontsize=11)
    axes.set_xscale('log', base=2)
    axes.set_xticks(list(SLICES), [f'{n:,}' for n in SLICES])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel('chips of v5e')
    axes.grid(True, axis='y', color='#e1e5eb')
    axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.legend(frameon=False)
  FigureCanvasAgg(figure).print_png(path, metadata={'Software': None})


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('configs', nargs='+')
  parser.add_argument(
    '--chips', type=int, nargs='+', default=list(SLICES), choices=SLICES
  )
  parser.add_argument('--plot', help='a PNG to draw')
  args = parser.parse_args()
  print(f'| {" | ".join(COLUMNS)} |\n|{" --- |" * len(COLUMNS)}')
  points = {name: {} for name in args.configs}
  for name, by_chips in points.items():
    for chips in args.chips:
      by_chips[chips] = point(name, chips)
      print(line(name, chips, by_chips[chips]), flush=True)
  if args.plot:
    draw(points, args.plot)


if __name__ == '__main__':
  main()
