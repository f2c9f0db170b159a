"""Runs beside each other: what they reach, and what it costs them.

  python -m mmjax.eval.compare runs/early runs/encoded runs/flamingo runs/late

One page: a row per run with the metric of its last evaluation, the same with wrong and
with blank images, parameters, FLOPs of a training step per document, and speed; and a
curve per run. Everything is read from the workdirs, nothing is computed again.
"""

import argparse
import base64
import io
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mmjax import files
from mmjax.data import tokenizer
from mmjax.eval import curves, report
from mmjax.plan.flops import flops
from mmjax.train import build as build_lib
from mmjax.train import config as config_lib
from mmjax.train.optim import merge

_COLORS = ('#2563eb', '#f08c2e', '#0d9488', '#b83280', '#7b8798', '#65a30d')
_INK, _SOFT, _LINE = '#14181f', '#5b6472', '#e1e5eb'


def measure(workdir: str | os.PathLike) -> dict[str, Any]:
  """What a run says of itself.

  Returns:
    name, model, steps, parameters, trained (of the parameters), flops (of loss and
    gradient, per document), documents_per_second, tokens_per_second (slots of the
    stream that are no padding; medians over the log's lines), evaluation (the last
    metrics, without 'eval/') and records (of metrics.jsonl). What isn't known is nan.

  Raises:
    ValueError: no run there, or no data of it; one line.
  """
  workdir = files.place(workdir, 'the run')
  path = workdir / 'config.json'
  if not path.exists():
    raise ValueError(f'no run at {workdir}: {path.name} is missing')
  config = config_lib.from_json(path.read_text())
  vocab_size = tokenizer.load(config.data.path).vocab_size
  log = workdir / 'metrics.jsonl'
  records = curves.read(log) if log.exists() else []
  parts = build_lib.build(config, vocab_size, jax.devices()[:1])
  trained, frozen = parts.optimizer.split(parts.abstract.params)

  def loss(trained, frozen, batch, key):
    return parts.loss_fn(merge(trained, frozen), batch, key, True)[0]

  key = jax.eval_shape(lambda: jax.random.key(0))
  step = flops(jax.grad(loss), trained, frozen, parts.batch_shapes(config.data.rows), key)
  documents = _median(records, 'data/documents')
  rate = _median(records, 'train/tokens_per_second')
  steps_per_second = rate / _median(records, 'train/tokens_per_step')
  evaluation = {}
  for record in records:
    found = {k[5:]: v for k, v in record.items() if k.startswith('eval/')}
    evaluation = found or evaluation
  return {
    'name': workdir.name,
    'model': config.model.name,
    'steps': max((r['step'] for r in records), default=0),
    'parameters': _size(parts.abstract.params),
    'trained': _size(trained),
    'flops': step / documents,
    'documents_per_second': documents * steps_per_second,
    'tokens_per_second': _median(records, 'data/tokens') * steps_per_second,
    'evaluation': evaluation,
    'records': records,
  }


def _size(tree: Any) -> int:
  return sum(x.size for x in jax.tree.leaves(tree))


def _median(records: Sequence[Mapping[str, Any]], key: str) -> float:
  values = curves.series(records, key)[1]
  return float(np.median(values)) if len(values) else float('nan')


def common_metric(runs: Sequence[Mapping[str, Any]]) -> str:
  """The first '<task>/accuracy', else the first metric, that all runs have.

  Raises:
    ValueError: there is none.
  """
  shared = set.intersection(*[set(run['evaluation']) for run in runs])
  if not shared:
    have = '; '.join(f'{r["name"]}: {len(r["evaluation"])} metrics' for r in runs)
    raise ValueError(f'the runs have no metric in common ({have})')
  return min(shared, key=lambda k: (not k.endswith('/accuracy'), k))


