"""The page of a gain: documents with their figures in place, tokens in colour.

  [figure] The [radius] of the [blur] sets how far colours run.
                ^^^ blue: the right figure made it likelier than another one;
                    orange: less likely; grey: no figure stands before it

Documents that gained most come first, at the end those that lost most. One file
without a network, as all reports (see `report`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmjax.eval import report

_MOST, _LEAST = 40, 10  # documents at most
_BYTES = 3_000_000  # of images on the page, as base64
_STEP = 0.25  # nats from one shade to the next
_SHADES = 6


def page(step: int, name: str, result: Any) -> str:
  """The page of a `GainResult`."""
  pictures = report.Pictures(_BYTES)
  ranked = sorted(result.predictions, key=lambda r: r['loss'] - r['loss_shuffled'])
  ranked = [r for r in ranked if r['tokens']]
  least = [r for r in ranked[_MOST:] if r['loss'] > r['loss_shuffled']][-_LEAST:]
  cards, full = [], False
  for record in [*ranked[:_MOST], *least]:
    shown = pictures.add(record['index'], result.pictures)
    full = full or shown is None
    if not full:
      donor = pictures.add(record['shuffled_from'], result.pictures)
      cards.append(_card(record, result, shown, donor or []))
  helps, verdict = result.verdict()
  found = result.metrics
  return report.render(
    'gain.html.j2',
    step=step,
    name=name,
    helps=helps,
    verdict=verdict,
    metrics=found,
    rows=[
      ('Right images', found['gain/loss']),
      ('Shuffled images', found['gain/loss_shuffled']),
      ('Blank images', found['gain/loss_blank']),
    ],
    intervals=[
      _interval('Shuffled minus right', 'gain/shuffled_minus_right', found),
      _interval('Blank minus right', 'gain/blank_minus_right', found),
    ],
    cards=cards,
    missing=len(ranked) - len(cards),
    shades=[(s, 14 * s) for s in range(1, _SHADES + 1)],
    step_of_shades=_STEP,
    pictures=pictures.rules,
  )


def _interval(label: str, key: str, found: dict[str, float]) -> dict[str, Any]:
  """Where a value and its interval stand on a line from -most to most, in percent."""
  value, low, high = (found[key + end] for end in ('', '_low', '_high'))
  values = [v for v in (value, low, high) if math.isfinite(v)]
  most = 1.15 * max([1e-9, *map(abs, values)])

  def at(x):
    return 50 + 50 * x / most if math.isfinite(x) else 50.0

  return {'label': label, 'value': value, 'low': low, 'high': high, 'at': at(value),
          'at_low': at(low), 'width': at(high) - at(low)}  # fmt: skip


def _card(record, result, shown, donor) -> dict[str, Any]:
  tokens = result.tokens[record['index']]
  gains = tokens.losses[1] - tokens.losses[0]
  by_place = {
    int(place): (float(gain) if seen else None)
    for place, gain, seen in zip(tokens.places, gains, tokens.seen)
  }
  whole = result.show(record['index'])
  sums = record['loss_shuffled'] - record['loss']
  return {
    'document': record['document'],
    'sum': sums,
    'mean': sums / record['tokens'],
    'tokens': record['tokens'],
    'donor': donor,
    'parts': _parts(whole, by_place, shown, result.decode),
  }


def _parts(whole, by_place, shown, decode) -> list[dict[str, Any]]:
  """Figures and runs of text (see `runs`) in the order of the document's slots."""
  is_text = whole.tokens >= 0
  item = np.full(len(is_text), -1)
  if 'image' in whole.media:  # all slots of an item have ranks up to the item's own
    ranks = whole.media['image'].item_order
    item[~is_text] = np.searchsorted(ranks, whole.order[~is_text])
  cuts = np.flatnonzero(np.diff(item)) + 1
  parts: list[dict[str, Any]] = []
  for places in np.split(np.arange(len(item)), cuts):
    if item[places[0]] >= 0:
      parts.append({'picture': shown[item[places[0]]], 'runs': []})
      continue
    gains = [by_place.get(int(place)) for place in places]
    text = runs(whole.tokens[places].tolist(), gains, decode)
    parts.append({'picture': None, 'runs': text})
  return parts


def runs(
  ids: Sequence[int], gains: Sequence[float | None], decode: Callable[[list[int]], str]
) -> list[tuple[str, str, str]]:
  """Text in runs of one colour: (text, class, title).

  Tokens that end inside of a character go with the next one; a title tells the gain
  of what is coloured.
  """
  found: list[tuple[str, str, str]] = []
  done, held = '', 0.0
  for n, gain in enumerate(gains, 1):
    text = decode(list(ids[:n]))
    held += gain or 0.0
    if text.endswith('\ufffd') and n < len(gains):
      continue
    new, done = text[len(done) :], text
    shade = min(_SHADES, int(abs(held) / _STEP + 0.5))
    kind = 'u' if gain is None else f'{"g" if held > 0 else "l"}{shade}' if shade else ''
    title = f'{held:+.2f}' if shade and gain is not None else ''
    held = 0.0
    if not new:
      continue
    if found and not title and found[-1][1:] == (kind, ''):
      found[-1] = (found[-1][0] + new, kind, '')
    else:
      found.append((new, kind, title))
  return found
