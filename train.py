"""Trains what a config describes: flags -> config -> mmjax.

  python train.py --config=configs/quickstart.py --workdir=runs/quickstart
  python train.py --config=configs/quickstart.py:tiny --config.train.steps=20

The same command again goes on from the last checkpoint. Exit codes:

  0    the run is done; or Ctrl-C, which saves first
  1    the run could not go on, a line says why
  2    something in the command, the config, the data or the workdir doesn't fit
  75   there is work left and nothing wrong with it: SIGTERM, after saving, or another
       process was lost; a scheduler that starts again whatever wasn't 0 does right

On several hosts: the same command on each, see `mmjax.train.processes`.
"""

import pathlib
import sys

from absl import app, flags, logging

from mmjax.train import config as config_lib
from mmjax.train import processes

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run, or gs://...; default: runs/<name of the config>.'
)
_TRACEBACK = flags.DEFINE_boolean('traceback', False, 'Show where an error came from.')
_PROFILE = flags.DEFINE_string(
  'profile', None, 'start:stop, the steps to write a trace of into the workdir.'
)
processes.define_flags()


def main(argv):
  from mmjax.train import loop, profile

  if len(argv) > 1:
    sys.exit(config_lib.refuse(ValueError(f'unknown argument {argv[1]!r}')))
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # mmjax has its own log
  workdir = _WORKDIR.value or pathlib.Path('runs') / config_lib.spec_name(sys.argv)
  try:
    steps = profile.span(_PROFILE.value)
    processes.start_from_flags()
    outcome = loop.train(flags.FLAGS.config, workdir, profile=steps)
  except loop.RunStopped as error:
    if _TRACEBACK.value:
      raise
    config_lib.refuse(error)
    sys.exit(error.code)
  except ValueError as error:
    if _TRACEBACK.value or not config_lib.is_ours(error):
      raise
    sys.exit(config_lib.refuse(error))
  sys.exit(processes.STOPPED if outcome == 'preempted' else 0)


if __name__ == '__main__':
  with processes.leaving_together():
    app.run(main, flags_parser=config_lib.parse_flags)
