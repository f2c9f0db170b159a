"""Bin packing of vectors: needs of several resources into rows of a fixed room.

types   equal vectors are one type, nearly equal ones are made equal, so that
        ten million documents are a few thousand types with counts
pack    best fit decreasing (Garey et al. 1976) over types: a row starts with
        the largest left, goes on with the largest that fits, and is closed by
        the one or two that leave the least over

room 10, needs 6 6 5 4 3 3 3 1  ->  [6 4] [6 3 1] [5 3] [3]
"""

import numpy as np

# The most types there may be, for few and for many documents: packing takes time
# in their square, and a second for the first of these.
_MAX_TYPES = (4096, 16384)
_DOCUMENTS_PER_TYPE = 32  # if it costs nothing: then a document meets many others
_ROUNDING = 0.004  # the loss of rows that counts as nothing
_PAIRS = 256  # of types that are tried to close a row


def _group(vectors: np.ndarray, room: np.ndarray):
  """(distinct vectors i64[U, K], which of them each is, i64[N]); faster than axis=0."""
  key, span = np.zeros(len(vectors), np.int64), 1
  for column, limit in zip(vectors.T, room.tolist()):
    if span * (limit + 1) >= 2**62:
      distinct, key = np.unique(key, return_inverse=True)
      span = len(distinct)
    key = key * (limit + 1) + column
    span *= limit + 1
  _, first, which = np.unique(key, return_index=True, return_inverse=True)
  return vectors[first], which.reshape(-1)


def types(needs: np.ndarray, room: np.ndarray):
  """Rounds needs up to not too many types: (vectors i64[U, K], type of each i64[N]).

  A need keeps some number of leading bits. Bits are given up one at a time where
  it costs the least: where a budget isn't scarce, it costs no row.
  """
  enough = max(len(needs) // _DOCUMENTS_PER_TYPE, 1)
  bearable = int(np.clip(8 * np.sqrt(len(needs)), *_MAX_TYPES))
  vectors, which = _group(needs, room)
  counts = np.bincount(which)
  exact = _loads(vectors, counts, room)
  bits = [int(limit).bit_length() for limit in room]

  def loss(k, column):
    """Rows lost if column k becomes this; little if k has room to spare."""
    load = _loads(column[:, None], counts, room[k : k + 1])[0]
    cube = (load / max(exact)) * (load / max(exact)) * (load / max(exact))
    return (load / exact[k] - 1) * cube * cube if exact[k] else 0.0

  while len(vectors) > min(enough, bearable) and max(bits) > 1:
    now = [loss(k, column) for k, column in enumerate(vectors.T)]
    tries = []
    for k in np.flatnonzero(np.array(bits) > 1):
      column = _round_up(vectors[:, k], bits[k] - 1, room[k])
      tries.append((sum(now) - now[k] + loss(k, column), k, column))
    total, k, column = min(tries, key=lambda t: t[:2])
    if total > _ROUNDING and len(vectors) <= bearable:
      break
    vectors, bits[k] = vectors.copy(), bits[k] - 1
    vectors[:, k] = column
    vectors, merged = _group(vectors, room)
    which = merged[which]
    counts = np.bincount(which)
  return vectors, which


def _loads(vectors, counts, room) -> list[float]:
  """Rows' worth of each resource. Summed as integers: the same on every machine."""
  total = counts.astype(np.int64) @ vectors
  return [t / max(limit, 1) for t, limit in zip(total.tolist(), room.tolist())]


def _round_up(x: np.ndarray, bits: int, limit: int) -> np.ndarray:
  """x up to the next number of so many leading bits, but not beyond the limit."""
  length = np.frexp(x.astype(np.float64))[1]  # 5 -> 3
  grain = 1 << np.maximum(length - bits, 0).astype(np.int64)
  return np.minimum(-(-x // grain) * grain, limit)


def pack(vectors: np.ndarray, counts: np.ndarray, room: np.ndarray):
  """Packs counts[u] documents of each type into rows: [(types of a row, how often)].

  A row starts with the largest type left and goes on with the largest that fits;
  on the way it looks for the one or two types that close the row best. The
  result is repeated as often as the counts allow, so that the cost depends on
  the number of types, not of documents.
  """
  load = _loads(vectors, counts, room)
  main = load.index(max(load))  # the scarcest budget
  size = sum(load[k] / max(int(room[k]), 1) * vectors[:, k] for k in range(len(room)))
  order = np.lexsort((size, vectors[:, main]))[::-1]  # decreasing
  columns, left = np.ascontiguousarray(vectors[order].T), counts[order]
  out = []
  while len(order):
    pattern = _fill_row(columns, left, room, main)
    types, times_each = np.unique(pattern, return_counts=True)
    times = int((left[types] // times_each).min())
    out.append((order[pattern], times))
    left[types] -= times * times_each
    if not left[types].all():
      keep = np.flatnonzero(left)
      order, columns, left = order[keep], columns[:, keep], left[keep]
  return out


def _fill_row(columns, left, room, main) -> list[int]:
  """The types of one row; `columns`, i64[K, U], decrease in resource `main`."""
  row = _close(columns, left, room, main)
  # What needs nothing of `main` may still fit.
  room, left = room - columns[:, row].sum(axis=1), left.copy()
  np.subtract.at(left, row, 1)
  while True:
    fits = np.flatnonzero((columns <= room[:, None]).all(axis=0) & (left > 0))
    if not len(fits):
      return row
    row = [*row, fits[0]]
    left[fits[0]] -= 1
    room = room - columns[:, fits[0]]


def _close(columns, left, room, main) -> list[int]:
  """The types of one row with as little left over of `main` as was found."""
  row, room = [0], room - columns[:, 0]
  best, least = row, room[main]
  fits = np.arange(len(left))
  while True:
    if row.count(row[-1]) == left[row[-1]]:
      fits = fits[fits != row[-1]]
    fits = fits[(columns[:, fits] <= room[:, None]).all(axis=0)]
    if not len(fits):
      return best
    lengths, free = columns[main, fits], int(room[main])
    closing = [(free - lengths[0], row + [fits[0]])]
    # One that fits, and the largest (by `main`) that fits beside it.
    a = fits[:: -(-len(fits) // _PAIRS)]
    second = len(fits) - np.searchsorted(lengths[::-1], free - columns[main, a], 'right')
    a, b = a[second < len(fits)], fits[second[second < len(fits)]]
    ok = (columns[:, a] + columns[:, b] <= room[:, None]).all(axis=0)
    ok &= (a != b) | (left[a] >= 2 + (a == row[-1]) * row.count(row[-1]))
    if ok.any():
      a, b = a[ok], b[ok]
      slack = free - columns[main, a] - columns[main, b]
      i = slack.argmin()
      closing.append((slack[i], row + [a[i], b[i]]))
    for slack, closed in closing:
      if slack < least:
        best, least = closed, slack
    if least == 0:
      return best
    row.append(fits[0])
    room = room - columns[:, fits[0]]
