"""Which documents share a row: a plan made from lengths alone, open at any row.

Each document is a vector of needs, and a row has room for a vector of budgets:

  document      stream  targets  image/patches  image/items
  7                150       18             64            1
  budget of a row 1024      256            640           10

Equal vectors are one type. Types are packed ONCE, best fit decreasing over all
budgets together (the classic for bins of several resources; sequence packing of
this kind: 2107.02027), which gives rows of places for types. Each epoch then
deals the documents of a type anew onto its places, and shuffles the rows and
the order in a row. So any row of any epoch opens at once, every document comes
exactly once per epoch, and all hosts agree: it depends on integers only.

  plan (once)             epoch 0         epoch 1
  row 0: A B B            d7 d2 d9        d1 d9 d4
  row 1: A A B            d1 d5 d4        d5 d7 d2
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mmjax.batch import Budget, Item
from mmjax.data import binpack
from mmjax.data.document import KINDS, BadDocument


@dataclasses.dataclass(frozen=True, eq=False)
class Lengths:
  """What N documents need of each of K resources.

  names:   K names: 'stream', 'targets', '<kind>/patches', '<kind>/items'.
  needs:   i64[N, K].
  refused: by reason, the documents that can't be used whatever the budget.
  largest_item: stream slots of the item that takes most.
  """

  names: tuple[str, ...]
  needs: np.ndarray
  refused: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  largest_item: int = 0

  @classmethod
  def of(
    cls,
    index: Any,
    rules: Mapping[str, Any],
    slots: Callable[[Item], tuple[int, int, int]],
  ) -> 'Lengths':
    """The lengths of a dataset from its sidecar, without reading a document.

    Args:
      index: `store.Index`.
      rules: by media kind, how an item becomes patches; the kinds of the result.
      slots: the model's answer to how many stream slots an item takes.
    """
    N = len(index.text_tokens)
    stream = index.text_tokens.astype(np.int64)
    owner = np.repeat(np.arange(N), np.diff(index.item_offsets))
    names, media, refused, largest = ['stream', 'targets'], [], {}, 0

    def refuse(reason, documents):
      before = refused.get(reason, np.zeros(0, np.int64))
      refused[reason] = np.union1d(before, documents)

    for code, kind in enumerate(KINDS):
      here = index.item_kind == code
      documents = owner[here]
      if kind not in rules:
        if len(documents):
          refuse(f'unsupported_{kind}', documents)
        continue
      sizes, which = np.unique(index.item_size[here], axis=0, return_inverse=True)
      which = which.reshape(-1)
      counts = np.zeros((len(sizes), 2), np.int64)  # patches, slots
      for i, size in enumerate(sizes.tolist()):
        try:
          grid = _grid(kind, size, rules[kind])
          counts[i] = np.prod(grid), np.prod(slots(Item(kind, grid)))
        except BadDocument as error:
          refuse(error.reason, documents[which == i])
      largest = max(largest, int(counts[:, 1].max(initial=0)))
      media += [
        _sums(documents, counts[which, 0], N),
        np.bincount(documents, minlength=N),
      ]
      names += [f'{kind}/patches', f'{kind}/items']
      stream += _sums(documents, counts[which, 1], N)
    refuse('empty', np.flatnonzero(stream == 0))
    refuse('nothing_trained', np.flatnonzero((stream > 0) & (index.targets == 0)))
    needs = np.stack([stream, index.targets.astype(np.int64), *media], axis=1)
    return cls(tuple(names), needs, {r: d for r, d in refused.items() if len(d)}, largest)

  def __len__(self) -> int:
    return len(self.needs)


def limits(names: tuple[str, ...], budget: Budget) -> np.ndarray:
  """The budget of a row for each of the resources, i64[K].

  Raises:
    ValueError: a media kind that the budget has no bank for.
  """

  def one(name):
    if name in ('stream', 'targets'):
      return getattr(budget, name)
    kind, what = name.split('/')
    if kind not in budget.bank:
      have = ', '.join(budget.bank) or 'none'
      raise ValueError(f'the budget has no bank for {kind!r}; banks: {have}')
    return getattr(budget.bank[kind], what)

  return np.array([one(name) for name in names], np.int64)


class PackPlan:
  """Rows of documents for all epochs; see the top of this file.

  Args:
    lengths: of all documents.
    budget: of a row.
    seed: of the dealing; the rows' shapes don't depend on it.

  Attributes:
    num_documents: documents that are used.
    num_rows: rows per epoch, the same for every epoch.
    dropped: documents that are not used, by reason ('too_long_stream',
      'too_many_targets', 'too_many_patches:image', ..., or why refused).
    fill: share of a budget's slots that are really used: 'stream', 'targets'
      and each media kind (its patches).

  Raises:
    ValueError: no document can be used.
  """

  def __init__(self, lengths: Lengths, budget: Budget, seed: int = 0):
    room = limits(lengths.names, budget)
    self.ids, self.dropped = _usable(lengths, room)
    needs = lengths.needs[self.ids]
    vectors, self._type = binpack.types(needs, room)
    patterns = binpack.pack(vectors, np.bincount(self._type), room)
    sizes = np.concatenate([np.full(times, len(p)) for p, times in patterns])
    self._offsets = np.concatenate([[0], np.cumsum(sizes)])
    places = np.concatenate([np.tile(p, times) for p, times in patterns])
    # The n-th place of a type takes the n-th of its documents, however dealt.
    self._card = np.empty(len(places), np.int64)
    self._card[np.argsort(places, kind='stable')] = np.arange(len(places))
    self.num_documents = len(needs)
    self.num_rows = len(sizes)
    self.seed = seed
    used = needs.sum(axis=0) / (self.num_rows * np.maximum(room, 1))
    self.fill = {
      name.removesuffix('/patches'): float(share)
      for name, share in zip(lengths.names, used)
      if not name.endswith('/items')
    }
    self.lengths = lengths
    self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

  def row(self, r: int) -> tuple[int, ...]:
    """The documents of global row r >= 0, in the order they stand in it.

    Raises:
      ValueError: a negative row.
    """
    if r < 0:
      raise ValueError(f'row {r}: rows count from 0')
    epoch, place = divmod(r, self.num_rows)
    dealt, rows = self._epoch(epoch)
    shape = rows[place]
    cards = self._card[self._offsets[shape] : self._offsets[shape + 1]]
    documents = dealt[cards]
    order = np.argsort(_hash(documents, self.seed, epoch, 2), kind='stable')
    return tuple(self.ids[documents[order]].tolist())

  def needs(self, document: int) -> dict[str, int]:
    """What a document was planned to need, by resource."""
    return dict(zip(self.lengths.names, self.lengths.needs[document].tolist()))

  def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(documents by type, each type shuffled; rows, shuffled) of an epoch."""
    if epoch not in self._epochs:
      keys = _hash(np.arange(self.num_documents), self.seed, epoch, 0)
      rows = _hash(np.arange(self.num_rows), self.seed, epoch, 1)
      made = np.lexsort((keys, self._type)), np.argsort(rows, kind='stable')
      # Steps at an epoch's end need two; more would only hold memory.
      kept = sorted(self._epochs.items())[-1:]
      self._epochs = dict([*kept, (epoch, made)])
      return made
    return self._epochs[epoch]

  def __getstate__(self):
    return {**self.__dict__, '_epochs': {}}


