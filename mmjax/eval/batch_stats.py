"""Numbers of packed batches over some steps: fill, lengths, images, kinds of tokens.

  fill        stream 96.1 %   image 78.3 %          share of slots and patches used
  lengths     12 .. 87 .. 258                       slots of a document
  tokens      trained 4 %, prompt 40 %, image 56 %  of the used slots

Counted from the batches as they go to the devices, not from what was planned.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mmjax.batch import PLACEHOLDER

_BINS = 12
_KNOWN = ('documents', 'tokens', 'targets', 'epoch')


@dataclasses.dataclass(frozen=True, eq=False)
class Stats:
  """What `gather` counts.

  steps:   how many.
  fill:    by 'stream' or media kind, the share of each step, f64[steps].
  lengths: stream slots of every document, i64[N].
  items:   by media kind, items of every document, i64[N].
  tokens:  used slots: 'trained', 'prompt' (text that isn't), and by media kind.
  sums:    other counts of the pipeline, as 'bad/<reason>', over all steps.
  dropped: by reason, documents of the dataset that the plan leaves out.
  """

  steps: int
  fill: dict[str, np.ndarray]
  lengths: np.ndarray
  items: dict[str, np.ndarray]
  tokens: dict[str, int]
  sums: dict[str, float]
  dropped: dict[str, int]

  def sections(self) -> list[dict[str, Any]]:
    """Tables: title, head, rows of strings, and maybe bars (label, count, percent)."""
    share = '{:.1%}'.format
    fill = [
      (name, share(x.mean()), share(x.min()), share(x.max()))
      for name, x in self.fill.items()
    ]
    low, median, high, most = np.percentile(self.lengths, (0, 50, 95, 100)).tolist()
    mean = f'{self.lengths.mean():,.1f}'
    ends = (f'{x:,.0f}' for x in (low, median, high, most))
    whole = max(sum(self.tokens.values()), 1)
    sections = [
      _section(
        f'Fill over {self.steps:,} steps', ('of a row', 'mean', 'least', 'most'), fill
      ),
      _section(
        f'Slots of {len(self.lengths):,} documents',
        ('mean', 'least', 'median', '95 %', 'most'),
        [(mean, *ends)],
        _histogram(self.lengths),
      ),
      _section(
        'Slots by kind',
        ('kind', 'slots', 'share'),
        [(name, f'{n:,}', share(n / whole)) for name, n in self.tokens.items()],
      ),
    ]
    for kind, counts in self.items.items():
      values, times = np.unique(counts, return_counts=True)
      rows = [
        (f'{v:,}', f'{n:,}', share(n / len(counts))) for v, n in zip(values, times)
      ][:20]
      head = (f'{kind}s', 'documents', 'share')
      sections.append(_section(f'{kind.capitalize()}s a document', head, rows))
    left = [(reason, f'{n:,}') for reason, n in self.dropped.items()] or [('none', '0')]
    sections.append(_section('Dropped by the plan', ('reason', 'documents'), left))
    if self.sums:
      rows = [(name, f'{n:,.0f}') for name, n in sorted(self.sums.items())]
      sections.append(_section('Counted by the pipeline', ('name', 'sum'), rows))
    return sections

  def table(self) -> str:
    """The same as lines to print."""
    lines = []
    for section in self.sections():
      rows = [section['head'], *section['rows']]
      widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
      lines.append(section['title'])
      for row in rows:
        first, *rest = zip(row, widths)
        cells = [first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)]
        lines.append('  ' + '  '.join(cells).rstrip())
    return '\n'.join(lines)


def gather(steps: Iterable[Any], dropped: Mapping[str, int] = {}) -> Stats:  # noqa: B006
  """Counts over steps of a pipeline.

  Args:
    steps: `pipeline.Loaded`, or anything with `batch` (NumPy) and `stats`.
    dropped: the plan's.

  Raises:
    ValueError: no steps, or no document in them.
  """
  fill, items = collections.defaultdict(list), collections.defaultdict(list)
  lengths, tokens, sums = [], collections.Counter(), collections.Counter()
  for loaded in steps:
    stream = loaded.batch.stream
    fill['stream'].append(np.mean(stream.segment_ids > 0))
    documents = [
      np.unique(row[row > 0], return_counts=True) for row in stream.segment_ids
    ]
    lengths += [sizes for _, sizes in documents]
    text = (stream.segment_ids > 0) & (stream.tokens >= 0)
    tokens['trained'] += int(np.count_nonzero(text & (stream.weights > 0)))
    tokens['prompt'] += int(np.count_nonzero(text & (stream.weights <= 0)))
    for kind, bank in sorted(loaded.batch.bank.items()):
      tokens[kind] += int(np.count_nonzero(stream.tokens == PLACEHOLDER[kind]))
      fill[kind].append(np.mean(bank.items > 0))
      for (segments, _), owners in zip(documents, bank.item_segments):
        items[kind].append(np.count_nonzero(owners == segments[:, None], axis=1))
    for name, value in loaded.stats.items():
      if name not in _KNOWN and not name.startswith('fill/'):
        sums[name] += value
  count = len(fill['stream'])
  if not sum(map(len, lengths)):
    raise ValueError(f'{count} steps hold no document to count')
  return Stats(
    steps=count,
    fill={name: np.array(shares) for name, shares in fill.items()},
    lengths=np.concatenate(lengths),
    items={kind: np.concatenate(counts) for kind, counts in items.items()},
    tokens=dict(tokens),
    sums=dict(sums),
    dropped=dict(dropped),
  )


def _section(title, head, rows, bars=()) -> dict[str, Any]:
  return {'title': title, 'head': head, 'rows': rows, 'bars': bars}


def _histogram(values: np.ndarray) -> list[tuple[str, int, float]]:
  """(label, count, percent of the highest) of at most `_BINS` bins of whole numbers."""
  low, high = int(values.min()), int(values.max())
  width = -(-(high - low + 1) // _BINS)
  counts = np.bincount((values - low) // width)
  starts = low + width * np.arange(len(counts))
  return [
    (f'{a}–{a + width - 1}' if width > 1 else str(a), int(n), 100 * n / counts.max())
    for a, n in zip(starts.tolist(), counts)
  ]
