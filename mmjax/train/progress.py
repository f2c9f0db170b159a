"""Where a process is, and where its time went.

  restoring | compiling | data  step  data  step  saving  data  step  evaluating | ...

One phase ends where the next begins, so the seconds of all add up to the run's. What
is there so far: the watchdog tells the phase of a step that takes too long, and the
log the goodput, the share of the time since the run first began that went into steps
(and waiting for their data) which the run still has. Restarts count against it, and
so do steps that were made again after a kill: a checkpoint carries the sum.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

_GOOD = ('step', 'data')


class Progress:
  """Phases of one process.

  Args:
    earlier: `to_json` of the checkpoint that the run goes on from.
  """

  def __init__(self, earlier: Mapping[str, Any] | None = None):
    earlier = earlier or {}
    self.step, self.phase = 0, 'starting'
    self._since = time.monotonic()
    self._good = float(earlier.get('seconds', 0.0))
    self._began = float(earlier.get('began', time.time()))

  @property
  def since(self) -> float:
    """When this phase began, by `time.monotonic`."""
    return self._since

  def enter(self, phase: str, step: int | None = None) -> None:
    now = time.monotonic()
    if self.phase in _GOOD:
      self._good += now - self._since
    self.phase, self._since = phase, now
    self.step = self.step if step is None else step

  @contextlib.contextmanager
  def during(self, phase: str) -> Iterator[None]:
    """A phase, and back to the one before."""
    before = self.phase
    self.enter(phase)
    try:
      yield
    finally:
      self.enter(before)

  def goodput(self) -> float:
    """Seconds in steps / seconds since the run began, 0 to 1."""
    self.enter(self.phase)
    # The beginning is by the clock of whichever host it was; it may be off.
    wall = max(time.time() - self._began, self._good, 1e-9)
    return self._good / wall

  def to_json(self) -> dict[str, float]:
    self.enter(self.phase)
    return {'seconds': self._good, 'began': self._began}
