"""One packing for all windows: slots of sources in rows, rows in a fair order.

  slots of a window      rows (packed once)     window 0            window 1
  pages    0 1 2         [p0 c1] [p1 p2]        [d7 e2] [d1 d9]     [d3 e5] [d2 d6]
  captions 0 1 2         [c0 c2] ...            [e9 e1] ...         [e8 e3] ...

A window deals documents to slots (see `comb`) and is evaluated whole, once: a few
thousand rows for some ten milliseconds. The order of the rows keeps the sources'
shares even all along; rows with equal counts of each source change places from
window to window, and so do the documents in a row.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from mmjax.data import binpack
from mmjax.data.comb import Comb
from mmjax.data.shuffle import hashed, permute

WINDOW = 2**15  # documents, about
EVEN = 1000  # documents in which the sources' shares are looked at
_AHEAD = 64  # rows among which the next is chosen
_ONE = 1 << 20


def rates(sizes: Sequence[int], shares: Sequence[Fraction]) -> list[Fraction]:
  """Epochs per window of each source.

  The source with the largest share has a whole number of windows per epoch, or of
  epochs per window; so of a single one no slot stays empty.
  """
  main = max(range(len(sizes)), key=lambda i: shares[i])
  aim = min(WINDOW, sum(sizes))
  epochs = shares[main] * aim / sizes[main]  # per window
  epochs = Fraction(int(epochs)) if epochs >= 1 else 1 / Fraction(-int(-1 // epochs))
  documents = epochs * sizes[main] / shares[main]
  return [
    (documents * share / max(size, 1)).limit_denominator(2**40) if share else Fraction(0)
    for size, share in zip(sizes, shares)
  ]


class Deck:
  """Windows of rows, one after the other.

  Args:
    combs: of the sources.
    shares: of the sources.
    room: i64[K] of a row.
    first_row: the global row that window 0 begins with.
    seed: of the order.

  Attributes:
    num_rows: rows of a window.
    off_balance: see `plan.PackPlan`.
  """

  def __init__(self, combs: Sequence[Comb], shares, room, first_row: int, seed: int):
    self.combs, self.first_row, self.seed = tuple(combs), first_row, seed
    needs = np.concatenate([comb.needs for comb in combs])
    source = np.repeat(np.arange(len(combs)), [comb.slots for comb in combs])
    # Equal needs of one source are one type.
    types, which = _group(np.column_stack([source, needs]))
    patterns = binpack.pack(types[:, 1:], np.bincount(which), room)
    sizes = np.concatenate([np.full(times, len(row)) for row, times in patterns])
    places = np.concatenate([np.tile(row, times) for row, times in patterns])
    # The n-th place of a type is the n-th slot of it.
    slots = np.empty(len(places), np.int64)
    slots[np.argsort(places, kind='stable')] = np.argsort(which, kind='stable')
    self.num_rows = len(sizes)
    row = np.repeat(np.arange(self.num_rows), sizes)
    count = np.bincount(
      row * len(combs) + source[slots], minlength=self.num_rows * len(combs)
    )
    count = count.reshape(self.num_rows, len(combs))
    share = np.array([int(one * _ONE) for one in shares])
    surplus = count * _ONE - count.sum(axis=1, keepdims=True) * share
    if len(combs) == 1:
      surplus[:] = 0
    order = _even(surplus)
    self.off_balance = _off_balance(count[order], share)
    place = np.empty(self.num_rows, np.int64)
    place[order] = np.arange(self.num_rows)
    self._row_of_slot = np.empty(len(slots), np.int64)
    self._row_of_slot[slots] = place[row]
    # Rows of one class may change places.
    _, self._class = _group(surplus[order])
    self._members = np.argsort(self._class, kind='stable')
    self._class_size = np.bincount(self._class)

  def window(self, w: int):
    """(offsets i64[R + 1], documents, epochs) of the rows of window w."""
    rows, documents, epochs = [], [], []
    for comb, row, group, before in self._asked(w):
      # Groups count in the order of the rows, so that it can be cut between any two.
      order = np.lexsort((row, group))
      group = group[order]
      again = np.arange(len(group)) - np.searchsorted(group, group)
      dealt, epoch = comb.line.deal(group, before[group] + again)
      rows.append(row[order])
      documents.append(dealt)
      epochs.append(epoch)
    row, documents, epochs = map(np.concatenate, (rows, documents, epochs))
    order = np.lexsort((hashed(documents, self.seed, epochs), row))
    offsets = np.append(0, np.cumsum(np.bincount(row, minlength=self.num_rows)))
    return offsets, documents[order], epochs[order]

  def _places(self, w):
    """Where the rows stand in window w."""
    start = np.cumsum(self._class_size) - self._class_size
    classes = self._class[self._members]
    rank = np.arange(self.num_rows) - start[classes]
    key = hashed(classes, self.seed, w)
    moved = permute(rank, self._class_size[classes], key)
    places = np.empty(self.num_rows, np.int64)
    places[self._members] = self._members[start[classes] + moved]
    return places

  def _asked(self, w):
    """Of each source: its comb, rows and groups of the slots, and counts before."""
    places, first = self._places(w), 0
    for comb in self.combs:
      group = comb.window(w)
      row = places[self._row_of_slot[first : first + len(group)]]
      yield comb, row, group, comb.before(w)
      first += comb.slots

  def before(self, row: int) -> list[np.ndarray]:
    """How often each group of each source was asked before a global row."""
    w, rows = divmod(row - self.first_row, self.num_rows)
    return [
      before + np.bincount(group[at < rows], minlength=len(before))
      for _, at, group, before in self._asked(w)
    ]


def _group(rows: np.ndarray):
  """(distinct rows, which of them each is); faster than np.unique with an axis."""
  key = np.zeros(len(rows), np.int64)
  for column in rows.T:
    _, value = np.unique(column, return_inverse=True)
    _, key = np.unique(key * (int(value.max()) + 1) + value, return_inverse=True)
  _, first = np.unique(key, return_index=True)
  return rows[first], key


def _even(surplus: np.ndarray) -> np.ndarray:
  """An order of rows in which the surpluses, i64[R, I], make up for each other."""
  _, classes = _group(surplus)
  if not classes.any():
    return np.arange(len(surplus))
  size = np.bincount(classes)
  rank = np.empty(len(classes), np.int64)
  members = np.argsort(classes, kind='stable')
  rank[members] = np.arange(len(classes)) - (np.cumsum(size) - size)[classes[members]]
  # Evenly spread each, then the best of the next few.
  due = ((2 * rank + 1) * _ONE) // size[classes]
  waiting = np.lexsort((classes, due))
  near, left = waiting[:_AHEAD], _AHEAD
  now, order = np.zeros(surplus.shape[1], np.int64), []
  while len(near):
    best = int(np.abs(now + surplus[near]).max(axis=1).argmin())
    order.append(near[best])
    now = now + surplus[near[best]]
    near = np.append(np.delete(near, best), waiting[left : left + 1])
    left += 1
  return np.array(order)


def _off_balance(count: np.ndarray, share: np.ndarray) -> float:
  """The largest deviation of a share in `EVEN` documents or a few more."""
  done = np.concatenate(
    [np.zeros((1, count.shape[1]), np.int64), np.cumsum(count, axis=0)]
  )
  total = done.sum(axis=1)
  end = np.minimum(np.searchsorted(total, total + EVEN), len(total) - 1)
  whole = total[end] - total >= EVEN
  if not whole.any():
    return 0.0
  part = (done[end] - done)[whole]
  return float(np.abs(part / part.sum(axis=1, keepdims=True) - share / _ONE).max())
