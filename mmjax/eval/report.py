"""What an evaluation leaves behind: `eval/<step>.json` and a page to look at.

The page is one file without a network: images are PNG data URIs, one rule of
CSS each however many cards show it. At its top stand three bars, the accuracy
with the own, the shuffled and the blank images, and a verdict in words, so that
a model that doesn't look is seen at a glance. Below are the answers, wrong ones
first.
"""

import base64
import io
import json
import math
import os
import pathlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax import files
from mmjax.eval import metrics

_WRONG, _RIGHT = 200, 60  # cards at most
_BYTES = 2_000_000  # of images on the page, as base64
_SIDE = 192  # longer images are shrunk to this many pixels


def write(workdir: str | os.PathLike, step: int, results: Mapping[str, Any]) -> dict:
  """Writes `<workdir>/eval/<step>.json` and `.html`, each whole or not at all.

  Args:
    results: by name of the evaluator, each with `.metrics`, `.predictions`,
      `.published` and `.pictures` (see `mmjax.eval.vqa.Result`). One that is no list of
      answers says itself what it shows: `.table`, `.same_as`, and `.page` (a page of
      its own, `gain.GainResult`) or `.section` (of this one, `ranking.Ranking`).

  Returns:
    {'json': path, 'html': path, 'html/<name>': path of a page of its own}
  """
  folder = files.place(workdir, 'the run') / 'eval'
  folder.mkdir(parents=True, exist_ok=True)
  content = {
    'step': int(step),
    'results': {
      name: {'metrics': _finite(r.metrics), 'predictions': r.predictions}
      for name, r in sorted(results.items())
    },
  }
  paths = {'json': folder / f'{step}.json'}
  files.replace(paths['json'], json.dumps(content, indent=1, ensure_ascii=False) + '\n')
  if answers := {n: r for n, r in results.items() if not _has_page(r)}:
    paths['html'] = folder / f'{step}.html'
    files.replace(paths['html'], page(step, answers))
  for name, result in sorted(results.items()):
    if _has_page(result):
      paths[f'html/{name}'] = folder / f'{step}.{name}.html'
      files.replace(paths[f'html/{name}'], result.page(step, name))
  return paths


def _has_page(result: Any) -> bool:
  return hasattr(result, 'page')


def read(workdir: str | os.PathLike, step: int) -> dict | None:
  """The content of `<workdir>/eval/<step>.json`; None if there is none.

  Raises:
    ValueError: the file is not one of ours.
  """
  path = files.place(workdir, 'the run') / 'eval' / f'{step}.json'
  if not path.exists():
    return None
  try:
    content = json.loads(path.read_text())
    content['results']
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f'{path} is not an evaluation: {error!r}') from error
  return content


def same_predictions(results: Mapping[str, Any], before: Mapping[str, Any]) -> str:
  """In words: do these results repeat the ones `read` has found?"""
  lines = []
  for name, result in sorted(results.items()):
    old = before['results'].get(name, {}).get('predictions', [])
    if hasattr(result, 'same_as'):
      lines.append(f'{name}: {result.same_as(old)}')
      continue
    old = {(r['index'], r['turn']): r for r in old}
    both = [(r, old.get((r['index'], r['turn']))) for r in result.predictions]
    both = [(r, o) for r, o in both if o is not None]
    keys = ('question', 'answer', 'prediction', 'prediction_shuffled', 'prediction_blank')
    differ = sum(any(r[k] != o[k] for k in keys) for r, o in both)
    what = f'{differ:,} of them differ' if differ else 'identical predictions'
    lines.append(f'{name}: {len(both):,} questions in common, {what}')
  return '\n'.join(lines)


def table(results: Mapping[str, Any]) -> str:
  """A few lines to print: each type's count and accuracies, and the verdict."""
  lines = []
  for name, result in sorted(results.items()):
    if hasattr(result, 'table'):
      lines.append(result.table(name))
      continue
    rows = [(name, 'questions', 'accuracy', 'shuffled', 'blank')]
    groups: dict[str, list] = {}
    for record in result.predictions:
      groups.setdefault(record['type'] or 'all', []).append(record)
    for group, records in [*sorted(groups.items()), ('together', result.predictions)]:
      hits = _hits(records)
      shares = (f'{metrics.accuracy(h):.4f}' for h in hits.values())
      rows.append((group, f'{len(records):,}', *shares))
    width = max(len(r[0]) for r in rows)
    lines += [f'{r[0]:{width}}' + ''.join(f'{c:>11}' for c in r[1:]) for r in rows]
    lines.append(verdict(result.predictions)[1])
  return '\n'.join(lines).replace('\u00a0', ' ')


def verdict(predictions: Sequence[Mapping[str, Any]]) -> tuple[bool, str]:
  """(uses its images?, the verdict in plain words); the bar is the gain's interval."""
  right = [r['correct'] for r in predictions]
  blind = [metrics.exact(r['prediction_shuffled'], r['answer']) for r in predictions]
  documents = [str(r['index']) for r in predictions]
  gain, low, high = metrics.paired_gain(right, blind, documents)
  points = f'{100 * gain:+.1f} points over shuffled images'
  interval = f'95\u00a0% interval {100 * low:+.1f} to {100 * high:+.1f}'
  if low > 0:
    return True, f'Uses its images: {points} ({interval}).'
  if high < 0:
    return False, f'Worse with its own images: {points} ({interval}).'
  return False, f'No sign that it uses its images: {points} ({interval}).'


