"""An example: one document as arrays of its true lengths.

  spans      Image 2x1       Text(prompt)  Text(answer, trained)
  tokens     -1 -1           12 7          40 end
  order       0  0            1 2           3 4       an image = one rank
  last        0  0            1 2           3 4       first = 0 everywhere
  positions  000 010         222 333       444 555    time, row, column
  weights     0  0            0 0           1 1
  source      0  1           -1 -1         -1 -1

A branch of the document (see `data.document`) is seen until its last slot, and its
positions start where the trunk stands, as if nothing stood between:

  spans      Image    branch 1   branch 2   trunk
  order      0        1 2 3      4 5        6 7
  until      forever  3 3 3      5 5        forever
  positions  0        1 2 3      1 2        1 2

Positions of media follow M-RoPE (Qwen2-VL, 2409.12191): text counts on from
the largest place of the grid before it. Rules of sound and video say with `times` where
on the time axis their patches stand, and with `seconds` what that is on the clock. Models
that know of no grid have slots that count on like text (`image_positions`), and a
prefix-LM has prompts whose slots all see each other, since they share one rank
(`prompt_attention`, PaliGemma, 2407.07726):

  spans      Image 2x1   Text(prompt)   Text(answer)
  order       0  0        0 0            1 2
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mmjax.batch import FOREVER, PLACEHOLDER, Item
from mmjax.data import media as media_lib
from mmjax.data.document import BadDocument, Document, Image, check_branches, kind_of
from mmjax.data.text import tokenised

Slots = Callable[[Item], tuple[int, int, int]]
# What `to_example` takes for each of its options, the first by default.
CHOICES = {
  'image_attention': ('block', 'causal'),
  'prompt_attention': ('causal', 'block'),
  'image_positions': ('grid', 'count'),
}


@dataclasses.dataclass(frozen=True, eq=False)
class MediaArrays:
  """All media of one kind in one document.

  values:     u8 or f32[P, C] patches
  positions:  i32[P, 3] time (`rule.seconds` makes seconds of it), row, column inside
    the item
  items:      i32[P] which item owns the patch, from 1
  item_order: i32[I] the item's rank in the document
  """

  values: np.ndarray
  positions: np.ndarray
  items: np.ndarray
  item_order: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """One document of n slots; tags as in `batch.Stream`, without the row's padding.

  tokens, order, first, last, until, source: i32[n]; positions: i32[n, 3];
  weights: f32[n]; media: by kind, only the kinds there are.
  """

  tokens: np.ndarray
  order: np.ndarray
  first: np.ndarray
  last: np.ndarray
  until: np.ndarray
  positions: np.ndarray
  weights: np.ndarray
  source: np.ndarray
  media: dict[str, MediaArrays]

  def __len__(self):
    return len(self.tokens)


def to_example(
  document: Document,
  *,
  tokenizer: Any,
  rules: Mapping[str, Any],
  slots: Slots,
  image_attention: str = 'block',
  prompt_attention: str = 'causal',
  image_positions: str = 'grid',
) -> Example:
  """Tokenises, decodes, resizes, patchifies and tags one document.

  Args:
    document: the document.
    tokenizer: see `data.tokenizer`. Every trained text is closed by its
      `end_id`, trained too: that is where generation stops.
    rules: by media kind, how an item becomes patches (`media.ImageRule`). A rule
      of another kind has `grid(*native_size)`, `patches(span)` and, if its patches
      aren't 0, 1, 2, ... on the time axis, `times(*native_size)`.
    slots: the model's answer to how many stream slots an item takes, as a grid.
    image_attention: 'block' (slots of an item share one rank, so that they see
      each other) or 'causal' (each has its own).
    prompt_attention: 'causal', or 'block': slots of a run of untrained spans, media
      and all, share one rank, in every branch anew.
    image_positions: 'grid' (time, row, column) or 'count' (one more for each slot).

  Returns:
    The example. A slot that nothing stands before (the first one) is never trained.

  Raises:
    BadDocument: 'unsupported_<kind>' without a rule, 'empty', 'nothing_trained',
      'bad_branch' (negative, or its spans stand apart), or what decoding says.
    ValueError: an option that is none of `CHOICES`.
  """
  for name, value in (
    ('image_attention', image_attention),
    ('prompt_attention', prompt_attention),
    ('image_positions', image_positions),
  ):
    if value not in CHOICES[name]:
      first, second = CHOICES[name]
      raise ValueError(f'{name}={value!r}; choose {first!r} or {second!r}')
  check_branches(document)
  parts = _Parts()
  for span, ids in tokenised(document, tokenizer):
    kind = kind_of(span)
    parts.branch(span.branch)
    if ids is not None:
      parts.text(ids, span.trained)
      continue
    if kind not in rules:
      raise BadDocument(f'unsupported_{kind}', f'document {document.id!a}')
    grid, times, values = _patches(span, rules[kind])
    slot_grid = slots(Item(kind, grid))
    options = image_attention, image_positions
    parts.item(kind, grid, times, values, slot_grid, *options)
  example = parts.example(document.id)
  return _blocks(example) if prompt_attention == 'block' else example


def _blocks(example: Example) -> Example:
  """Ranks counted anew, so that what stands together untrained has one."""
  trained, until = example.weights > 0, example.until
  new = trained[1:] | trained[:-1] | (until[1:] != until[:-1])
  order = np.append(0, np.cumsum(new)).astype(np.int32)
  # By old rank; one without a slot (an item that takes none) is as the one before.
  ranks = np.zeros(max(example.order.max(), _last_item(example)) + 1, np.int32)
  ranks[example.order] = order
  ranks = np.maximum.accumulate(ranks)
  until = np.where(until == FOREVER, FOREVER, ranks[np.minimum(until, len(ranks) - 1)])
  media = {
    kind: dataclasses.replace(m, item_order=ranks[m.item_order])
    for kind, m in example.media.items()
  }
  return dataclasses.replace(
    example, order=order, last=order.copy(), until=until.astype(np.int32), media=media
  )


def _last_item(example):
  return max((int(m.item_order.max()) for m in example.media.values()), default=0)


def _patches(span, rule):
  """(grid of patches, their times or None for 0, 1, 2, ..., the patches)."""
  if isinstance(span, Image):
    grid, values = rule.patches_of(span)
    return grid, None, values
  size = media_lib.native_size(span)
  times = rule.times(*size) if hasattr(rule, 'times') else None
  return rule.grid(*size), times, rule.patches(span)


@functools.lru_cache(1024)
def _cells(grid: tuple[int, int, int]) -> np.ndarray:
  """The cells (time, row, column) of a grid in reading order, i32[n, 3]."""
  cells = np.ascontiguousarray(np.indices(grid, np.int32).reshape(3, -1).T)
  cells.flags.writeable = False  # it is everyone's
  return cells


def _places(grid: tuple[int, int, int], times: np.ndarray | None) -> np.ndarray:
  """The cells of a grid with what there is of `times` for the time, i32[n, 3]."""
  cells = _cells(tuple(grid))
  if times is None or not len(cells):
    return cells
  places = cells.copy()
  places[:, 0] = times[cells[:, 0] * len(times) // grid[0]]
  return places


class _Parts:
  """Collects what is known of spans, one after the other; arrays are made at the end."""

  def __init__(self):
    self.current = 0  # the branch we are in
    self.fork = None  # the trunk's position where the branch left it
    self.rank = 0  # the next slot's order
    self.position = 0  # the next text token's position
    self.ids, self.trained = [], []  # of texts since the last item
    # Runs of slots: how many, then tokens, order, positions, weights and source, each
    # an array or one value for all.
    self.runs = []
    self.slots = 0  # in them
    self.until = []  # pairs: how many slots, their `until`
    self.num_slots = {}  # by kind
    self.media = {}

  def branch(self, branch):
    """What comes next is of this branch."""
    if branch != self.current:
      self._close_text()
      self._close_branch()
      self.current = branch
      self.fork = self.position

  def _close_branch(self):
    count = self.slots - sum(n for n, _ in self.until)
    self.until.append((count, self.rank - 1 if self.current else FOREVER))
    if self.current:
      self.position = self.fork

  def _add(self, n, *values):
    self.runs.append((n, values))
    self.slots += n

  def text(self, ids, trained):
    self.ids += ids
    self.trained.append((float(trained), len(ids)))

  def _close_text(self):
    n = len(self.ids)
    if not n:
      return
    steps = np.arange(n, dtype=np.int32)
    one = len(self.trained) == 1
    weights = self.trained[0][0] if one else np.repeat(*zip(*self.trained))
    places = (self.position + steps)[:, None]
    self._add(n, self.ids, self.rank + steps, places, weights, -1)
    self.rank += n
    self.position += n
    self.ids, self.trained = [], []

  def item(self, kind, grid, times, values, slot_grid, attention, positions):
    self._close_text()
    cells = _places(slot_grid, times)
    n = len(cells)
    steps = np.arange(n, dtype=np.int32)
    seen = self.num_slots.get(kind, 0)
    order = self.rank + steps if attention == 'causal' else self.rank
    counted = positions == 'count'
    places = self.position + (steps[:, None] if counted else cells)
    self._add(n, PLACEHOLDER[kind], order, places, 0.0, seen + steps)
    self.num_slots[kind] = seen + n
    # A causal item counts as seen from its last slot on.
    self.rank += max(n, 1) if attention == 'causal' else 1
    side = max(slot_grid) if times is None else int(cells.max(initial=-1)) + 1
    self.position += n if counted else side
    self.media.setdefault(kind, []).append((_places(grid, times), values, self.rank - 1))

  def example(self, name) -> Example:
    self._close_text()
    self._close_branch()
    n = self.slots
    if not n:
      raise BadDocument('empty', f'document {name!a} holds nothing')
    tokens, order, source, until = np.empty((4, n), np.int32)
    positions, weights = np.empty((n, 3), np.int32), np.empty(n, np.float32)
    at = 0
    for count, values in self.runs:
      here = slice(at, at + count)
      for array, value in zip((tokens, order, positions, weights, source), values):
        array[here] = value
      at += count
    at = 0
    for count, value in self.until:
      until[at : at + count] = value
      at += count
    weights[_lone(order, until, self.until)] = 0.0
    if not weights.any():
      raise BadDocument('nothing_trained', f'document {name!a}')
    return Example(
      tokens=tokens,
      order=order,
      first=np.zeros(n, np.int32),
      last=order.copy(),
      until=until,
      positions=positions,
      weights=weights,
      source=source,
      media={kind: _media_arrays(items) for kind, items in self.media.items()},
    )


def _lone(order, until, branches):
  """Slots that nothing stands before: the first one, and of branches without a trunk."""
  if len(branches) == 1:
    return 0
  return np.append(True, until[:-1] < order[1:]) & ~np.append(
    False, np.cumsum(until == FOREVER)[:-1] > 0
  )


def _media_arrays(items) -> MediaArrays:
  ranks = np.array([rank for _, _, rank in items], np.int32)
  if len(items) == 1:  # nothing to join, nothing to copy
    ((places, values, _),) = items
    return MediaArrays(values, places, np.ones(len(values), np.int32), ranks)
  counts = [len(values) for _, values, _ in items]
  return MediaArrays(
    values=np.concatenate([values for _, values, _ in items]),
    positions=np.concatenate([places for places, _, _ in items]),
    items=np.repeat(np.arange(1, len(items) + 1, dtype=np.int32), counts),
    item_order=ranks,
  )
