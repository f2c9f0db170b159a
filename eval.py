"""Evaluates a run from its checkpoint.

  python eval.py --workdir=runs/quickstart
  python eval.py --workdir=runs/quickstart --step=1000 --set eval.vqa.limit=500

The predictions of the training come out again, and it says whether they do. Exit
code 2 = something in the command, the workdir or the data doesn't fit. On several
hosts: the same command on each, see `mmjax.train.processes`.
"""

import sys

from absl import app, flags, logging

from mmjax.train import processes

_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')
_STEP = flags.DEFINE_integer('step', None, 'Which checkpoint; default: the newest.')
_SET = flags.DEFINE_multi_string('set', [], 'A changed value, as eval.vqa.rows=64.')
_TRACEBACK = flags.DEFINE_boolean('traceback', False, 'Show where an error came from.')
processes.define_flags()


def main(argv):
  from mmjax.eval.rerun import rerun
  from mmjax.train import config as config_lib

  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.ERROR)  # Orbax warns that it only reads
  try:
    if len(argv) > 1:
      raise SystemExit(config_lib.refuse(ValueError(f'unknown argument {argv[1]!r}')))
    if _WORKDIR.value is None:
      raise SystemExit(config_lib.refuse(ValueError('--workdir is missing')))
    processes.start_from_flags()
    rerun(_WORKDIR.value, _STEP.value, _SET.value)
  except ValueError as error:
    if _TRACEBACK.value or not config_lib.is_ours(error):
      raise
    sys.exit(config_lib.refuse(error))


if __name__ == '__main__':
  with processes.leaving_together():
    app.run(main)
