"""Tags of every pattern of attention, at random, as models and data make them."""

import numpy as np

from mmjax.batch import FOREVER, KeyTags, QueryTags

SELF = ('documents', 'blocks', 'window', 'branches', 'items', 'random', 'nothing')
CROSS = ('latest', 'random', 'nothing')


def _spans(rng, length, longest):
  """Lengths that fill most of a row."""
  sizes = []
  while sum(sizes) < length - longest // 2:
    sizes.append(min(int(rng.integers(1, longest + 1)), length - sum(sizes)))
  return sizes


def _row(kind, rng, T):
  """(segment_ids, order, first, last, until) of one row, i32[T] each."""
  segments, order, first = np.zeros((3, T), np.int32)
  last, until = np.full(T, -1, np.int32), np.full(T, FOREVER, np.int32)
  start = 0
  for n, size in enumerate(_spans(rng, T, T // 2)):
    at = slice(start, start + size)
    rank = np.arange(size)
    if kind == 'blocks':  # images of 1 to 60 slots share a rank
      images = _spans(rng, size, min(60, size))
      rank = np.repeat(np.arange(len(images) + 1), [*images, size - sum(images)])
    if kind == 'items':
      rank = 0 * rank
    segments[at], order[at], last[at] = n + 1, rank, rank
    if kind == 'window':
      first[at] = rank - int(rng.integers(0, 40))
    if kind == 'branches':
      here = size // 3
      for branch in _spans(rng, size - here, max(size // 3, 1)):
        until[start + here : start + here + branch] = here + branch - 1
        here += branch
    start += size
  return segments, order, first, last, until


def tags(kind, seed, T, S, B=2):
  """Tags of T queries and S keys; T == S for the kinds of `SELF` but the last two."""
  rng = np.random.default_rng(seed)

  def ints(length, low, high):
    return rng.integers(low, high, (B, length)).astype(np.int32)

  if kind in ('random', 'nothing'):
    query = QueryTags(ints(T, 0, 3), ints(T, 0, 4), ints(T, -1, 5), ints(T, 0, 5))
    key = KeyTags(ints(S, 0, 3), ints(S, 0, 5), ints(S, 1, 9))
    if kind == 'nothing':
      query.last[0] = -1
      query.last[1, T // 2 :] = -1
    return query, key
  rows = [_row('documents' if kind == 'latest' else kind, rng, T) for _ in range(B)]
  segments, order, first, last, until = map(np.stack, zip(*rows))
  if kind != 'latest':
    return QueryTags(segments, first, last, order), KeyTags(segments, order, until)
  # Each document has images of S / 20 keys, and sees the latest one, from some on.
  width, at = S // 20, 0
  items = np.zeros((2, B, S), np.int32)
  for b in range(B):
    at = 0
    for n in range(1, segments[b].max() + 1):
      here = segments[b] == n
      images = int(rng.integers(0, 4))
      for i in range(images):
        items[0, b, at : at + width], items[1, b, at : at + width] = n, i
        at += width
      starts = np.sort(rng.integers(0, here.sum(), images))
      latest = (starts <= order[b][here][:, None]).sum(1) - 1
      first[b, here], last[b, here] = latest, latest
  return QueryTags(segments, first, last, order), KeyTags(
    *items, np.full_like(items[0], FOREVER)
  )
