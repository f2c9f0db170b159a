"""The contract: what a packed batch is, and who sees whom in it.

A row of the batch holds several documents. Each slot of its stream carries
small integer tags, and one rule serves every pattern of attention:

  a query (segment, order, first, last) sees a key (segment, order, until)
  iff the segments are equal, first <= key's order <= last,
  and query's order <= until.

So each side sets bounds on the other. Two documents in a row of T = 11; the first
is an image of three slots `i` with two questions about it, which both see the
image but not each other, as if each had been asked alone:

  stream        i  i  i  b  c  d  e | f  g  h | .
  segment_ids   1  1  1  1  1  1  1   2  2  2   0      0 = padding
  order         0  0  0  1  2  3  4   0  1  2   0      one image = one rank
  first         0  0  0  0  0  0  0   0  0  0   0
  last          0  0  0  1  2  3  4   0  1  2  -1      padding sees nothing
  until         ~  ~  ~  2  2  4  4   ~  ~  ~   ~      ~ = `FOREVER`
  source        0  1  2 -1 -1 -1 -1  -1 -1 -1  -1      where the slot is in its bank

What ends somewhere is a branch of its document, the rest is the trunk. (FlashMask,
2410.01359, has the same two bounds by column; it calls this a shared question.)

Letters: B rows, T stream slots (queries), S keys, P patches, I items, C values
per patch.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from mmjax.shape import check

# A media slot's token. Negative, so that no vocabulary ever contains it.
PLACEHOLDER = {'image': -1, 'audio': -2, 'video': -3}

# The `until` of a slot that all later ones may see.
FOREVER = np.iinfo(np.int32).max

Array = Any  # np.ndarray, jax.Array or jax.ShapeDtypeStruct


class Item(NamedTuple):
  """One image or clip, as far as its size matters.

  `grid` is (time, rows, columns) in patches. A model's `slots(item)` answers
  with the grid of stream slots that the item takes.
  """

  kind: str
  grid: tuple[int, int, int]


def _pytree(cls):
  cls = dataclasses.dataclass(frozen=True)(cls)
  names = [f.name for f in dataclasses.fields(cls)]
  return jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])


@_pytree
class QueryTags:
  """Tags of queries, each i32[B, T]: a query sees orders first..last of its segment.

  Its own `order` is only needed against keys that have `until`.
  """

  segment_ids: Array
  first: Array
  last: Array
  order: Array | None = None


@_pytree
class KeyTags:
  """Tags of keys, each i32[B, S]; without `until`, all are seen forever."""

  segment_ids: Array
  order: Array
  until: Array | None = None


class AttentionTags(NamedTuple):
  """Both sides of one attention of a model.

  A model's `attention_tags(batch)` gives them by name, and its forward pass attends by
  the same. Queries are always the slots of the stream; so are the keys of 'self'. Keys
  of any other name are what the model made of the items, S / I for each, item after
  item.
  """

  query_tags: QueryTags
  key_tags: KeyTags


@_pytree
class Stream:
  """The token stream of a packed batch.

  tokens:      i32[B, T] text id, or a negative `PLACEHOLDER`
  segment_ids: i32[B, T] which document of the row, from 1; 0 = padding
  order:       i32[B, T] rank for attention inside the document
  first, last: i32[B, T] interval of ranks this slot may see
  until:       i32[B, T] the last rank that may see this slot; FOREVER = no bound
  positions:   i32[B, T, 3] time, height, width (text: all three equal)
  weights:     f32[B, T] loss weight of predicting this token; 0 = not trained
  source:      i32[B, T] index among the row's media slots of its kind; -1 = text
  """

  tokens: Array
  segment_ids: Array
  order: Array
  first: Array
  last: Array
  until: Array
  positions: Array
  weights: Array
  source: Array

  @property
  def query_tags(self) -> QueryTags:
    return QueryTags(self.segment_ids, self.first, self.last, self.order)

  @property
  def key_tags(self) -> KeyTags:
    return KeyTags(self.segment_ids, self.order, self.until)


@_pytree
class Bank:
  """All media of one kind in a packed batch, end to end as in NaViT (2307.06304).

  values:        u8 or f32[B, P, C] patches (C = p * p * 3) or mel frames
  items:         i32[B, P] which item of the row owns the patch, from 1; 0 = padding
  positions:     i32[B, P, 3] time, row, column inside the item
  item_segments: i32[B, I] the document of each item; 0 = no item
  item_order:    i32[B, I] the item's rank in its document
  """

  values: Array
  items: Array
  positions: Array
  item_segments: Array
  item_order: Array


@_pytree
class PackedBatch:
  """Rows of packed documents: one stream, and one bank per media kind."""

  stream: Stream
  bank: dict[str, Bank]


def visible(query_tags: QueryTags, key_tags: KeyTags) -> Array:
  """The rule of visibility, bool[B, T, S]; True = may attend.

  Raises:
    ValueError: shapes that don't fit, or keys with `until` and queries without `order`.
  """
  check('B T', query_tags.segment_ids, 'B S', key_tags.segment_ids)
  order = key_tags.order[:, None, :]
  seen = (
    (query_tags.segment_ids[:, :, None] == key_tags.segment_ids[:, None, :])
    & (query_tags.first[:, :, None] <= order)
    & (order <= query_tags.last[:, :, None])
  )
  if key_tags.until is None:
    return seen
  if query_tags.order is None:
    raise ValueError("visible: keys with tags `until` need the queries' `order`")
  return seen & (query_tags.order[:, :, None] <= key_tags.until[:, None, :])


@dataclasses.dataclass(frozen=True)
class BankBudget:
  """What one row can hold of one media kind: P patches of C values, I items."""

  patches: int
  items: int
  channels: int
  dtype: str = 'uint8'


@dataclasses.dataclass(frozen=True)
class Budget:
  """The static shape of one row.

  stream:  T, stream slots.
  targets: how many of them may be trained (weights > 0); the loss computes
    logits at that many slots only.
  bank:    per media kind.
  """

  stream: int
  targets: int
  bank: dict[str, BankBudget] = dataclasses.field(default_factory=dict)

  def empty(self, rows: int) -> PackedBatch:
    """A batch of nothing but padding: valid input for init, and what packers fill."""
    B, T = rows, self.stream

    def i32(*shape, fill=0):
      return np.full(shape, fill, np.int32)

    stream = Stream(
      tokens=i32(B, T),
      segment_ids=i32(B, T),
      order=i32(B, T),
      first=i32(B, T),
      last=i32(B, T, fill=-1),
      until=i32(B, T, fill=FOREVER),
      positions=i32(B, T, 3),
      weights=np.zeros((B, T), np.float32),
      source=i32(B, T, fill=-1),
    )
    bank = {
      kind: Bank(
        values=np.zeros((B, b.patches, b.channels), b.dtype),
        items=i32(B, b.patches),
        positions=i32(B, b.patches, 3),
        item_segments=i32(B, b.items),
        item_order=i32(B, b.items),
      )
      for kind, b in sorted(self.bank.items())
    }
    return PackedBatch(stream, bank)
