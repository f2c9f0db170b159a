"""Bin packing of vectors: needs of several resources into rows of a fixed room.

strata  documents laid in a line, alike beside alike, and cut into groups so that
        what the largest of a group needs is hardly more than what all of it needs:
        a tree of halves, each along the resource that costs most (k-d tree)
pack    a row starts with the largest left, goes on with what is shaped like the
        room that is left, whatever its size (after Panigrahy et al. 2011,
        "Heuristics for vector bin packing", who take the largest dot product; the
        angle alone keeps short documents of many images for long ones of few),
        and is closed by the one or two that leave the least over

room 10, needs 6 6 5 4 3 3 3 1  ->  [6 4] [6 3 1] [5 3] [3]

All of it counts in integers, so that every machine finds the same rows.
"""

from fractions import Fraction

import numpy as np

_SCALE = 1 << 20
_NOTHING = 1024  # a loss of one part in so many is none
_FEW, _LITTLE = 64, 24  # and in so few documents, so that each meets others, this one
_MANY = 4096  # of types that a row looks at; the next row at others
_PAIRS = (96, 384)  # of types that are tried to close a row


def prices(total: np.ndarray, room: np.ndarray) -> np.ndarray:
  """What a slot of each resource is worth, i64[K]: much where all are wanted.

  Args:
    total: i64[K] what all documents need.
    room: i64[K] of a row.
  """
  room = [max(int(r), 1) for r in room]
  load = [int(t) * _SCALE // r for t, r in zip(total, room)]
  share = [1024 * one // max(*load, 1) for one in load]
  return np.array([s * s * s // r + (s > 0) for s, r in zip(share, room)], np.int64)


def strata(needs: np.ndarray, room: np.ndarray, stride: Fraction = Fraction(1)):
  """Lays documents in a line and cuts it.

  Args:
    needs: int[N, K].
    room: i64[K].
    stride: cuts are made at multiples of it, rounded up, if it is over 1.

  Returns:
    (order i32[N], the documents along the line; ends i64[U], where groups end).
  """
  N = len(needs)
  stride = max(Fraction(stride), Fraction(1))
  price = prices(needs.sum(axis=0, dtype=np.int64), room).tolist()
  priced = [k for k, p in enumerate(price) if p]
  columns = {k: np.ascontiguousarray(needs[:, k]) for k in priced}
  order, ends = np.arange(N, dtype=np.int32), []

  def place(multiple):
    return min(-(-multiple * stride.numerator // stride.denominator), N)

  todo = [(0, -(-N * stride.denominator // stride.numerator))]
  while todo:
    first, last = todo.pop()
    a, b = place(first), place(last)
    if a == b:
      continue
    ids, losses, total = order[a:b], [], 0
    for k in priced:
      values = columns[k][ids]
      used = int(values.sum(dtype=np.int64)) * price[k]
      losses.append((int(values.max()) * (b - a) * price[k] - used, -k, values))
      total += used
    part = _LITTLE if stride == 1 and b - a <= _FEW else _NOTHING
    if last - first <= 1 or sum(x[0] for x in losses) * part <= total:
      ends.append(b)
      continue
    middle = (first + last) // 2
    values = max(losses, key=lambda x: x[:2])[2]
    # Not argpartition, whose order of equals may differ between machines.
    order[a:b] = ids[np.argsort(values, kind='stable')]
    todo += [(middle, last), (first, middle)]
  return order, np.array(ends, np.int64)


def pack(vectors: np.ndarray, counts: np.ndarray, room: np.ndarray):
  """Packs counts[u] documents of each type into rows: [(types of a row, how often)].

  A row is repeated as often as the counts allow, so that the cost depends on the
  number of types.
  """
  room = np.asarray(room, np.int64)
  vectors, counts = vectors.astype(np.int64), counts.astype(np.int64)
  price = prices(counts @ vectors, room)
  worth = vectors * price
  order = np.lexsort((worth.sum(axis=1), worth.max(axis=1)))[::-1]  # decreasing
  types = _Types(vectors[order], counts[order], price)
  out = []
  while len(order):
    skip = -(-len(order) // _MANY)
    row = _close(types, room, np.arange(len(out) % skip, len(order), skip))
    which, each = np.unique(row, return_counts=True)
    times = int((types.left[which] // each).min())
    out.append((order[row], times))
    types.left[which] -= times * each
    if not types.left[which].all():
      keep = types.left > 0
      order, types = order[keep], types.only(keep)
  return out


class _Types:
  """Columns of the types that are left, largest first."""

  def __init__(self, vectors, left, price):
    self.columns = np.ascontiguousarray(vectors.T)  # i64[K, U]
    self.left, self.price = left, price
    self.value = price @ self.columns
    # The square root is exact to the last bit on every machine.
    squares = sum((p * c) ** 2 for p, c in zip(price, self.columns))
    self.length = np.maximum(np.sqrt(squares).astype(np.int64), 1)

  def only(self, keep):
    new = object.__new__(_Types)
    new.columns = np.ascontiguousarray(self.columns[:, keep])
    new.left, new.price = self.left[keep], self.price
    new.value, new.length = self.value[keep], self.length[keep]
    return new


def _close(types: _Types, room: np.ndarray, fits: np.ndarray) -> list[int]:
  """The types of one row, the largest and some of `fits`, with little left over."""
  columns, left, value = types.columns, types.left, types.value
  row, room = [0], room - columns[:, 0]
  best, least = row, int(types.price @ room)
  while True:
    free = int(types.price @ room)
    if free < least:
      best, least = row, free
    if row.count(row[-1]) == left[row[-1]]:
      fits = fits[fits != row[-1]]
    for column, limit in zip(columns, room):
      fits = fits[column[fits] <= limit]
    if not len(fits):
      return best if len(best) >= len(row) or least < free else row
    values = value[fits]
    one = int(values.argmax())
    if free - int(values[one]) < least:
      best, least = [*row, int(fits[one])], free - int(values[one])
    if 4 * int(values[one]) >= free:
      pair, over = _pair(types, fits, room, row, free - least)
      if pair:
        best, least = row + pair, free - over
    if least == 0:
      return _fill_up(types, best, room - columns[:, best[len(row) :]].sum(axis=1))
    # What is left over of a resource says how much of it the next should need.
    shape = room * types.price >> 8
    aligned = sum(s * p * c[fits] for s, p, c in zip(shape, types.price, columns))
    row = [*row, int(fits[(aligned // types.length[fits]).argmax()])]
    room = room - columns[:, row[-1]]


def _fill_up(types, row, room):
  """What costs nothing may still fit in."""
  left = types.left.copy()
  np.subtract.at(left, row, 1)
  while True:
    fits = np.flatnonzero((types.columns <= room[:, None]).all(axis=0) & (left > 0))
    if not len(fits):
      return row
    row = [*row, int(fits[0])]
    left[fits[0]] -= 1
    room = room - types.columns[:, fits[0]]


def _pair(types, fits, room, row, enough):
  """(two types that fill more of the room than `enough`, how much), or ([], 0)."""
  a, b = (fits[:: -(-len(fits) // many)] for many in _PAIRS)
  fill = types.value[a][:, None] + types.value[b]
  ok = fill > enough
  for column, limit in zip(types.columns, room):
    ok &= column[a][:, None] <= limit - column[b]
  lone = types.left[a] - [row.count(x) for x in a.tolist()] < 2
  ok &= ~((a[:, None] == b) & lone[:, None])
  best = int(np.where(ok, fill, -1).argmax())
  if not ok.flat[best]:
    return [], 0
  return [int(a[best // len(b)]), int(b[best % len(b)])], int(fill.flat[best])
