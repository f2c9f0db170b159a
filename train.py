"""Trains what a config describes: flags -> config -> mmjax.

  python train.py --config=configs/quickstart.py --workdir=runs/quickstart
  python train.py --config=configs/quickstart.py:tiny --config.train.steps=20

The same command again goes on from the last checkpoint. Ctrl-C or SIGTERM saves
and ends with exit code 0; 1 = the run could not go on; 2 = something in the
command, the config, the data or the workdir doesn't fit.

On several hosts: the same command on each, see `mmjax.train.processes`.
"""

import pathlib
import sys

from absl import app, flags, logging

from mmjax.train import config as config_lib
from mmjax.train import processes

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where the run goes; default: runs/<name of the config>.'
)
_TRACEBACK = flags.DEFINE_boolean('traceback', False, 'Show where an error came from.')
processes.define_flags()


def main(argv):
  from mmjax.train import loop

  if len(argv) > 1:
    sys.exit(config_lib.refuse(ValueError(f'unknown argument {argv[1]!r}')))
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # mmjax has its own log
  workdir = _WORKDIR.value or pathlib.Path('runs') / config_lib.spec_name(sys.argv)
  try:
    processes.start_from_flags()
    loop.train(flags.FLAGS.config, workdir)
  except loop.RunStopped as error:
    if _TRACEBACK.value:
      raise
    config_lib.refuse(error)
    sys.exit(1)
  except ValueError as error:
    if _TRACEBACK.value or not config_lib.is_ours(error):
      raise
    sys.exit(config_lib.refuse(error))


if __name__ == '__main__':
  with processes.leaving_together():
    app.run(main, flags_parser=config_lib.parse_flags)
