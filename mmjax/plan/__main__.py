"""Does it fit, and what can it reach? Asked before anything is paid for.

  python -m mmjax.plan --config=configs/unified_8b.py --topology=v5e:16x16
  python -m mmjax.plan --config=... --topology=v5p-128 --slices=2
    --config.sharding.mesh.fsdp=32 --config.model.remat=dots --json=plan.json
  python -m mmjax.plan --config=... --topology=v5e-256 --search

Compiles the training step of the config for chips that aren't there (libtpu, no TPU
needed) and prints what one of them would hold, compute and send. What the numbers mean,
and what they can't say: docs/planning.md.

Exit codes: 0 = it fits; 3 = it doesn't, with the nearest change that does; 2 = something
in the command or the config is wrong.
"""

import os
import pathlib
import sys

# Before JAX starts: a plan has no use for the devices that are here.
os.environ['JAX_PLATFORMS'] = 'cpu'

from absl import app, flags, logging

from mmjax.plan import CACHE
from mmjax.train import config as config_lib

_TOPOLOGY = flags.DEFINE_string(
  'topology', 'v5e:16x16', "Chips of one slice, like 'v5e:16x16' or 'v5p-128'."
)
_SLICES = flags.DEFINE_integer('slices', 1, 'How many such slices.')
_JSON = flags.DEFINE_string('json', None, "A file to write the plan to; '-' = stdout.")
_CACHE = flags.DEFINE_string('cache', CACHE, "Where read-outs are kept; '' = nowhere.")
_NEAREST = flags.DEFINE_boolean(
  'nearest', True, 'Where it does not fit, look for the nearest change that does.'
)
_SEARCH = flags.DEFINE_boolean(
  'search', False, 'Try meshes, remat and microbatches, and rank them.'
)
_MINUTES = flags.DEFINE_float('minutes', 15.0, 'How long to search.')
_TRACEBACK = flags.DEFINE_boolean('traceback', False, 'Show where an error came from.')

FITS, WRONG, DOES_NOT_FIT = 0, 2, 3


def main(argv):
  from mmjax.plan import report, search, topology
  from mmjax.plan.compile import plan

  if len(argv) > 1:
    sys.exit(config_lib.refuse(ValueError(f'unknown argument {argv[1]!r}')))
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)
  config = flags.FLAGS.config
  cache = _CACHE.value or None
  try:
    slices = topology.parse(_TOPOLOGY.value, _SLICES.value)
    if _SEARCH.value:
      found = search.search(config, slices, cache, minutes=_MINUTES.value)
      print(search.table(found), flush=True)
      _write([one.to_json() for one in found])
      sys.exit(FITS if any(one.fits for one in found) else DOES_NOT_FIT)
    made = plan(config, slices, cache)
    print(report.text(made), flush=True)
    _write(report.to_json(made))
    if not made.fits and _NEAREST.value:
      print(search.nearest(config, slices, cache, made.peak), flush=True)
    sys.exit(FITS if made.fits else DOES_NOT_FIT)
  except ValueError as error:
    if _TRACEBACK.value or not config_lib.is_ours(error):
      raise
    sys.exit(config_lib.refuse(error))


def _write(tree):
  import json

  if _JSON.value == '-':
    print(json.dumps(tree, indent=2))
  elif _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps(tree, indent=2) + '\n')


if __name__ == '__main__':
  app.run(main, flags_parser=config_lib.parse_flags)
