"""What preparation made and left out: counts, first examples, histograms of lengths.

  train: 3,412 documents, 9,820 spans, 201,113 text tokens, 150,210 targets, 4,408 image
  dropped: 12 not_image, 310 few_images
    first not_image: page7.html#2: 1,204 bytes, no image file
  train: text tokens of a document    1-2 |### 310    2-4 |######## 911 ...

The same numbers stand in the dataset's `meta.json` and `report.png`.
"""

import os
from typing import Any

import numpy as np

from mmjax.data.store import Index

_WIDTH = 30  # of the longest bar, in characters


def text(meta: dict[str, Any], indexes: dict[str, Index] | None = None) -> str:
  """The report as lines; with histograms, where the indexes are given."""
  lines = []
  for name, split in meta['splits'].items():
    counts = [f'{n:,} {what}' for what, n in split.items() if what != 'shards']
    lines.append(f'{name}: ' + ', '.join(counts).replace('_', ' '))
  for what in ('removed', 'dropped'):
    if what == 'dropped' or meta.get(what):
      lines.append(f'{what}: {counted(meta[what])}')
      for reason, message in sorted(meta[f'{what}_first'].items()):
        lines.append(f'  first {reason}: {message}')
  for name, index in (indexes or {}).items():
    for title, values in _measures(index).items():
      lines.append(f'{name}: {title}')
      lines += _bars(values)
  return '\n'.join(lines)


def counted(reasons: dict[str, int]) -> str:
  """'3 empty, 1 not_image', or 'none'."""
  return ', '.join(f'{n:,} {reason}' for reason, n in reasons.items()) or 'none'


def _measures(index: Index) -> dict[str, np.ndarray]:
  """What is drawn, by title."""
  image = index.item_kind == 0
  owner = np.repeat(np.arange(len(index)), np.diff(index.item_offsets))
  sides = index.item_size[image, 1:].astype(np.float64)
  measures = {
    'text tokens of a document': index.text_tokens,
    'images of a document': np.bincount(owner[image], minlength=len(index)),
    'image size: square root of height x width': np.sqrt(sides.prod(1)),
  }
  return {title: values for title, values in measures.items() if values.any()}


def _edges(values: np.ndarray) -> np.ndarray:
  """Bounds of bins: each number for few, else 0, 1, 2, 4, 8, ..."""
  most = int(values.max())
  if most <= 10:
    return np.arange(int(values.min()), most + 2)
  low = max(int(values.min()), 1).bit_length() - 1
  edges = 2 ** np.arange(low, most.bit_length() + 1)
  return np.concatenate([[0], edges]) if values.min() < 1 else edges


def _bars(values: np.ndarray) -> list[str]:
  edges = _edges(values)
  counts = np.histogram(values, edges)[0]
  lines = []
  for low, high, n in zip(edges, edges[1:], counts):
    name = f'{low:,}' if high - low == 1 else f'{low:,}-{high - 1:,}'
    lines.append(f'  {name:>15} |{"#" * round(_WIDTH * n / counts.max())} {n:,}')
  return lines


def draw(path: str | os.PathLike, indexes: dict[str, Index]) -> None:
  """Histograms of lengths as a PNG: a row per split, a column per measure."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  rows = {name: _measures(index) for name, index in indexes.items()}
  titles = list(dict.fromkeys(title for row in rows.values() for title in row))
  figure = Figure(figsize=(4 * len(titles), 2.6 * len(rows)), layout='constrained')
  FigureCanvasAgg(figure)
  grid = figure.subplots(len(rows), len(titles), squeeze=False)
  for axes, (name, row) in zip(grid, rows.items()):
    for axis, title in zip(axes, titles):
      axis.set_title(f'{name}: {title}', fontsize=9)
      if title in row:
        edges = _edges(row[title])
        counts = np.histogram(row[title], edges)[0]
        names = [f'{low:,}' for low in edges[:-1]]
        axis.bar(range(len(counts)), counts, width=0.95, color='#4878a8')
        axis.set_xticks(range(len(counts)), names, fontsize=7, rotation=45)
      else:
        axis.set_axis_off()
  figure.savefig(path, dpi=100)
