"""Several datasets as one: how many documents of each, step by step.

  config.data.mixture = dict(
    pages=dict(path='data/pages', weight=3.0),
    captions=dict(path='data/captions', weight=((0, 1.0), (5000, 2.0))),
  )

A weight counts documents: of four documents here three are pages, and from step
5,000 on three of five. Each source goes through its own epochs. The documents are
numbered through, one source after the other, so the plan and the pipeline know one
dataset; a single dataset is a mixture of one.
"""

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

Weight = float | Sequence[tuple[int, float]]
_RESERVED = ('fill', 'bad')  # beside them stand the stats of the sources


@dataclasses.dataclass(frozen=True)
class Shares:
  """Whose the documents are, and what share of them each source has from when on.

  names: of the sources.
  ends: where the documents of each source end.
  phases: (first step, share of each source), by step, from 0 on; a share is exact.
  """

  names: tuple[str, ...]
  ends: tuple[int, ...]
  phases: tuple[tuple[int, tuple[Fraction, ...]], ...]

  @classmethod
  def of(cls, sizes: Mapping[str, int], weights: Mapping[str, Weight]) -> 'Shares':
    """Shares from weights by name.

    Raises:
      ValueError: a weight that is no number >= 0 or no schedule from step 0 on, or
        a step at which all weights are 0.
    """
    tables = {name: _schedule(name, weights[name]) for name in sizes}
    phases = []
    for step in sorted({step for table in tables.values() for step, _ in table}):
      now = [table[bisect.bisect(table, step, key=lambda x: x[0]) - 1][1]
             for table in tables.values()]  # fmt: skip
      if not sum(now):
        raise ValueError(f'mixture: all weights are 0 from step {step} on')
      shares = tuple(one / sum(now) for one in now)
      if not phases or phases[-1][1] != shares:
        phases.append((step, shares))
    ends = np.cumsum(list(sizes.values())).tolist()
    return cls(tuple(sizes), tuple(ends), tuple(phases))

  @classmethod
  def one(cls, size: int) -> 'Shares':
    """Of a dataset that is mixed with nothing."""
    return cls(('all',), (size,), ((0, (Fraction(1),)),))

  def source(self, documents: np.ndarray) -> np.ndarray:
    """Which source documents are of."""
    return np.searchsorted(self.ends, documents, 'right')


def _schedule(name: str, weight: Weight) -> list[tuple[int, Fraction]]:
  try:
    table = [(0, weight)] if isinstance(weight, int | float) else list(weight)
    # As it is written: 0.1 is a tenth.
    table = [(int(step), Fraction(str(value))) for step, value in table]
  except (TypeError, ValueError):
    table = []
  steps = [step for step, _ in table]
  good = table and steps[0] == 0 and steps == sorted(set(steps))
  if not good or min(value for _, value in table) < 0:
    raise ValueError(
      f'mixture: weight {weight!r} of {name!r}: must be a number >= 0, or pairs'
      ' (step, weight) with rising steps from 0 on'
    )
  return table


class Mixture:
  """Datasets one after the other: `len(m)`, `m[i] -> Document`, `m.index`.

  Args:
    datasets: by name, `store.Dataset` or the like.
    weights: by name, see the top of this file.

  Raises:
    ValueError: no dataset, a name that can't be used, tokenizers that differ, or
      weights that make no sense.
  """

  def __init__(self, datasets: Mapping[str, Any], weights: Mapping[str, Weight]):
    if not datasets:
      raise ValueError('mixture: no datasets')
    for name in datasets:
      if not name or '/' in name or name in _RESERVED:
        raise ValueError(
          f'mixture: {name!r} is no name; not empty, no "/", none of {_RESERVED}'
        )
    self.datasets = dict(datasets)
    first, *others = self.datasets
    self.tokenizer = self.datasets[first].tokenizer
    for name in others:
      mine, theirs = self.tokenizer.hash, self.datasets[name].tokenizer.hash
      if mine != theirs:
        raise ValueError(
          f'mixture: {name!r} has tokenizer {theirs[:12]}, {first!r} has {mine[:12]};'
          ' prepare them together (mmjax.data.prepare --mixture)'
        )
    sizes = {name: len(data.index) for name, data in self.datasets.items()}
    self.shares = Shares.of(sizes, weights)
    self.index = _joined([data.index for data in self.datasets.values()])

  def __len__(self) -> int:
    return self.shares.ends[-1]

  def __getitem__(self, i: int):
    i = int(i)
    if not 0 <= i < len(self):
      raise IndexError(f'document {i} of {len(self)}')
    source = bisect.bisect(self.shares.ends, i)
    start = self.shares.ends[source - 1] if source else 0
    return self.datasets[self.shares.names[source]][i - start]


def _joined(indexes: list[Any]) -> Any:
  """One index of all of them; the fields are arrays, offsets count on."""
  if len(indexes) == 1:
    return indexes[0]
  made = {
    field.name: np.concatenate([getattr(index, field.name) for index in indexes])
    for field in dataclasses.fields(indexes[0])
    if field.name != 'item_offsets'
  }
  offsets, count = [np.zeros(1, np.int64)], 0
  for index in indexes:
    offsets.append(index.item_offsets[1:] + count)
    count += int(index.item_offsets[-1])
  return type(indexes[0])(**made, item_offsets=np.concatenate(offsets))
