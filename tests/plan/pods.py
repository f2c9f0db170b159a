"""What the pod configs may take: one line each in pods.json, made by

  python tests/plan/pods.py [CONFIG@TOPOLOGY ...]

from what the compiler says now. Look at what changed before it is committed: a number
that grew is a regression until it is explained.
"""

import json
import pathlib
import sys

from mmjax.plan import report, topology
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


def main(names):
  for name in names or PODS:
    cache = pathlib.Path('~/.cache/mmjax/plan').expanduser()
    made = budget(load(name), name, cache)
    print(name, made, flush=True)
    golden = json.loads(FILE.read_text()) | {name: made}
    ordered = {n: golden[n] for n in PODS if n in golden}
    FILE.write_text(json.dumps(ordered, indent=1) + '\n')


if __name__ == '__main__':
  main(sys.argv[1:])
