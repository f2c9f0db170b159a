"""SIGTERM and Ctrl-C ask a run to stop; they don't break it off.

The step in work is finished, a checkpoint is written, and the process ends with
exit code 0, since nothing went wrong: the same command goes on. A second Ctrl-C
kills. What can be done again without loss (an evaluation) is broken off at once.
"""

import contextlib
import logging
import signal

import jax
import numpy as np

_log = logging.getLogger('mmjax')


class Signalled(BaseException):
  """SIGTERM or SIGINT, where no state is at risk."""


class Signals:
  """While active, the first SIGTERM or SIGINT only asks; a second SIGINT kills."""

  def __init__(self):
    self.asked, self._raise, self._old = False, False, {}

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
    _log.info('%s: finishing the step and saving', signal.Signals(number).name)
    self.asked = True
    signal.signal(signal.SIGINT, signal.SIG_DFL)
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

  def agreed(self, done: int, every: int) -> bool:
    """Whether to stop; with several processes, all of them at the same step."""
    if jax.process_count() == 1:
      return self.asked
    if done % every:
      return False
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(self.asked))))
