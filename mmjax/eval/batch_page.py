"""The page of a packed batch: what the model gets, and who sees whom in it.

  row 0   [What is the shape ? circle <end>][ What colour ...      one colour a document
          [ image of 8 x 8 slots ]                                 of its patches

A slot that is clicked lights those that it may see, and the items, for each attention
of the model. The browser works it out from the very tags that the model attends by
(`attention_tags` of models), by the rule of `batch.visible`; so the page grows with T,
not with T x T. It is one file without a network, as all reports (see `report`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.batch import FOREVER, PLACEHOLDER, AttentionTags, Bank, Item, PackedBatch
from mmjax.eval import report

_BYTES = 8_000_000  # of images on the page, as base64
_SIDE = 448  # longer images are shrunk to this many pixels
_FIELDS = ('tokens', 'segment_ids', 'order', 'first', 'last', 'until', 'positions',
           'weights', 'source')  # fmt: skip
_HUES = (212, 28, 140, 288, 48, 182, 338, 92)  # neighbours differ well


def page(
  batch: PackedBatch,
  tags: Mapping[str, AttentionTags],
  tokenizer: Any,
  slots: Callable[[Item], tuple[int, int, int]],
  *,
  title: str = 'batch',
  rows: int | None = None,
  stats: Any = None,
) -> str:
  """The page as a string of HTML.

  Args:
    batch: NumPy arrays, B rows of T slots.
    tags: by name of an attention, what the model's `attention_tags(batch)` gives.
    tokenizer: has `decode` and `end_id`.
    slots: the model's, from item to its grid of stream slots.
    title: of the page.
    rows: at most so many rows are shown; None = all.
    stats: a `batch_stats.Stats` to show above the rows.

  Raises:
    ValueError: tags whose keys are neither the slots nor a multiple of the items.
  """
  B, T = batch.stream.tokens.shape
  count = B if rows is None else min(rows, B)
  pictures = report.Pictures(_BYTES, _SIDE)
  data = [data_of_row(batch, tags, b) for b in range(count)]
  return report.render(
    'batch.html.j2',
    title=title,
    rows=[_row(batch, b, tokenizer, slots, pictures) for b in range(count)],
    forever=FOREVER,
    sizes={'rows': B, 'slots': T},
    hidden=B - count,
    data=data,
    attentions=[(n, x['per_item']) for n, x in data[0]['attentions'].items()],
    stats=None if stats is None else stats.sections(),
    pictures=pictures.rules,
  )


def data_of_row(
  batch: PackedBatch, tags: Mapping[str, AttentionTags], b: int
) -> dict[str, Any]:
  """What the page holds of row b as JSON: the stream, and each attention's tags.

  `per_item` tells how many keys an item has; 0 = the keys are the slots.
  """
  T = batch.stream.tokens.shape[1]
  items = max(sum(bank.item_order.shape[1] for bank in batch.bank.values()), 1)
  attentions = {}
  for name, (query, key) in tags.items():
    S = key.order.shape[1]
    if S % items if name != 'self' else S != T:
      raise ValueError(
        f'attention {name!r} has {S} keys, which are neither the {T} slots nor as many'
        f' for each of {items} items'
      )
    attentions[name] = {
      'query': {n: _list(x, b) for n, x in vars(query).items()},
      'key': {n: _list(x, b) for n, x in vars(key).items()},
      'per_item': 0 if name == 'self' else S // items,
    }
  stream = {name: _list(getattr(batch.stream, name), b) for name in _FIELDS}
  return {'stream': stream, 'attentions': attentions}


def _list(array, b):
  return None if array is None else np.asarray(array)[b].tolist()


def _row(batch, b, tokenizer, slots, pictures) -> dict[str, Any]:
  stream = batch.stream
  segments = stream.segment_ids[b]
  items = [
    item
    for kind, bank in sorted(batch.bank.items())
    for item in _items(stream, bank, kind, b, slots, pictures)
  ]
  documents = []
  for segment in range(1, int(segments.max(initial=0)) + 1):
    places = np.flatnonzero(segments == segment)
    mine = [item for item in items if item['segment'] == segment]
    documents.append(
      {
        'number': segment,
        'hue': _HUES[(segment - 1) % len(_HUES)],
        'count': len(places),
        'share': 100 * len(places) / len(segments),
        'trained': int(np.count_nonzero(stream.weights[b, places])),
        'groups': _groups(stream, b, places, mine, tokenizer),
      }
    )
  used = int(np.count_nonzero(segments))
  return {
    'number': b,
    'documents': documents,
    'used': used,
    'media': [(np.count_nonzero(x.item_segments[b]), k) for k, x in batch.bank.items()],
    'trained': int(np.count_nonzero(stream.weights[b])),
    'share': 100 * (len(segments) - used) / len(segments),
  }


def _items(stream, bank: Bank, kind: str, b: int, slots, pictures) -> list[dict]:
  """The items of a row: picture, grid of slots, and which slots they are."""
  places = np.flatnonzero(stream.tokens[b] == PLACEHOLDER[kind])
  places = places[np.argsort(stream.source[b, places], kind='stable')]
  found, done = [], 0
  for i, segment in enumerate(bank.item_segments[b].tolist()):
    if not segment:
      continue
    mine = bank.items[b] == i + 1
    grid = tuple((bank.positions[b, mine].max(axis=0) + 1).tolist())
    t, height, width = slots(Item(kind, grid))
    count = t * height * width
    look = _look(bank.values[b, mine], grid)
    shown = pictures.add((b, kind, i), look)
    found.append(
      {
        'index': i,
        'kind': kind,
        'segment': segment,
        'picture': shown[0] if shown else None,
        'width': min(max(20 * grid[2], shown[0]['width'] if shown else 0, 96), 320),
        'grid': grid,
        'slots': places[done : done + count].tolist(),
        # Over the picture, where a slot is a place in it; else below it.
        'over': count > 1 and (height > 1 or (t, height, width) == grid),
        'columns': max(width, 1),
        'rows': max(t * height, 1),
      }
    )
    done += count
  return found


def _look(values: np.ndarray, grid: tuple[int, int, int]):
  """For `report.Pictures`: the item as an image, of its patches."""
  return lambda _: [picture(values, grid)]


def picture(values: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
  """Patches u8 or f[P, C] of a grid (time, rows, columns) as u8[H, W, 3].

  Frames stand below each other. Values of no square of colours (sound) are grey, a
  column for each patch.
  """
  from mmjax.data.media import unpatchify

  if values.dtype != np.uint8:
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    values = (values - low) * (255 / max(high - low, 1e-6))
    values = np.clip(values, 0, 255).astype(np.uint8)
  side = math.isqrt(values.shape[1] // 3)
  if side * side * 3 == values.shape[1]:
    t, rows, columns = grid
    return np.ascontiguousarray(unpatchify(values, t * rows, columns, side))
  return np.ascontiguousarray(np.repeat(values.T[::-1, :, None], 3, axis=2))


def _groups(stream, b, places, items, tokenizer) -> list[dict[str, list]]:
  """A document in the order of its slots: items with the runs of text after them.

  A run ends at an item, and where a branch of the document begins or ends.
  """
  groups: list[dict[str, list]] = [
    {'items': [x for x in items if not x['slots']], 'runs': []}
  ]
  starts = {x['slots'][0]: x for x in items if x['slots']}
  tokens, until = stream.tokens[b], stream.until[b]
  inside = {place for x in items for place in x['slots']}
  run: list[int] = []

  def close():
    if run:
      branch = bool(until[run[0]] != FOREVER)
      groups[-1]['runs'].append((branch, _words(stream, b, run, tokenizer)))
      run.clear()

  for place in places.tolist():
    if place in starts:
      close()
      if groups[-1]['runs']:
        groups.append({'items': [], 'runs': []})
      groups[-1]['items'].append(starts[place])
    if place in inside and tokens[place] < 0:
      continue
    if run and until[run[-1]] != until[place]:
      close()
    run.append(place)
  close()
  return groups


def _words(stream, b, run, tokenizer) -> list[tuple[int, str, str]]:
  ids = stream.tokens[b, run].tolist()
  texts = pieces(ids, tokenizer.decode)
  shown = []
  for place, token, text in zip(run, ids, texts):
    kind = 'trained' if stream.weights[b, place] > 0 else ''
    if text is None:
      text, kind = ('end' if token == tokenizer.end_id else str(token)), f'{kind} odd'
    shown.append((place, text, kind.strip()))
  return shown


def pieces(
  ids: Sequence[int], decode: Callable[[list[int]], str], back: int = 8
) -> list[str | None]:
  """The text that each token adds; None where it adds none (an end token).

  A token that ends inside of a character adds '', the one that ends it all of it.

  Args:
    ids: of a run of tokens.
    decode: the tokenizer's.
    back: tokens before one that are decoded with it, for its space; more, where they
      begin inside of a character.
  """
  found: list[str | None] = []
  done, start = 0, 0  # texts of ids[:done] are told; ids[start:done] go before
  for n in range(1, len(ids) + 1):
    before, whole = decode(list(ids[start:done])), decode(list(ids[start:n]))
    if whole.endswith('\ufffd') and n - done < 4:
      found.append('')
      continue
    new = whole[len(before) :]
    found.append(new or None)
    done, start = n, max(start, n - back)
  return found
