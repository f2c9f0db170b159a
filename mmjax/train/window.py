"""Means of the steps between two lines of the log.

Losses are weighted by their trained tokens, so a line is the mean over tokens, as
if its steps had been one batch; updates left out count nowhere but in 'skipped'. A
checkpoint carries the open window, so a resumed run writes the same lines.

Metrics are of the whole batch on every process; the loader's stats are of the rows
that this process loads, so they are added up over the processes.
"""

import collections
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

Gather = Callable[[Any], list[Any]]  # `processes.gather`, or of one process alone

_LAST = ('learning_rate', 'skipped_in_a_row')


def share(stats: Mapping[str, float], blocks: int) -> dict[str, float]:
  """The part of this process in the stats of a step: all parts add up to the whole.

  Args:
    stats: of its rows: counts, 'fill/...' (shares), and 'epoch' (of the step).
    blocks: how many different blocks of rows the processes load.
  """
  processes = jax.process_count()
  parts = {k: v / (processes if k.startswith('fill/') else processes / blocks)
           for k, v in stats.items()}  # fmt: skip
  return parts | {k: v for k, v in stats.items() if k == 'epoch'}


def _alone(value: Any) -> list[Any]:
  return [value]


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

  def flush(self, gather: Gather = _alone) -> dict[str, float]:
    """The line of the log, {'train/loss': ...}; the window is empty afterwards."""
    stats = self._whole(gather)
    good = max(self._steps - self._skipped, 1)
    line = {f'train/{k}': v / max(self._weight, 1e-30) for k, v in self._tokens.items()}
    line |= {f'train/{k}': v / good for k, v in self._plain.items()}
    line |= {f'train/{k}': v for k, v in self._last.items() if k == 'learning_rate'}
    line['train/skipped'] = float(self._skipped)
    line['train/tokens_per_step'] = self._weight / good
    seconds = time.monotonic() - self._began
    if self._timed and seconds > 0:
      line['train/tokens_per_second'] = self._timed / seconds
    for name, value in stats.items():
      total = name.startswith('bad/')  # a count; the others are means over steps
      line[f'data/{name}'] = value if total else value / max(self._steps, 1)
    if 'data/epoch' in line:
      line['data/epoch'] = self._epoch
    self._reset()
    self.restart_clock()
    return line

  def _whole(self, gather):
    """The stats of all processes together; one that is silent has nothing of it."""
    whole = collections.Counter()
    for part in gather(dict(self._stats)):
      whole.update(part)
    return whole

  def to_json(self, gather: Gather = _alone) -> dict[str, Any]:
    """For `from_json`; with the stats of all processes."""
    plain = {k: dict(v) if isinstance(v, dict) else v for k, v in vars(self).items()
             if k not in ('_began', '_timed')}  # fmt: skip
    return plain | {'_stats': dict(self._whole(gather))}

  @classmethod
  def from_json(cls, data: Mapping[str, Any], first: bool = True) -> 'Window':
    """The window again; what the processes had together goes to the first of them."""
    window = cls()
    for name, value in data.items():
      if isinstance(value, dict) and name != '_last':
        value = collections.Counter(value)
      setattr(window, name, value)
    if not first:
      window._stats.clear()
    return window
