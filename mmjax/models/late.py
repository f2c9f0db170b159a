"""Late fusion that answers: two towers that know nothing of each other until the end.

  tokens  --language model--> h f[B, T, D] ----------------.
                                                           v
  patches --encoder--> v f[B, I, D'] --the item a token--> h + W (tanh(U h) * tanh(V v))
                                       sees (markers)      --head--> logits

Low-rank bilinear pooling (Kim et al., 1610.04325) joins them at the logits; a text
that sees no item keeps its own. The twin that ranks whole texts is `models.dual`.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.batch import (
  AttentionTags,
  Bank,
  Item,
  KeyTags,
  PackedBatch,
  Stream,
  visible,
)
from mmjax.models.unified import Unified
from mmjax.nn.cache import Cache, join
from mmjax.nn.dense import kernel_init
from mmjax.nn.features import bank_of
from mmjax.nn.gated_xattn import look_at
from mmjax.nn.markers import item_tags, words
from mmjax.ops.linear import linear
from mmjax.ops.vocabulary import Head
from mmjax.sharding import constrain, param


class ItemCache(NamedTuple):
  """The text tower's cache, the items' vectors f[B, I, E] and their tags i32[B, I]."""

  text: Cache
  items: jax.Array | None = None
  tags: KeyTags | None = None


class Late(nn.Module):
  """A language model and an encoder, joined after their last layers.

  Fields:
    lm: the text tower.
    vision: an encoder, see `nn.features`; its pooled vectors are taken, so it pools.
    media: ((kind, channels),), one kind.
    joint_dim: E, width of the product.
    marker: the token that the language model reads at an item's slot.
    latest: a token is joined with the latest item that it may see; else with the mean
      of all.
  """

  lm: Unified
  vision: nn.Module
  media: tuple[tuple[str, int], ...] = ()
  joint_dim: int = 128
  marker: int = 0
  latest: bool = True

  def __post_init__(self):
    super().__post_init__()
    if len(self.media) != 1:
      raise ValueError(f'late fusion takes one kind of media, got {self.media}')
    if not 0 <= self.marker < self.lm.vocab_size:
      raise ValueError(f'marker={self.marker} is not in 0..{self.lm.vocab_size - 1}')

  def setup(self):
    lm = self.lm
    self.item = ItemVector(self.joint_dim, lm.dtype, lm.param_dtype)
    self.join = Join(self.joint_dim, lm.param_dtype)

  @property
  def reach(self) -> int | tuple[int, int] | None:
    return self.lm.reach

  def __call__(self, batch: PackedBatch, *, train: bool = False) -> jax.Array:
    """Hidden states that the head reads, f[B, T, D].

    Raises:
      ValueError: media that are not the model's, or an encoder that doesn't pool.
    """
    bank = bank_of(batch, self.media)
    items = self._vectors(bank, train)
    hidden = self.lm(words(batch, self.marker), train=train)
    return self._joined(hidden, items, self.attention_tags(batch)['join'])

  def extend(
    self, batch: PackedBatch, cache: ItemCache, slot: jax.Array | int
  ) -> tuple[jax.Array, ItemCache]:
    """Runs new slots against the cache; as `Flamingo.extend`."""
    items, tags = cache.items, cache.tags
    if items is None or batch.bank:
      bank = bank_of(batch, self.media)
      new = self._vectors(bank, False), item_tags(batch.stream, bank, self.media[0][0])
      old = (items, tags)
      items, tags = new if items is None else join(old, new, 1)
    hidden, text = self.lm.extend(words(batch, self.marker), cache.text, slot)
    hidden = self._joined(hidden, items, self._join_tags(batch.stream, tags))
    return hidden, ItemCache(text, items, tags)

  def head(self) -> Head:
    """What turns hidden states into logits."""
    return self.lm.head()

  def logits(self, hidden: jax.Array) -> jax.Array:
    """f[..., D] -> f32[..., V]."""
    return self.lm.logits(hidden)

  def attention_tags(self, batch: PackedBatch) -> dict[str, AttentionTags]:
    """By name of an attention, its tags; 'join' is to items: `batch.AttentionTags`."""
    bank = bank_of(batch, self.media)
    items = item_tags(batch.stream, bank, self.media[0][0])
    join = self._join_tags(batch.stream, items)
    return {**self.lm.attention_tags(batch), 'join': join}

  def slots(self, item: Item) -> tuple[int, int, int]:
    """The grid of stream slots an item takes: its marker.

    Raises:
      ValueError: the encoder can't take such an item.
    """
    self.vision.grid(item)
    return (1, 1, 1)

  def empty_cache(self, rows: int, slots: int) -> ItemCache:
    """A cache for `extend`; a plain function of the fields."""
    return ItemCache(self.lm.empty_cache(rows, slots))

  def unscanned(self, params: dict) -> tuple['Late', dict]:
    """The same model with layers one by one, and its parameters."""
    lm, flat = self.lm.unscanned(params['lm'])
    return self.clone(lm=lm), {**params, 'lm': flat}

  def _vectors(self, bank: Bank, train: bool) -> jax.Array:
    pooled = self.vision(bank, train=train).pooled
    if pooled is None:
      raise ValueError("late fusion takes an item's vector; set `pool` of the encoder")
    return self.item(pooled)

  def _join_tags(self, stream: Stream, items: KeyTags) -> AttentionTags:
    return AttentionTags(look_at(stream.query_tags, items, self.latest), items)

  def _joined(
    self, hidden: jax.Array, items: jax.Array, tags: AttentionTags
  ) -> jax.Array:
    seen = visible(*tags).astype(jnp.float32)
    seen = seen / jnp.maximum(jnp.sum(seen, -1, keepdims=True), 1)
    mine = jnp.einsum('BTI,BIE->BTE', seen, items.astype(jnp.float32))
    return self.join(hidden, mine.astype(hidden.dtype))


class ItemVector(nn.Module):
  """tanh(V v): f[B, I, D'] -> f[B, I, E]."""

  joint_dim: int
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'

  @nn.compact
  def __call__(self, pooled: jax.Array) -> jax.Array:
    shape, axes = (pooled.shape[-1], self.joint_dim), ('embed', 'mlp')
    kernel = param(self, 'kernel', kernel_init(), shape, axes, self.param_dtype)
    return jnp.tanh(linear(pooled.astype(self.dtype), kernel))


class Join(nn.Module):
  """h + W (tanh(U h) * item): f[B, T, D], f[B, T, E] -> f[B, T, D].

  W begins at 0, so that the language model's own hidden states come out at first.
  """

  joint_dim: int
  param_dtype: Any = 'float32'

  @nn.compact
  def __call__(self, hidden: jax.Array, item: jax.Array) -> jax.Array:
    D, E, dtype = hidden.shape[-1], self.joint_dim, self.param_dtype
    up = param(self, 'up', kernel_init(), (D, E), ('embed', 'mlp'), dtype)
    zeros = nn.initializers.zeros
    down = param(self, 'down', zeros, (E, D), ('mlp', 'embed'), dtype)
    text = constrain(jnp.tanh(linear(hidden, up)), 'batch', 'seq', 'act_mlp')
    return constrain(hidden + linear(text * item, down), 'batch', 'seq', 'act_embed')
