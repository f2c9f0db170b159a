"""How one source deals its documents to windows: a comb that is moved on.

The documents lie in a line, alike beside alike (`binpack.strata`). A window takes
every n-th, the next one their neighbours, and so on: n windows are an epoch. With
n = 3, window by window:

  place    0 1 2 3 4 5 6 7        time of place d in epoch e:  (d mod n) + n e
  window   0 1 2 0 1 2 0 1
           3 4 5 3 ...

So each window holds a fair sample of all lengths, its s-th document lies within
the places [s n, (s + 1) n) and needs at most what the largest there needs: one
packing serves all windows. n is any fraction, also below 1. Who of a group of
alike stands at the places of the group is dealt anew in each epoch; the group
counts how often it was asked, so no document comes twice before all came once,
even if n changes on the way.
"""

import dataclasses
from fractions import Fraction

import numpy as np

from mmjax.data.shuffle import hashed, permute


@dataclasses.dataclass(frozen=True, eq=False)
class Line:
  """The documents of a source in a line.

  documents: i32[N] along the line.
  ends: i64[U] where groups end.
  largest: i64[U, K] the most that one of the group needs.
  salt: of the dealing.
  """

  documents: np.ndarray
  ends: np.ndarray
  largest: np.ndarray
  salt: int

  def __len__(self) -> int:
    return len(self.documents)

  def deal(self, group: np.ndarray, asked: np.ndarray):
    """(documents, epochs) of the groups, each asked for the `asked`-th time."""
    starts = np.append(0, self.ends[:-1])
    size = (self.ends - starts)[group]
    epoch, place = np.divmod(asked, size)
    key = hashed(epoch, self.salt, group)
    return self.documents[starts[group] + permute(place, size, key)], epoch


class Comb:
  """A comb over a line: which places are taken in which window.

  Args:
    line: of the source.
    rate: epochs per window, 1 / n.
    asked: i64[U] how often each group was asked before the first window.

  Attributes:
    slots: the most documents that a window takes.
    needs: i64[slots, K] what the s-th of a window needs at most.
  """

  def __init__(self, line: Line, rate: Fraction, asked: np.ndarray):
    self.line, self.asked = line, asked
    self._a, self._b = rate.numerator, rate.denominator  # n = b / a
    N, a, b = len(line), self._a, self._b
    self.slots = -(-N * a // b)
    if not a:
      self.needs = line.largest[:0]
      return
    s = np.arange(self.slots)
    first = self._group(s * b // a)
    last = self._group(np.minimum(-(-(s + 1) * b // a) - 1, N - 1))
    self.needs = line.largest[first]
    for more in range(1, int((last - first).max(initial=0)) + 1):
      among = np.minimum(first + more, last)
      self.needs = np.maximum(self.needs, line.largest[among])
    # Teeth before each end of a group, for `before`.
    self._tooth = line.ends * a // b
    self._starts = -(-np.arange(self.slots + 2) * b // a)

  def _group(self, place):
    return np.searchsorted(self.line.ends, place, 'right')

  def window(self, w: int) -> np.ndarray:
    """The groups that the slots of window w ask, i64[slots] or one or two fewer."""
    if not self.slots:
      return np.zeros(0, np.int64)
    a, b = self._a, self._b
    first = w * a + b * (1 + -(w + 1) * a // b)  # the first tooth, times a
    place = -(-(first + np.arange(self.slots) * b) // a)
    return self._group(place[place < len(self.line)])

  def before(self, w: int) -> np.ndarray:
    """How often each group was asked before window w, i64[U]."""
    if not self.slots:
      return self.asked
    a, b = self._a, self._b
    epochs, t = divmod(w * a, b)
    past = -(-(np.arange(self.slots + 2) * b + t) // a)  # where teeth stand now
    whole = np.append(0, np.cumsum(past - self._starts))
    ends, tooth = self.line.ends, self._tooth
    upto = whole[tooth] + np.minimum(past[tooth], ends) - self._starts[tooth]
    return self.asked + np.diff(epochs * ends + upto, prepend=0)