def draw(runs: Sequence[Mapping[str, Any]], metric: str) -> bytes:
  """Training loss and the metric over the steps, a line per run, as PNG."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(11, 4.2), dpi=120, layout='constrained', facecolor='white')
  for axes, key, title in zip(
    figure.subplots(1, 2), ('train/loss', f'eval/{metric}'), ('training loss', metric)
  ):
    axes.set_title(title, loc='left', fontsize=12, color=_INK, fontweight='bold')
    axes.set_xlabel('step', color=_SOFT)
    axes.grid(True, axis='y', color=_LINE, linewidth=0.8)
    axes.tick_params(colors=_SOFT, length=0)
    axes.spines[['top', 'right', 'left']].set_visible(False)
    for i, run in enumerate(runs):
      steps, values = curves.series(run['records'], key)
      if len(steps):
        color = _COLORS[i % len(_COLORS)]
        mark = 'o' if len(steps) < 20 else None
        axes.plot(steps, values, color=color, label=run['name'], marker=mark, ms=4)
    drawn = [y for line in axes.lines for y in line.get_ydata()]
    if key == 'train/loss' and drawn and 0 < 20 * min(drawn) < max(drawn):
      axes.set_yscale('log')
    if axes.get_legend_handles_labels()[0]:
      axes.legend(frameon=False, labelcolor=_SOFT)
  out = io.BytesIO()
  FigureCanvasAgg(figure).print_png(out, metadata={'Software': None})
  return out.getvalue()


def rows(runs: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
  """What the table shows of each run, best first; missing values are nan."""
  task = metric.partition('/')[0]
  nan = float('nan')
  made = [
    {
      **{k: run[k] for k in run if k not in ('evaluation', 'records')},
      'value': run['evaluation'].get(metric, nan),
      'shuffled': run['evaluation'].get(f'{metric}_shuffled', nan),
      'blank': run['evaluation'].get(f'{metric}_blank', nan),
      'gain_low': run['evaluation'].get(f'{task}/gain_low', nan),
      'gain_high': run['evaluation'].get(f'{task}/gain_high', nan),
      'color': _COLORS[i % len(_COLORS)],
    }
    for i, run in enumerate(runs)
  ]
  return sorted(made, key=lambda row: -row['value'])


def page(runs: Sequence[Mapping[str, Any]], metric: str) -> str:
  """The page as a string of HTML, without a network."""
  sizes = [run['parameters'] for run in runs]
  return report.render(
    'compare.html.j2',
    metric=metric,
    rows=rows(runs, metric),
    spread=max(sizes) / min(sizes) - 1,
    curves=base64.b64encode(draw(runs, metric)).decode(),
  )


def compare(
  workdirs: Sequence[str | os.PathLike],
  out: str | os.PathLike,
  metric: str | None = None,
) -> list[dict[str, Any]]:
  """Measures runs and writes their page.

  Args:
    workdirs: of the runs.
    out: the page's file.
    metric: e.g. 'vqa/accuracy'; default: `common_metric`.

  Returns:
    The rows of the table.

  Raises:
    ValueError: a workdir without a run, or no metric that all have; one line.
  """
  runs = [measure(workdir) for workdir in workdirs]
  metric = metric or common_metric(runs)
  files.replace(pathlib.Path(out), page(runs, metric))
  return rows(runs, metric)


def main(argv: list[str] | None = None) -> int:
  """The command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog='python -m mmjax.eval.compare',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('workdirs', nargs='+')
  parser.add_argument('--out', default='compare.html', help='the page; %(default)s')
  parser.add_argument('--metric', help='e.g. vqa/accuracy; default: one that all have')
  args = parser.parse_args(argv)
  try:
    table = compare(args.workdirs, args.out, args.metric)
  except (ValueError, OSError) as error:
    return config_lib.refuse(error)
  print(
    f'{"run":14} {"value":>8} {"shuffled":>8} {"blank":>8} {"parameters":>12}'
    f' {"GFLOP/doc":>10} {"docs/s":>8} {"tokens/s":>9}'
  )
  for row in table:
    print(
      f'{row["name"]:14} {row["value"]:8.4f} {row["shuffled"]:8.4f} {row["blank"]:8.4f}'
      f' {row["parameters"]:12,} {row["flops"] / 1e9:10.3f}'
      f' {row["documents_per_second"]:8.1f} {row["tokens_per_second"]:9,.0f}'
    )
  print(args.out)
  return 0


if __name__ == '__main__':
  sys.exit(main())