def _grid(kind, size, rule):
  """The grid of patches of an item of that size, see `media.native_size`."""
  _, height, width = size
  if height * width > getattr(rule, 'max_pixels', height * width):
    raise BadDocument('too_many_pixels', f'{height} x {width}')
  return rule.grid(height, width) if kind == 'image' else rule.grid(*size)


def _sums(owner, values, N):
  return np.bincount(owner, weights=values, minlength=N).astype(np.int64)


def _hash(x, *salts: int) -> np.ndarray:
  """Pseudo-random u64 of integers (splitmix64, Steele et al. 2014)."""
  with np.errstate(over='ignore'):
    z = np.uint64(0)
    for part in (*salts, x):
      z = z ^ np.asarray(part).astype(np.uint64)
      z = z + np.uint64(0x9E3779B97F4A7C15)
      z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
      z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
      z = z ^ (z >> np.uint64(31))
  return z


def _usable(lengths: Lengths, room: np.ndarray):
  """(usable documents, dropped by reason); each document counts for one reason."""
  ok = np.ones(len(lengths), bool)
  dropped: dict[str, int] = {}

  def drop(reason, mask):
    count = int((mask & ok).sum())
    ok[mask] = False
    if count:
      dropped[reason] = count

  for reason, documents in sorted(lengths.refused.items()):
    drop(reason, np.isin(np.arange(len(lengths)), documents))
  for k, name in enumerate(lengths.names):
    drop(_reason(name), lengths.needs[:, k] > room[k])
  if not ok.any():
    why = ', '.join(f'{reason} {count}' for reason, count in dropped.items())
    most = lengths.needs.max(axis=0, initial=0)
    needs = ', '.join(
      f'{name} {need} of {have}' for name, need, have in zip(lengths.names, most, room)
    )
    raise ValueError(
      f'none of {len(lengths)} documents can be used ({why}); largest need of budget:'
      f' {needs}'
    )
  return np.flatnonzero(ok), dropped


def _reason(name: str) -> str:
  if name == 'stream':
    return 'too_long_stream'
  if name == 'targets':
    return 'too_many_targets'
  kind, what = name.split('/')
  return f'too_many_{what}:{kind}'
