"""Late fusion: two towers that meet in one vector each (CLIP, SigLIP).

  bank    a a a b b b .    --vision-->  a  b  .     --> image f[B, I, E]   I = 3
  stream  k k k l l l l .  --text--->   k  l        --> text  f[B, I, E]

Both towers read the same packed rows, many pairs a row: pair i is the row's item i
with the text of its document, and no document sees another. What the training compares
are all pairs of the global batch, see `ops.contrastive`.

An item takes no slot of the stream: the text tower would have to look away from it, and
a text tower that was trained alone finds its first token where it learnt to.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.batch import AttentionTags, Bank, Item, PackedBatch
from mmjax.names import closest
from mmjax.nn.dense import Dense
from mmjax.ops.contrastive import clipped_exp
from mmjax.shape import check
from mmjax.sharding import constrain, param

TEXT_POOLS = ('first', 'last', 'mean')


class Pairs(NamedTuple):
  """The pairs of a batch, in its rows.

  image, text: f32[B, I, E], of length 1 where there is one, else 0
  weights:     f32[B, I], 1 = a pair; 0 = no item, not the first one of its document, or
    a document without text
  """

  image: jax.Array
  text: jax.Array
  weights: jax.Array


class Dual(nn.Module):
  """An encoder of items and one of text, each followed by a projection.

  Fields:
    vision: an encoder, see `nn.features`. Its pooled vectors are taken, or the mean
      of an item's tokens.
    text: `models.text.Encoder` or `models.unified.Unified`.
    media: ((kind, channels),), as the data says.
    embed_dim: E.
    text_pool: of a document's text: its 'first' slot, its 'last' one, or the 'mean'.
    image_projection, text_projection: a kernel to E (else the tower's width is E).
    projection_bias: and a bias.
    temperature_init: logits are cosine / temperature + bias, with both learned;
      1 / temperature is at most `max_scale`.
    bias_init: SigLIP begins at -10, with temperature 0.1; InfoNCE doesn't use it.
    logit_bias: whether there is a bias; CLIP has none.
    dtype, param_dtype: of the projections; the latter also of temperature and bias.
  """

  vision: nn.Module
  text: nn.Module
  media: tuple[tuple[str, int], ...] = (('image', 0),)
  embed_dim: int = 128
  text_pool: str = 'last'
  image_projection: bool = True
  text_projection: bool = True
  projection_bias: bool = False
  temperature_init: float = 0.07
  bias_init: float = 0.0
  logit_bias: bool = True
  max_scale: float = 100.0
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'

  def __post_init__(self):
    super().__post_init__()
    if self.text_pool not in TEXT_POOLS:
      near = closest(self.text_pool, TEXT_POOLS)
      raise ValueError(f'dual: unknown text_pool {self.text_pool!r}{near}')
    if len(self.media) != 1:
      raise ValueError(f'dual pairs one kind of media with text, got {self.media}')
    if not 1 / self.max_scale <= self.temperature_init:
      raise ValueError(
        f'dual: temperature_init={self.temperature_init} is under 1 / max_scale ='
        f' {1 / self.max_scale}'
      )

  def setup(self):
    made = self.embed_dim, self.projection_bias, self.param_dtype
    if self.image_projection:
      self.image_out = Dense(*made)
    if self.text_projection:
      self.text_out = Dense(*made)
    log_scale = nn.initializers.constant(-math.log(self.temperature_init))
    self.log_scale = param(self, 'log_scale', log_scale, (), (), self.param_dtype)
    if self.logit_bias:
      bias = nn.initializers.constant(self.bias_init)
      self.bias = param(self, 'bias', bias, (), (), self.param_dtype)

  def __call__(self, batch: PackedBatch, *, train: bool = False) -> Pairs:
    """Embeds the pairs of a batch.

    Raises:
      ValueError: media that are not the model's, or a tower whose width is not E
        where it has no projection.
    """
    for kind in batch.bank:
      if kind != self.media[0][0]:
        raise ValueError(
          f'batch has media {kind!r}, the model pairs {self.media[0][0]!r} with text'
        )
    if not batch.bank:
      raise ValueError('dual: the batch has no bank; texts alone go to `embed_texts`')
    bank = batch.bank[self.media[0][0]]
    image = self.embed_images(bank, train=train)
    text, found = self.embed_texts(batch, bank.item_segments, train=train)
    segments = jnp.asarray(bank.item_segments)
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    weights = found & (segments != before)
    return Pairs(image, text, weights.astype(jnp.float32))

  def embed_images(self, bank: Bank, *, train: bool = False) -> jax.Array:
    """f32[B, I, E] of a bank's items, of length 1; 0 where there is none."""
    features = self.vision(bank, train=train)
    I = bank.item_segments.shape[1]
    pooled = features.pooled
    if pooled is None:
      each = jnp.arange(1, I + 1, dtype=jnp.int32)[None, None]
      pooled = _mean(features.values, features.items[..., None] == each)
    if self.image_projection:
      pooled = self.image_out(pooled.astype(self.dtype))
    return self._normalised(pooled, jnp.asarray(bank.item_segments) > 0, 'vision')

  def embed_texts(
    self, batch: PackedBatch, segments: jax.Array, *, train: bool = False
  ) -> tuple[jax.Array, jax.Array]:
    """The texts of documents.

    Args:
      batch: of which the stream is read.
      segments: i32[B, I], which document of the row is meant; 0 = none.

    Returns:
      f32[B, I, E] of length 1, and bool[B, I]: False (and 0) where the document has no
      text.
    """
    check('B I', segments)
    stream = batch.stream
    hidden = self.text(PackedBatch(stream, {}), train=train)
    segments = jnp.asarray(segments)[:, None]
    mine = jnp.asarray(stream.segment_ids)[..., None] == segments  # [B, T, I]
    mine &= (jnp.asarray(stream.tokens) >= 0)[..., None] & (segments > 0)
    if self.text_pool == 'mean':
      pooled = _mean(hidden, mine)
    else:
      slot = jnp.argmax(mine if self.text_pool == 'first' else mine[:, ::-1], 1)
      slot = slot if self.text_pool == 'first' else mine.shape[1] - 1 - slot
      pooled = jnp.take_along_axis(hidden, slot[..., None], 1)
    if self.text_projection:
      pooled = self.text_out(pooled.astype(self.dtype))
    found = jnp.any(mine, 1)
    return self._normalised(pooled, found, 'text'), found

  def temperature(self) -> tuple[jax.Array, jax.Array]:
    """(scale, bias), f32[]: logits are scale * cosine + bias."""
    scale = clipped_exp(self.log_scale, self.max_scale)
    bias = self.bias if self.logit_bias else jnp.zeros(())
    return scale, bias.astype(jnp.float32)

  def attention_tags(self, batch: PackedBatch) -> dict[str, AttentionTags]:
    """By name of an attention, its tags (of the text tower): `batch.AttentionTags`."""
    return self.text.attention_tags(PackedBatch(batch.stream, {}))

  def slots(self, item: Item) -> tuple[int, int, int]:
    """The grid of stream slots an item takes: none."""
    del item
    return (0, 0, 0)

  def _normalised(self, x, found, tower):
    if x.shape[-1] != self.embed_dim:
      raise ValueError(
        f'dual: {tower} gives {x.shape[-1]} values, embed_dim is {self.embed_dim};'
        ' without a projection they have to be equal'
      )
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, -1, keepdims=True), 1e-12))
    return constrain(jnp.where(found[..., None], x, 0), 'batch', None, None)


def _mean(values: jax.Array, mine: jax.Array) -> jax.Array:
  """f[B, S, D], bool[B, S, I] -> f32[B, I, D], the mean of each item's own; or 0."""
  mine = mine.astype(jnp.float32)
  total = jnp.einsum('BSI,BSD->BID', mine, values.astype(jnp.float32))
  return total / jnp.maximum(jnp.sum(mine, 1), 1)[..., None]
