"""Which documents share a row: a plan made from lengths alone, open at any row.

Each document is a vector of needs, and a row has room for a vector of budgets:

  document      stream  targets  image/patches  image/items
  7                150       18             64            1
  budget of a row 1024      256            640           10

Documents that need alike are a group, and windows of some 30,000 documents take
from each group its part. So one packing over all budgets together (sequence packing
of this kind: 2107.02027) serves all windows, however many documents there are:

  groups -> what a window takes of each (comb) -> rows of places (binpack, deck)
  window w -> which documents stand at these places: shuffles without lists (shuffle)

So any row opens at once, every document comes exactly once per epoch, sources have
their shares (mixture), and all hosts agree: it depends on integers only.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from mmjax.batch import Budget, Item
from mmjax.data import binpack, deck
from mmjax.data.comb import Comb, Line
from mmjax.data.deck import Deck
from mmjax.data.document import KINDS, BadDocument
from mmjax.data.mixture import Shares
from mmjax.data.shuffle import hashed

_CHUNK = 2**19  # documents whose items are looked at together


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
    N, offsets = len(index.text_tokens), index.item_offsets
    kinds = [kind for kind in KINDS if kind in rules]
    media = [f'{kind}/{what}' for kind in kinds for what in ('patches', 'items')]
    needs = np.zeros((N, 2 + len(media)), np.int64)
    needs[:, 0], needs[:, 1] = index.text_tokens, index.targets
    refused, largest, seen = {}, 0, {kind: {} for kind in kinds}

    def refuse(reason, documents):
      before = refused.get(reason, np.zeros(0, np.int64))
      refused[reason] = np.union1d(before, documents)

    for start in range(0, N, _CHUNK):
      end = min(start + _CHUNK, N)
      items = slice(int(offsets[start]), int(offsets[end]))
      owner = np.repeat(np.arange(end - start), np.diff(offsets[start : end + 1]))
      for code, kind in enumerate(KINDS):
        here = index.item_kind[items] == code
        documents = owner[here]
        if kind not in rules:
          if len(documents):
            refuse(f'unsupported_{kind}', start + documents)
          continue
        sizes, which = _distinct(index.item_size[items][here])
        counts = np.zeros((len(sizes), 2), np.int64)  # patches, slots
        for i, size in enumerate(map(tuple, sizes.tolist())):
          if size not in seen[kind]:
            seen[kind][size] = _counts(kind, size, rules[kind], slots)
          counts[i], reason = seen[kind][size]
          if reason:
            refuse(reason, start + documents[which == i])
        largest = max(largest, int(counts[:, 1].max(initial=0)))
        patches, slots_ = (_sums(documents, c[which], end - start) for c in counts.T)
        column = 2 + 2 * kinds.index(kind)
        needs[start:end, 0] += slots_
        needs[start:end, column] = patches
        needs[start:end, column + 1] = np.bincount(documents, minlength=end - start)
    stream, targets = needs[:, 0], needs[:, 1]
    refuse('empty', np.flatnonzero(stream == 0))
    refuse('nothing_trained', np.flatnonzero((stream > 0) & (targets == 0)))
    refused = {reason: found for reason, found in refused.items() if len(found)}
    return cls(('stream', 'targets', *media), needs, refused, largest)

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
  """Rows of documents for ever; see the top of this file.

  Args:
    lengths: of all documents.
    budget: of a row.
    seed: of the dealing; the rows' shapes don't depend on it.
    shares: of the sources that the documents are of; by default, there is one.
    rows: of a step, for shares that change with the step.

  Attributes:
    num_documents: documents that are used.
    num_rows: rows per epoch; of a mixture, about the rows that hold as many
      documents as there are, with the first shares.
    dropped: documents that are not used, by reason ('too_long_stream',
      'too_many_targets', 'too_many_patches:image', ..., or why refused).
    fill: share of a budget's slots that are really used, with the first shares:
      'stream', 'targets' and each media kind (its patches).
    off_balance: how far a source's share of 1,000 documents in a row is off at most,
      by the order of the rows.

  Raises:
    ValueError: no document (of a source that has a share) can be used.
  """

  def __init__(
    self,
    lengths: Lengths,
    budget: Budget,
    seed: int = 0,
    shares: Shares | None = None,
    rows: int = 1,
  ):
    self.lengths, self.seed = lengths, seed
    self.shares = shares or Shares.one(len(lengths))
    room = limits(lengths.names, budget)
    ok, self.dropped = _usable(lengths, room)
    own = self._own(ok)
    sizes = [len(ids) for ids in own]
    self.num_documents = sum(sizes)
    rates = [deck.rates(sizes, shares) for _, shares in self.shares.phases]
    lines = [
      _line(lengths.needs, ids, room, [r[i] for r in rates], int(hashed(i, seed)))
      for i, ids in enumerate(own)
    ]
    self.largest = np.max(
      [line.largest.max(axis=0) for line in lines if len(line)], axis=0
    )
    self._decks = []
    asked = [np.zeros(len(line.ends), np.int64) for line in lines]
    for p, (step, shares) in enumerate(self.shares.phases):
      if p:
        asked = self._decks[-1].before(step * rows)
      combs = [Comb(*of) for of in zip(lines, rates[p], asked)]
      self._decks.append(Deck(combs, shares, room, step * rows, int(hashed(p, seed, 1))))
    self.off_balance = max(d.off_balance for d in self._decks)
    documents, used = Fraction(0), [Fraction(0)] * len(room)
    for ids, rate in zip(own, rates[0]):
      documents += rate * len(ids)
      total = lengths.needs[ids].sum(axis=0, dtype=np.int64).tolist()
      used = [u + rate * t for u, t in zip(used, total)]
    window = self._decks[0].num_rows
    self.num_rows = round(window * self.num_documents / documents)
    self.fill = {
      name.removesuffix('/patches'): float(u / (window * max(int(limit), 1)))
      for name, u, limit in zip(lengths.names, used, room)
      if not name.endswith('/items')
    }
    self._windows: dict[tuple[int, int], tuple[np.ndarray, ...]] = {}

  def _own(self, ok: np.ndarray) -> list[np.ndarray]:
    """The usable documents of each source."""
    own = []
    for i, (name, end) in enumerate(zip(self.shares.names, self.shares.ends)):
      start = self.shares.ends[i - 1] if i else 0
      own.append((start + np.flatnonzero(ok[start:end])).astype(np.int32))
      if not len(own[-1]) and any(shares[i] for _, shares in self.shares.phases):
        raise ValueError(f'none of the {end - start} documents of {name!r} can be used')
    return own

  def row(self, r: int) -> tuple[int, ...]:
    """The documents of global row r >= 0, in the order they stand in it.

    Raises:
      ValueError: a negative row.
    """
    return tuple(document for document, _ in self.dealt(r))

  def dealt(self, r: int) -> list[tuple[int, int]]:
    """(document, which time it comes, from 0) of a global row.

    Raises:
      ValueError: a negative row.
    """
    if r < 0:
      raise ValueError(f'row {r}: rows count from 0')
    phase = bisect.bisect(self._decks, r, key=lambda d: d.first_row) - 1
    of = self._decks[phase]
    w, place = divmod(r - of.first_row, of.num_rows)
    window = self._windows.get((phase, w))
    if window is None:
      window = of.window(w)
      # Steps at a window's end need two; more would only hold memory. A new one, not
      # a change to the old: other threads read it.
      kept = list(self._windows.items())[-1:]
      self._windows = dict([*kept, ((phase, w), window)])
    offsets, documents, epochs = window
    here = slice(offsets[place], offsets[place + 1])
    return list(zip(documents[here].tolist(), epochs[here].tolist()))

  def before(self, r: int) -> dict[str, int]:
    """How many documents of each source come in the rows before row r."""
    phase = bisect.bisect(self._decks, r, key=lambda d: d.first_row) - 1
    asked = self._decks[phase].before(r)
    return {name: int(a.sum()) for name, a in zip(self.shares.names, asked)}

  def needs(self, document: int) -> dict[str, int]:
    """What a document was planned to need, by resource."""
    return dict(zip(self.lengths.names, self.lengths.needs[document].tolist()))

  def __getstate__(self):
    return {**self.__dict__, '_windows': {}}


def _line(needs, ids, room, rates, salt) -> Line:
  """The line of a source's documents, cut for the first rate that there is."""
  if not len(ids):
    return Line(ids, np.zeros(0, np.int64), np.zeros((0, len(room)), np.int64), salt)
  own = needs if len(ids) == len(needs) else needs[ids]
  rate = next((rate for rate in rates if rate), Fraction(1))
  order, ends = binpack.strata(own, room, 1 / rate)
  starts = np.append(0, ends[:-1])
  largest = [np.maximum.reduceat(column[order], starts) for column in own.T]
  return Line(ids[order], ends, np.stack(largest, axis=1).astype(np.int64), salt)


