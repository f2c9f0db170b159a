"""SIGTERM and Ctrl-C ask a run to stop; they don't break it off.

The step in work is finished, a checkpoint is written, and the process ends with
exit code 0, since nothing went wrong: the same command goes on. A second Ctrl-C
kills. What can be done again without loss (an evaluation) is broken off at once.

Several processes have to stop at the same step, though the signal may reach only
one of them. With each step they compute together whether anyone was asked, and
each reads the answer one step later, when it is there: nobody waits for it.
"""

import contextlib
import logging
import signal

import jax

from mmjax.train import processes

_log = logging.getLogger('mmjax')


class Signalled(BaseException):
  """SIGTERM or SIGINT, where no state is at risk."""


class Signals:
  """While active, the first SIGTERM or SIGINT only asks; a second SIGINT kills."""

  def __init__(self):
    self.asked, self._raise, self._old = False, False, {}
    self._told: jax.Array | None = None

  def __enter__(self):
    for number in (signal.SIGTERM, signal.SIGINT):
      with contextlib.suppress(ValueError):  # not in the main thread
        self._old[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _handle(self, number, frame):
    del frame
    self.asked = True
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

  def agreed(self) -> bool:
    """Whether to stop after this step: with several processes, the same for all."""
    if jax.process_count() == 1:
      return self.asked
    told, self._told = self._told, processes.anyone(self.asked)
    if told is None or not bool(told):
      return False
    if not self.asked:
      _log.info('another process was asked to stop: saving')
    return True
