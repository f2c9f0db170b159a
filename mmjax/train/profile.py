"""A trace of some steps, for TensorBoard's profile page or Perfetto, on demand.

  python train.py --profile=100:103 ...     steps 100, 101 and 102
  <workdir>/profile/plugins/profile/<time>/<host>.xplane.pb

Of process 0 alone. Costs nothing where it isn't asked for.
"""

import pathlib
import re
from typing import Any

import jax


def span(text: str | None) -> tuple[int, int] | None:
  """'100:103' as numbers.

  Raises:
    ValueError: it isn't two growing numbers from 1 on.
  """
  if text is None:
    return None
  found = re.fullmatch(r'(\d+):(\d+)', text)
  if not found or not 0 < int(found[1]) < int(found[2]):
    raise ValueError(f'--profile={text}: must be start:stop, two steps, e.g. 100:103')
  return int(found[1]), int(found[2])


class Profile:
  """Traces the steps of a `span`; None = nothing."""

  def __init__(
    self, folder: pathlib.Path, steps: tuple[int, int] | None, seen_as: Any = None
  ):
    self._folder, self._active = folder, False
    self._seen_as = seen_as or folder  # the name to tell
    self._start, self._stop = steps or (0, 0)

  def before(self, step: int, state: Any) -> str | None:
    """To be called before a step is dispatched; what to tell, if it ended.

    Args:
      state: what the step gets: waited for, so that the trace holds whole steps.
    """
    if step == self._start or (step == self._stop and self._active):
      jax.block_until_ready(state)
    if step == self._start:
      jax.profiler.start_trace(str(self._folder))
      self._active = True
    return self.close() if step == self._stop else None

  def close(self) -> str | None:
    if not self._active:
      return None
    self._active = False
    jax.profiler.stop_trace()
    return f'a trace of the steps from {self._start} on is in {self._seen_as}'
