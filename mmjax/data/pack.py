"""Packing: examples laid side by side in rows of a fixed shape.

  row = [[a, b], [c]]       tokens       a a a a b b b . .   c c c . . . . . .
                            segment_ids  1 1 1 1 2 2 2 0 0   1 1 1 0 0 0 0 0 0

A document's tags stay as they are, since visibility asks for equal segments
first. What counts along the row is moved on: `segment_ids`, the items in a bank,
and `source`, which counts the row's media slots of a kind. Documents are never
cut; one that doesn't fit is an error, as the plan had to see to that.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mmjax.batch import PLACEHOLDER, BankBudget, Budget, PackedBatch
from mmjax.data.example import Example
from mmjax.data.plan import Lengths, limits

_COPIED = ('tokens', 'order', 'first', 'last', 'until', 'positions', 'weights')
_PATCHES = ('values', 'items', 'positions')
_ITEMS = ('item_segments', 'item_order')


def needs_of(example: Example) -> dict[str, int]:
  """What one example needs of a row: 'stream', 'targets', '<kind>/patches', ..."""
  needs = {
    'stream': len(example.tokens),
    'targets': int(np.count_nonzero(example.weights)),
  }
  for kind, media in example.media.items():
    needs[f'{kind}/patches'] = len(media.values)
    needs[f'{kind}/items'] = len(media.item_order)
  return needs


def pack(
  rows: Iterable[Sequence[Example]], budget: Budget, batch: PackedBatch | None = None
) -> PackedBatch:
  """Lays examples into rows.

  Args:
    rows: B lists of examples; may be empty.
    budget: the shape of a row.
    batch: memory for one of this shape, all of which is written, as the rows come;
      without it, rows are counted first and a new one is made.

  Returns:
    A batch of NumPy arrays [B, ...]. Segments and items count from 1 in a row.

  Raises:
    ValueError: a document that doesn't fit into what is left of its row, a kind
      without a bank, patches of another width or type than the bank's.
  """
  if batch is None:
    rows = list(rows)
    batch = budget.empty(len(rows))
  names = ['stream', 'targets']
  names += [f'{kind}/{what}' for kind in budget.bank for what in ('patches', 'items')]
  room = dict(zip(names, limits(tuple(names), budget).tolist()))
  padding = budget.empty(1)
  for b, row in enumerate(rows):
    used = _pack_row(batch, b, row, budget, room)
    _pad_row(batch, b, used, padding)
  return batch


def _pack_row(
  batch: PackedBatch,
  b: int,
  row: Sequence[Example],
  budget: Budget,
  room: Mapping[str, int],
) -> dict[str, int]:
  """Lays out a row; returns how much of each resource is used."""
  stream, used = batch.stream, {}
  copied = [(name, getattr(stream, name)[b]) for name in _COPIED]
  num_slots = dict.fromkeys(PLACEHOLDER, 0)  # of each kind in this row so far
  for segment, example in enumerate(row, start=1):
    start = dict(used)
    for name, need in needs_of(example).items():
      have = room[name] if name in room else _refuse(name, budget, b, segment)
      used[name] = start.get(name, 0) + need
      if used[name] > have:
        left = have - start.get(name, 0)
        raise ValueError(
          f'row {b}: document {segment} needs {need} of {name}, {left} of {have} are left'
        )
    t = slice(start.get('stream', 0), used['stream'])
    for name, row_of in copied:
      row_of[t] = getattr(example, name)
    stream.segment_ids[b, t] = segment
    source = stream.source[b, t]  # a view
    source[:] = example.source
    for kind in example.media:
      slots = example.tokens == PLACEHOLDER[kind]
      count = np.count_nonzero(slots)
      if count:
        source[slots] += num_slots[kind]
        num_slots[kind] += count
    for kind, media in example.media.items():
      bank = batch.bank[kind]
      p = slice(start.get(f'{kind}/patches', 0), used[f'{kind}/patches'])
      i = slice(start.get(f'{kind}/items', 0), used[f'{kind}/items'])
      _check_values(media.values, budget.bank[kind], kind, b, segment)
      bank.values[b, p] = media.values
      bank.items[b, p] = media.items + i.start
      bank.positions[b, p] = media.positions
      bank.item_segments[b, i] = segment
      bank.item_order[b, i] = media.item_order
  return used


def _pad_row(batch, b, used, padding):
  """Writes padding behind what is used."""

  def pad(arrays, empty, names, start):
    for name in names:
      fill = getattr(empty, name)
      if fill.size:
        getattr(arrays, name)[b, start:] = fill.flat[0]

  pad(batch.stream, padding.stream, (*_COPIED, 'segment_ids', 'source'),
      used.get('stream', 0))  # fmt: skip
  for kind, bank in batch.bank.items():
    for names, what in ((_PATCHES, 'patches'), (_ITEMS, 'items')):
      pad(bank, padding.bank[kind], names, used.get(f'{kind}/{what}', 0))


def _refuse(name: str, budget: Budget, b: int, segment: int):
  try:
    limits((name,), budget)
  except ValueError as error:
    raise ValueError(f'row {b}: document {segment}: {error}') from None


def _check_values(values, bank: BankBudget, kind: str, b: int, segment: int):
  if values.shape[1] != bank.channels or values.dtype != np.dtype(bank.dtype):
    raise ValueError(
      f'row {b}: document {segment} has {kind} patches {values.dtype}[{values.shape[1]}],'
      f' the bank holds {bank.dtype}[{bank.channels}]'
    )


def fit_budget(
  documents: Sequence[Example] | Lengths, like: Budget, multiple: int = 16
) -> Budget:
  """The smallest budget that holds any one of the documents in a row of its own.

  With it, a whole evaluation has one shape: pack([[x] for x in examples], budget).

  Args:
    documents: examples, or their lengths.
    like: gives the banks (kinds, channels, dtype) that the model expects.
    multiple: stream and patches are rounded up to it.

  Raises:
    ValueError: no documents, or a kind that `like` has no bank for.
  """
  if not len(documents):
    raise ValueError('no documents to fit a budget to')
  if isinstance(documents, Lengths):
    most: Mapping[str, int] = dict(zip(documents.names, documents.needs.max(axis=0)))
  else:
    most = {}
    for example in documents:
      for name, need in needs_of(example).items():
        most[name] = max(most.get(name, 0), need)
  limits(tuple(most), like)

  def upto(name, step):
    return max(-(-int(most.get(name, 0)) // step), 1) * step

  bank = {
    kind: dataclasses.replace(
      b, patches=upto(f'{kind}/patches', multiple), items=upto(f'{kind}/items', 1)
    )
    for kind, b in like.bank.items()
  }
  return Budget(upto('stream', multiple), upto('targets', 1), bank)
