"""SIGTERM and Ctrl-C ask a run to stop; they don't break it off.

The step in work is finished, a checkpoint is written, and the process ends: the same
command goes on. After SIGTERM the exit code is 75 (EX_TEMPFAIL), since it is how a
scheduler takes machines away (a preempted TPU VM, a GKE pod, SLURM's time limit), and
what isn't 0 it starts again. After Ctrl-C it is 0: somebody wanted that, and a loop
`until python train.py ...` ends. A second Ctrl-C kills. What can be done again without
loss (an evaluation) is broken off at once.

Several processes have to stop at the same step, though the signal may reach only
one of them. With each step they compute together whether anyone was asked, and
each reads the answer one step later, when it is there: nobody waits for it. (JAX's
preemption service, `reached_preemption_sync_point`, does the same for the same
signal, but takes its handler away from us; so it is off, see `processes.start`.)
"""

import contextlib
import logging
import signal

import jax

from mmjax.train import processes

_log = logging.getLogger('mmjax')
_LEVEL = {signal.SIGINT: 1, signal.SIGTERM: 2}  # of two signals the larger counts
OUTCOMES = (None, 'stopped', 'preempted')  # by level


class Signalled(BaseException):
  """SIGTERM or SIGINT, where no state is at risk."""


class Signals:
  """While active, the first SIGTERM or SIGINT only asks; a second SIGINT kills."""

  def __init__(self):
    self.asked = 0  # a level
    self._raise, self._old = False, {}
    self._told: jax.Array | None = None

  def __enter__(self):
    for number in _LEVEL:
      with contextlib.suppress(ValueError):  # not in the main thread
        self._old[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _handle(self, number, frame):
    del frame
    self.asked = max(self.asked, _LEVEL[number])
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(RuntimeError):  # it came in the middle of a write
      name = signal.Signals(number).name
      _log.info('%s: finishing the step and saving (Ctrl-C now: at once)', name)
    if self._raise:
      raise Signalled

  @contextlib.contextmanager
  def raising(self):
    """Inside, a signal raises `Signalled`; not where other processes would wait."""
    if jax.process_count() > 1:
      yield
      return
    if self.asked:
      raise Signalled
    self._raise = True
    try:
      yield
    finally:
      self._raise = False

  def agreed(self) -> str | None:
    """The outcome, if to stop after this step: the same for all processes."""
    if jax.process_count() == 1:
      return OUTCOMES[self.asked]
    told, self._told = self._told, processes.largest(self.asked)
    level = 0 if told is None else int(told)
    if level and not self.asked:
      _log.info('another process was asked to stop: saving')
    return OUTCOMES[level]
