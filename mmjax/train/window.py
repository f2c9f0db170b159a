"""Means of the steps between two lines of the log.

Losses are weighted by their trained tokens, so a line is the mean over tokens, as
if its steps had been one batch; updates left out count nowhere but in 'skipped'. A
checkpoint carries the open window, so a resumed run writes the same lines.
"""

import collections
import time
from collections.abc import Mapping
from typing import Any

_LAST = ('learning_rate', 'skipped_in_a_row')


class Window:
  """Sums up `make_step`'s metrics and the loader's stats."""

  def __init__(self):
    self._reset()
    self.restart_clock()

  def _reset(self):
    self._weight, self._steps, self._skipped = 0.0, 0, 0
    self._tokens = collections.Counter()  # sums weighted by trained tokens
    self._plain = collections.Counter()  # sums over good steps
    self._stats = collections.Counter()  # sums over all steps
    self._last, self._epoch = {}, 0.0

  def restart_clock(self) -> None:
    """Leaves out what was before (compiling, evaluating) of the speed."""
    self._began, self._timed = time.monotonic(), 0.0

  def add(self, metrics: Mapping[str, float], stats: Mapping[str, float]) -> None:
    """Adds a step."""
    self._steps += 1
    for name, value in stats.items():
      self._stats[name] += float(value)
    self._last = {k: metrics[k] for k in _LAST if k in metrics}
    self._epoch = stats.get('epoch', 0.0)
    if metrics['skipped']:
      self._skipped += 1
      return
    weight = metrics['weight']
    self._weight += weight
    self._timed += weight
    for name, value in metrics.items():
      if name == 'grad_norm':
        self._plain[name] += value
      elif name not in (*_LAST, 'weight', 'skipped'):
        self._tokens[name] += value * weight

  def flush(self) -> dict[str, float]:
    """The line of the log, {'train/loss': ...}; the window is empty afterwards."""
    good = max(self._steps - self._skipped, 1)
    line = {f'train/{k}': v / max(self._weight, 1e-30) for k, v in self._tokens.items()}
    line |= {f'train/{k}': v / good for k, v in self._plain.items()}
    line |= {f'train/{k}': v for k, v in self._last.items() if k == 'learning_rate'}
    line['train/skipped'] = float(self._skipped)
    line['train/tokens_per_step'] = self._weight / good
    seconds = time.monotonic() - self._began
    if self._timed and seconds > 0:
      line['train/tokens_per_second'] = self._timed / seconds
    for name, value in self._stats.items():
      total = name.startswith('bad/')  # a count; the others are means over steps
      line[f'data/{name}'] = value if total else value / max(self._steps, 1)
    if 'data/epoch' in line:
      line['data/epoch'] = self._epoch
    self._reset()
    self.restart_clock()
    return line

  def to_json(self) -> dict[str, Any]:
    return {
      k: dict(v) if isinstance(v, dict) else v
      for k, v in vars(self).items()
      if k not in ('_began', '_timed')
    }

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> 'Window':
    window = cls()
    for name, value in data.items():
      if isinstance(value, dict) and name != '_last':
        value = collections.Counter(value)
      setattr(window, name, value)
    return window
