"""How far up the right one stands: ranks with ties, and what is shown of them.

  similarity of a query   0.9  0.7  0.7  0.7  0.2        the right one: a 0.7
  better 1, as good 2     it stands at 2, 3 or 4: R@1 = 0, R@2 = 1/3, rank 3

Whoever gives all candidates the same similarity is at chance, not at the top.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_DECIMALS = 6  # to which similarities are compared; below is rounding


@dataclasses.dataclass(frozen=True)
class Ranks:
  """Where the right candidate of n queries stands among m.

  better, ties: i64[n] candidates above it, and others as good.
  top: i64[n, k] the first candidates, of equal ones in their order.
  candidates: m.
  """

  better: np.ndarray
  ties: np.ndarray
  top: np.ndarray
  candidates: int

  def recall(self, k: int) -> float:
    """R@k: the chance that the right one is among the first k, with ties shuffled."""
    share = np.clip((k - self.better) / (self.ties + 1), 0, 1)
    return float(share.mean())

  @property
  def rank(self) -> np.ndarray:
    """f64[n], from 1; the mean over the orders of the ties."""
    return self.better + 1 + self.ties / 2

  def chance(self, k: int) -> float:
    """R@k of guessing."""
    return min(1.0, k / self.candidates)


def ranks(queries: np.ndarray, candidates: np.ndarray, right, top: int = 5) -> Ranks:
  """The ranks by dot product.

  Args:
    queries: f32[n, E]; candidates: f32[m, E].
    right: i64[n], the candidate that is right for each query.
    top: how many of the first to keep.

  Raises:
    ValueError: no query or no candidate.
  """
  right = np.asarray(right)
  if not len(queries) or not len(candidates):
    raise ValueError(f'ranks of {len(queries)} queries in {len(candidates)} candidates')
  better, ties, first = [], [], []
  for start in range(0, len(queries), 512):  # never all at once
    part = slice(start, start + 512)
    similarity = np.round(queries[part] @ candidates.T, _DECIMALS)
    own = np.take_along_axis(similarity, right[part][:, None], 1)
    better.append((similarity > own).sum(1))
    ties.append((similarity == own).sum(1) - 1)
    first.append(np.argsort(-similarity, axis=1, kind='stable')[:, :top])
  found = (np.concatenate(x) for x in (better, ties, first))
  return Ranks(*found, len(candidates))


@dataclasses.dataclass(frozen=True)
class Ranking:
  """What an evaluation by ranks found; `report` shows it.

  metrics: by name.
  predictions: a record per query: index (of the document), document (its id), task,
    query (text, or None: the document's picture), right (what should stand first),
    rank, correct, top (the first candidates: pairs of a document's index or None, and
    a text).
  headline: the result in words.
  cells: rows of a table, the first the header.
  pictures: from a document index to its images u8[H, W, 3].
  """

  metrics: dict[str, float]
  predictions: list[dict[str, Any]]
  headline: str
  cells: Sequence[Sequence[str]]
  pictures: Callable[[int], list[np.ndarray]]
  published: Mapping[str, float] = dataclasses.field(default_factory=dict)

  template = 'ranking.html.j2'

  def table(self, name: str) -> str:
    """The table and the headline, to print."""
    rows = [(name, *self.cells[0][1:]), *self.cells[1:]]
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = (
      r[0].ljust(widths[0]) + ''.join(c.rjust(w + 2) for c, w in zip(r[1:], widths[1:]))
      for r in rows
    )
    return '\n'.join([*lines, self.headline])

  def same_as(self, before: Sequence[Mapping[str, Any]]) -> str:
    """In words: are these the predictions that were written before?"""
    old = {(r['task'], r['index']): r for r in before}
    keys = ('right', 'rank', 'top')
    both = [(r, old.get((r['task'], r['index']))) for r in self.predictions]
    both = [(r, o) for r, o in both if o is not None]
    differ = sum(any(r[k] != o[k] for k in keys) for r, o in both)
    what = f'{differ:,} of them differ' if differ else 'identical predictions'
    return f'{len(both):,} queries in common, {what}'

  def section(self, name: str, pictures: Any, cards: int = 60) -> dict[str, Any]:
    """What the template needs; `pictures.add(index, look)` gives CSS rules."""
    tasks = list(dict.fromkeys(r['task'] for r in self.predictions))
    shown = []
    for task in tasks:
      records = [r for r in self.predictions if r['task'] == task]
      for i in range(min(cards, len(records))):  # spread evenly over the data
        record = records[i * len(records) // min(cards, len(records))]
        card = self._card(record, pictures)
        if card is None:
          break
        shown.append(card)
    return {
      'name': name,
      'template': self.template,
      'headline': self.headline,
      'table': self.cells,
      'tasks': tasks,
      'cards': shown,
      'count': len(self.predictions),
    }

  def _card(self, record, pictures):
    query = pictures.add(record['index'], self.pictures)
    tops = [pictures.add(i, self.pictures) for i, _ in record['top']]
    if query is None or any(t is None for t in tops):
      return None  # the page is full
    own = record['index']
    return {
      **record,
      'picture': query if record['query'] is None else [],
      'own': query,
      'top': [
        {'text': text, 'pictures': rules, 'right': text == record['right'] if i is None
         else i == own}
        for (i, text), rules in zip(record['top'], tops)
      ],
    }  # fmt: skip


def words(share: float) -> str:
  """0.1234 as '12.3 %', 0.000264 as '0.026 %'."""
  digits = '.2g' if 0 < share < 0.01 else '.1f'
  return f'{100 * share:{digits}}\u00a0%'