def _grid(kind, size, rule):
  """The grid of patches of an item of that size, see `media.native_size`."""
  _, height, width = size
  if height * width > getattr(rule, 'max_pixels', height * width):
    raise BadDocument('too_many_pixels', f'{height} x {width}')
  return rule.grid(height, width) if kind == 'image' else rule.grid(*size)


def _counts(kind, size, rule, slots):
  """((patches, slots), why it can't be used or None) of an item of that size."""
  try:
    grid = _grid(kind, size, rule)
    return (np.prod(grid), np.prod(slots(Item(kind, grid)))), None
  except BadDocument as error:
    return (0, 0), error.reason


def _distinct(sizes: np.ndarray):
  """(distinct sizes, which of them each is), by one number for each where that fits."""
  base = [int(most) + 1 for most in sizes.max(axis=0, initial=0)]
  if int(sizes.min(initial=0)) < 0 or math.prod(base) >= 2**63:
    found, which = np.unique(sizes, axis=0, return_inverse=True)
    return found, which.reshape(-1)
  t, height, width = sizes.astype(np.int64).T
  key, which = np.unique((t * base[1] + height) * base[2] + width, return_inverse=True)
  rest, width = np.divmod(key, base[2])
  return np.stack([*np.divmod(rest, base[1]), width], axis=1), which


def _sums(owner, values, N):
  return np.bincount(owner, weights=values, minlength=N).astype(np.int64)


def _usable(lengths: Lengths, room: np.ndarray):
  """(which documents are usable, dropped by reason); each counts for one reason."""
  ok = np.ones(len(lengths), bool)
  dropped: dict[str, int] = {}

  def drop(reason, mask):  # or numbers
    count = int(np.count_nonzero(ok[mask]))
    ok[mask] = False
    if count:
      dropped[reason] = count

  for reason, documents in sorted(lengths.refused.items()):
    drop(reason, documents)
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
  return ok, dropped


def _reason(name: str) -> str:
  if name == 'stream':
    return 'too_long_stream'
  if name == 'targets':
    return 'too_many_targets'
  kind, what = name.split('/')
  return f'too_many_{what}:{kind}'
