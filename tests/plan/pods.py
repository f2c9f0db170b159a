"""What the pod configs may take: one line each in pods.json, made by

  python tests/plan/pods.py [NAME ...]

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
PODS = {
  'unified_8b': 'v5e:16x16',
  'unified_1b': 'v5e:16x16',
  'unified_4b_image': 'v5e:16x16',
  'paligemma_3b': 'v5e:8x8',
  'siglip_so400m': 'v5e:8x8',
  'clip_l14': 'v5e:16x16',
  'flamingo_3b': 'v5e:16x16',
  'flamingo_9b': 'v5e:16x16',
  'unified_8b:tiny': 'v5e:2x2',
}
SHARE = 0.03  # that a number may be off
KEYS = ('hbm', 'wire', 'kernels')


def load(name, **rules):
  """A pod's config, with other sharding rules."""
  file, _, variant = name.partition(':')
  config = config_lib.load(f'{ROOT}/configs/{file}.py' + (variant and f':{variant}'))
  config.sharding.rules.update(rules)
  config_lib.check(config)
  return config


def budget(config, name, cache=None):
  """{'topology', 'hbm', 'wire', 'kernels', ...} of a config."""
  made = plan(config, topology.parse(PODS[name]), cache)
  tree = report.to_json(made)
  if not made.fits:
    raise ValueError(f'{name} does not fit {PODS[name]}: {made.peak} bytes')
  return {
    'topology': PODS[name],
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
  golden = json.loads(FILE.read_text()) if FILE.exists() else {}
  for name in names or PODS:
    golden[name] = budget(
      load(name), name, pathlib.Path('~/.cache/mmjax/plan').expanduser()
    )
    print(name, golden[name], flush=True)
    ordered = {n: golden[n] for n in PODS if n in golden}
    FILE.write_text(json.dumps(ordered, indent=1) + '\n')


if __name__ == '__main__':
  main(sys.argv[1:])