def page(step: int, results: Mapping[str, Any]) -> str:
  """The page of `results` as a string of HTML."""
  pictures = Pictures(_BYTES)
  sections = [
    _section(name, result, pictures) for name, result in sorted(results.items())
  ]
  return render('report.html.j2', step=step, sections=sections, pictures=pictures.rules)


def render(template: str, **values: Any) -> str:
  """A template of this folder, filled in; everything is escaped."""
  import jinja2

  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters['percent'] = lambda x: '–' if _nan(x) else f'{100 * x:.1f}\u00a0%'
  return environment.get_template(template).render(**values)


def _section(name: str, result: Any, pictures: 'Pictures') -> dict[str, Any]:
  if hasattr(result, 'section'):
    return result.section(name, pictures)
  records = result.predictions
  looks, words = verdict(records)
  hits = _hits(records)
  bars = [
    _bar('own', 'Its own images', hits['']),
    _bar('shuffled', 'Shuffled', hits['_shuffled'], 'images of other documents'),
    _bar('blank', 'Blank', hits['_blank'], 'plain grey images'),
  ]
  types = [r['type'] or 'all' for r in records]
  by_type = {key: metrics.accuracy_by(types, h) for key, h in hits.items()}
  table = [
    {
      'type': t,
      'count': count,
      **{k.strip('_') or 'own': by_type[k][t][1] for k in hits},
    }
    for t, (count, _) in by_type[''].items()
  ]
  cards, counts = _cards(records, result.pictures, pictures)
  return {
    'name': name,
    'template': None,
    'looks': looks,
    'verdict': words,
    'bars': bars,
    'published': sorted(result.published.items(), key=lambda kv: kv[1]),
    'table': table,
    'cards': cards,
    'counts': counts,
    'metrics': result.metrics,
    'documents': len({r['index'] for r in records}),
  }


def _hits(records: Sequence[Mapping[str, Any]]) -> dict[str, list[bool]]:
  return {
    key: [metrics.exact(r[f'prediction{key}'], r['answer']) for r in records]
    for key in ('', '_shuffled', '_blank')
  }


def _bar(key, label, hits, note='') -> dict[str, Any]:
  low, high = metrics.wilson(sum(hits), len(hits))
  value = metrics.accuracy(hits)
  interval = {'low': low, 'high': high, 'right': sum(hits), 'count': len(hits)}
  return {'key': key, 'label': label, 'note': note, 'value': value, **interval}


def _cards(records, look: Callable | None, pictures: 'Pictures'):
  """Wrong answers in order, then a sample of the right ones."""
  wrong = [r for r in records if not r['correct']]
  right = [r for r in records if r['correct']]
  # A fixed sample, so that the same predictions give the same page.
  sample = sorted(random.Random(0).sample(range(len(right)), min(_RIGHT, len(right))))
  chosen = _spread(wrong, _WRONG) + [right[i] for i in sample]
  cards = []
  for record in chosen:
    shown = pictures.add(record['index'], look)
    if shown is None:
      break
    donor = pictures.add(record['shuffled_from'], look)
    cards.append({**record, 'shown': shown, 'donor': donor or []})
  seen = sum(not c['correct'] for c in cards)
  counts = {
    'wrong': len(wrong),
    'right': len(right),
    'wrong_shown': seen,
    'right_shown': len(cards) - seen,
  }
  return cards, counts


def _spread(items: list, limit: int) -> list:
  if len(items) <= limit:
    return items
  return [items[i * len(items) // limit] for i in range(limit)]


class Pictures:
  """All pictures of a page: each is one CSS rule, used by its class name."""

  def __init__(self, limit: int, side: int = _SIDE):
    self.rules: list[dict[str, Any]] = []
    self._limit, self._used, self._side = limit, 0, side
    self._known: dict[Any, list[dict[str, Any]]] = {}

  def add(self, index: int | None, look: Callable | None):
    """Rules of a document's pictures; [] if it has none, None if the page is full."""
    if index is None or look is None:
      return []
    key = (look, index)
    if key not in self._known:
      made = [_png(image, self._side) for image in look(index)]
      size = sum(len(m['data']) for m in made)
      if self._used + size > self._limit:
        return None
      self._used += size
      for rule in made:
        rule['name'] = f'p{len(self.rules)}'
        self.rules.append(rule)
      self._known[key] = made
    return self._known[key]


def _png(image: np.ndarray, side: int) -> dict[str, Any]:
  from PIL import Image

  picture = Image.fromarray(image)
  if max(picture.size) > side:
    picture.thumbnail((side, side))
  out = io.BytesIO()
  picture.save(out, 'PNG', optimize=True)
  width, height = picture.size
  data = base64.b64encode(out.getvalue()).decode()
  return {'data': data, 'width': width, 'height': height}


def _nan(value) -> bool:
  return value is None or math.isnan(value)


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
  return {k: None if _nan(v) else v for k, v in values.items()}
