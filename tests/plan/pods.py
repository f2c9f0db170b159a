"""What the pod configs may take: one line each in pods.json, made by

  python tests/plan/pods.py [CONFIG@TOPOLOGY ...]

from what the compiler says now. Look at what changed before it is committed: a number
that grew is a regression until it is explained. `--table` prints the docs' table of them.
"""

import json
import math
import pathlib
import sys

from mmjax.plan import CACHE, report, topology
from mmjax.plan.compile import plan
from mmjax.train import config as config_lib

ROOT = pathlib.Path(__file__).parents[2]
FILE = pathlib.Path(__file__).with_suffix('.json')
PODS = (
  'unified_8b@v5e:16x16',
  'unified_4b_image@v5e:16x16',
  'unified_1b@v5e:16x16',
  'unified_1b@v5p:4x4x4',
  'flamingo_3b@v5e:16x16',
  'flamingo_3b@v5p:4x4x4',
  'flamingo_9b@v5e:16x16',
  'flamingo_9b@v5p:4x4x4',
  'paligemma_3b@v5e:8x8',
  'siglip_so400m@v5e:8x8',
  'clip_l14@v5e:16x16',
  'unified_8b:tiny@v5e:2x2',
)
# (modelled MFU, GiB, bytes on the wire): of others' steps at the same model FLOPs, batch
# and chips, read out in the same way, and what is aimed at; 0 = no aim.
ANCHORS = {
  'unified_8b': ('MaxText', 0.509, 6.41, 6.0e10),
  'unified_4b_image': ('MaxText', 0.403, 12.37, 2.67e10),
  'paligemma_3b': ('big_vision', 0.319, 4.02, 3.49e10),
  'siglip_so400m': ('big_vision', 0.314, 4.75, 1.69e10),
}
GOALS = {
  'unified_8b': (0.55, 15, 6.0e10),
  'unified_4b_image': (0.5, 12, 2.7e10),
  'paligemma_3b': (0.5, 4, 2.0e10),
  'siglip_so400m': (0.45, 4.75, 1.2e10),
  'unified_1b': (0.45, 0, 0),
  'flamingo_3b': (0.45, 0, 0),
  'flamingo_9b': (0.45, 0, 0),
}
SHARE = 0.03  # that a number may be off
KEYS = ('hbm', 'wire', 'kernels')


def load(name, **rules):
  """A pod's config, with other sharding rules."""
  file, _, variant = name.partition('@')[0].partition(':')
  config = config_lib.load(f'{ROOT}/configs/{file}.py' + (variant and f':{variant}'))
  config.sharding.rules.update(rules)
  config_lib.check(config)
  return config


def chips(name):
  """The topology of a pod."""
  return topology.parse(name.partition('@')[2])


def budget(config, name, cache=None):
  """{'hbm', 'wire', 'kernels', ...} of a config on a pod's chips."""
  made = plan(config, chips(name), cache)
  if not made.fits:
    raise ValueError(f'{name} does not fit: {made.peak} bytes')
  tree = report.to_json(made)
  return {
    'hbm': made.peak,
    'wire': made.readout.wire_bytes,
    'kernels': made.readout.kernels,
    'model_flops': made.model_flops,
    'modelled_mfu': round(tree['modelled']['mfu'], 4),
    'roofline_mfu': round(tree['roofline']['mfu'], 4),
    'modelled_ms': round(1e3 * made.readout.modelled_seconds, 1),
  }


def off(budget, golden):
  """What of a budget isn't what it was: {key: (now, then)}."""
  return {
    key: (budget[key], golden[key])
    for key in KEYS
    if abs(budget[key] - golden[key]) > SHARE * golden[key]
  }


def table(golden):
  """Markdown: what each pod takes, beside its anchor and its goal."""
  lines = ['| config | chips | MFU | GiB | sent | anchor | goal |', '|' + ' --- |' * 7]
  for name in PODS:
    config, _, chips = name.partition('@')
    if config.endswith(':tiny'):
      continue
    base = config.partition(':')[0]
    anchor, goal = ANCHORS.get(base), GOALS.get(base)
    cells = [f'`{config}`', f'`{chips}`', *(['not compiled yet', '', ''])]
    if name in golden:
      g = golden[name]
      found = g['modelled_mfu'], g['hbm'] / 2**30, g['wire']
      cells[2:] = _said(found, goal)
    cells.append(f'{anchor[0]} {", ".join(_said(anchor[1:]))}' if anchor else '')
    cells.append(', '.join(s for s, n in zip(_said(goal), goal) if n) if goal else '')
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def _said(found, goal=None):
  """MFU, GiB and bytes as words; in bold where the goal isn't met."""
  words = [f'{found[0]:.3f}', f'{found[1]:.2f}', f'{found[2]:.2g}'.replace('e+', 'e')]
  mfu, gib, wire = goal or (0, 0, 0)
  short = found[0] < mfu, found[1] > (gib or math.inf), found[2] > (wire or math.inf)
  return [f'**{w}**' if s else w for w, s in zip(words, short)]


def main(names):
  if names == ['--table']:
    print(table(json.loads(FILE.read_text())))
    return
  for name in names or PODS:
    made = budget(load(name), name, CACHE)
    print(name, made, flush=True)
    golden = json.loads(FILE.read_text()) | {name: made}
    ordered = {n: golden[n] for n in PODS if n in golden}
    FILE.write_text(json.dumps(ordered, indent=1) + '\n')


if __name__ == '__main__':
  main(sys.argv[1:])
