r"""Learning curves as one picture, from the lines of metrics.jsonl.

  loss                       accuracy
  | \                        |      ____  own images
  |  \__                     |  ___/
  |     \____                | -------    shuffled, blank
  +----------> step          +----------> step

The raw values stay visible as a faint line under their moving average.
"""

import io
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mmjax import files

_INK, _SOFT, _LINE = '#14181f', '#5b6472', '#e1e5eb'
_OWN, _TRAIN, _SHUFFLED, _BLANK = '#2563eb', '#f08c2e', '#7b8798', '#b4bdc9'
_TRAINING = (
  ('train/accuracy', 'training, per token'),
  ('train/accuracy_text', "training, an image's text in the batch"),
)
_RETRIEVAL = (
  ('image_to_text/r1', '#0f9d78', 'R@1, image to text'),
  ('text_to_image/r1', '#7c3aed', 'R@1, text to image'),
  ('image_to_text/r10', _SHUFFLED, 'R@10, image to text'),
  ('text_to_image/r10', _BLANK, 'R@10, text to image'),
)


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The records of a metrics.jsonl; a last line cut off by a crash is left out.

  Raises:
    ValueError: another line that is not a JSON object with a 'step'.
  """
  lines = files.place(path, 'the log').read_text(encoding='utf-8').splitlines()
  records = []
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
      record['step'] = int(record['step'])
    except (ValueError, TypeError, KeyError) as error:
      if number == len(lines):
        break
      raise ValueError(f'{path}, line {number}: not a record of metrics') from error
    records.append(record)
  return records


def series(records: Iterable[Mapping[str, Any]], key: str):
  """(steps, values) of one metric, by step; of a step logged twice, the last."""
  found = {}
  for record in records:
    value = record.get(key)
    if isinstance(value, int | float) and np.isfinite(value):
      found[record['step']] = float(value)
  steps = sorted(found)
  return np.array(steps), np.array([found[s] for s in steps])


def smooth(values: np.ndarray, width: int) -> np.ndarray:
  """Centred moving average, f[n]; near the ends over what there is."""
  sums = np.concatenate([[0.0], np.cumsum(values)])
  at = np.arange(len(values))
  reach = np.minimum(np.minimum(at, len(values) - 1 - at), width // 2)
  return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)


def draw(records: Iterable[Mapping[str, Any]], title: str = '') -> bytes:
  """The picture as PNG; the same records give the same bytes."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  records = list(records)
  figure = Figure(figsize=(10, 4), dpi=120, layout='constrained', facecolor='white')
  left, right = figure.subplots(1, 2)
  for axes, name in ((left, 'loss'), (right, 'accuracy')):
    axes.set_title(name, loc='left', fontsize=12, color=_INK, fontweight='bold')
    axes.set_xlabel('step', color=_SOFT)
    axes.grid(True, axis='y', color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_SOFT, length=0)
    axes.spines[['top', 'right', 'left']].set_visible(False)
    axes.spines['bottom'].set_color(_LINE)

  steps, loss = series(records, 'train/loss')
  if len(steps):
    _faint_and_smooth(left, steps, loss, _TRAIN, 'training')
    if loss.min() > 0 and loss.max() > 20 * loss.min():
      left.set_yscale('log')
    else:
      left.set_ylim(bottom=0)
  for key, label in _TRAINING:
    steps, values = series(records, key)
    if len(steps):
      _faint_and_smooth(right, steps, values, _TRAIN, label)
  for task in sorted({k.split('/')[1] for r in records for k in r if _is_eval(k)}):
    for suffix, color, label in (
      ('', _OWN, 'test'),
      ('_shuffled', _SHUFFLED, 'test, shuffled images'),
      ('_blank', _BLANK, 'test, blank images'),
    ):
      steps, values = series(records, f'eval/{task}/accuracy{suffix}')
      if len(steps):
        label = f'{task} {label} {100 * values[-1]:.1f} %'
        style = dict(color=color, linewidth=2, marker='o', markersize=4.5, zorder=4)
        style['zorder'] -= bool(suffix)  # the own images on top
        right.plot(steps, values, label=label, **style)
  for key, color, label in _RETRIEVAL:
    steps, values = series(records, f'eval/retrieval/{key}')
    if len(steps):
      label = f'{label} {100 * values[-1]:.1f} %'
      right.plot(steps, values, label=label, color=color, linewidth=2, marker='o',
                 markersize=4.5, zorder=4)  # fmt: skip
  right.set_ylim(0, 1.02)
  right.yaxis.set_major_formatter(lambda v, _: f'{100 * v:.0f} %')
  for axes in (left, right):
    if axes.get_legend_handles_labels()[0]:
      axes.legend(frameon=False, fontsize=9, labelcolor=_SOFT, loc='best')
    else:
      axes.text(0.5, 0.5, 'nothing logged yet', transform=axes.transAxes,
                ha='center', color=_SOFT)  # fmt: skip
  if title:
    figure.suptitle(title, color=_INK, fontsize=12)
  out = io.BytesIO()
  FigureCanvasAgg(figure).print_png(out, metadata={'Software': None})
  return out.getvalue()


def write(workdir: str | os.PathLike, title: str = '') -> pathlib.Path:
  """Draws `<workdir>/metrics.jsonl` into `<workdir>/curves.png`."""
  workdir = pathlib.Path(workdir)
  picture = draw(read(workdir / 'metrics.jsonl'), title)
  path = workdir / 'curves.png'
  files.replace(path, picture)
  return path


def _is_eval(key: str) -> bool:
  parts = key.split('/')
  return len(parts) == 3 and parts[0] == 'eval' and parts[2] == 'accuracy'


def _faint_and_smooth(axes, steps, values, color, label):
  width = max(1, len(values) // 20)
  if width < 3:
    axes.plot(steps, values, color=color, linewidth=2, label=label)
    return
  axes.plot(steps, values, color=color, linewidth=1, alpha=0.25)
  axes.plot(steps, smooth(values, width), color=color, linewidth=2, label=label)
