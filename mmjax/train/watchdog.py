"""A step that takes far too long says where every process is; the run goes on.

  step 812 takes 74 s, the others 3.1 s
  process 0: step 812, step for 74 s
    File "mmjax/train/loop.py", line 201, in _read ...
  process 1: step 812, data for 74 s
    File "mmjax/data/store.py", line 88, in __getitem__ ...

One thread per process looks at the clock. Too long is 10 x the median of the last
steps, and at least some seconds; evaluations have no measure. Each process sees by its
own clock that the step is late, and leaves its line where process 0 finds it, which
writes them all to the log. The stack is that of the main thread, taken by Python: it
needs no help of the code that hangs, only that this lets go of the interpreter, as
waiting for devices, disks and sockets does.
"""

import collections
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable

from mmjax.train.progress import Progress

_FRAMES, _LAST_FRAMES = 10, 3
_LAST = 50  # steps


class Watchdog:
  """A thread between `start` and `close`.

  Args:
    progress: of the run; its phases and steps are what is looked at.
    least: seconds below which nothing is too long; 0 = no watchdog.
    tell: gets the lines of this process and the head line, once per late step.
    factor: of the median.
  """

  def __init__(
    self,
    progress: Progress,
    least: float,
    tell: Callable[[str, str], None],
    factor: float = 10.0,
  ):
    self._progress, self._least, self._tell, self._factor = progress, least, tell, factor
    self._steps = collections.deque(maxlen=_LAST)
    self._main = threading.get_ident()
    self._began: float | None = None  # of the step that runs
    self._told = False
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)

  def start(self) -> None:
    if self._least:
      self._thread.start()

  def close(self) -> None:
    self._closed.set()
    if self._thread.is_alive():
      self._thread.join()

  def beat(self) -> None:
    """A step is done, or there is another reason to begin anew to count."""
    now = time.monotonic()
    if self._began is not None:
      self._steps.append(now - self._began)
    self._began, self._told = now, False

  def rest(self) -> None:
    """What runs now has no measure, until the next beat."""
    self._began = None

  def _watch(self):
    while not self._closed.wait(min(1.0, self._least / 5)):
      began, median = self._began, statistics.median(self._steps or [0.0])
      if began is None or self._told:
        continue
      late = time.monotonic() - began
      if late > max(self._least, self._factor * median):
        self._told = True
        head = f'step {self._progress.step} takes {late:.0f} s, the others {median:.2g} s'
        self._tell(head, self._where())

  def _where(self):
    where = self._progress
    seconds = time.monotonic() - where.since
    frame = sys._current_frames().get(self._main)
    stack = traceback.extract_stack(frame) if frame else []
    # Of the libraries, only where it ends: what called them is ours.
    near = [f for f in stack[:-_LAST_FRAMES] if 'site-packages' not in f.filename]
    stack = traceback.format_list([*near[-_FRAMES:], *stack[-_LAST_FRAMES:]])
    return f'step {where.step}, {where.phase} for {seconds:.0f} s\n{"".join(stack)}'
