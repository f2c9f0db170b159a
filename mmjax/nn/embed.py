"""From tokens and media to the stream: early fusion of raw patches.

A text token looks up its row of the table; a media slot takes its patch from
the bank, through one linear projection per media kind (Fuyu-8B, Adept 2023):

  tokens   the  cat  -1   -1   -1   .        -1 = image
  source   -1   -1    0    1    2  -1
  stream   E[the] E[cat] W p0  W p1  W p2  E[.]
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.batch import PLACEHOLDER, Bank, PackedBatch
from mmjax.nn.dense import kernel_init
from mmjax.ops.across import lookup, rows, take
from mmjax.ops.linear import linear
from mmjax.ops.vocabulary import Head
from mmjax.shape import check
from mmjax.sharding import constrain, param


def pixels(values: jax.Array, dtype: Any) -> jax.Array:
  """Bytes 0..255 to [-1, 1]; what is not u8 is only cast."""
  if values.dtype == jnp.uint8:
    values = values.astype(jnp.float32) / 127.5 - 1
  return values.astype(dtype)


class MediaProjection(nn.Module):
  """Patches or frames to the model's width, [B, P, C] -> f[B, P, D]."""

  channels: int
  embed_dim: int
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'
  bias: bool = True

  @nn.compact
  def __call__(self, values: jax.Array) -> jax.Array:
    C, D, zeros = self.channels, self.embed_dim, nn.initializers.zeros
    kernel = param(
      self, 'kernel', kernel_init(), (C, D), ('patch', 'embed'), self.param_dtype
    )
    y = linear(pixels(values, self.dtype), kernel)
    if not self.bias:
      return y
    bias = param(self, 'bias', zeros, (D,), ('embed',), self.param_dtype)
    return y + bias.astype(self.dtype)[None, None]


def _gather(x, here, source, media):
  """x f[B, T, D] with the media f[B, P, D] that `source` names where `here`."""
  source = jnp.clip(source, 0, media.shape[1] - 1)
  return jnp.where(here[..., None], take(media, source), x)


def _whole(table):
  """A small table, on every device before it is read: what is read is larger."""
  return constrain(table, None, None)


class StreamEmbed(nn.Module):
  """A `PackedBatch` to the residual stream.

  Fields: media is ((kind, channels), ...); scale multiplies text embeddings by
  sqrt(D), so that they enter with the size of a projected patch; modality adds
  a learned vector per kind; max_positions > 0 adds a learned vector per position
  (in time), as in GPT-2 and BERT; extra_words is how many words, the last of the
  vocabulary, stand in a table of their own, so that they can be trained beside a
  frozen one.
  """

  vocab_size: int
  embed_dim: int
  media: tuple[tuple[str, int], ...] = ()
  scale: bool = True
  modality: bool = False
  max_positions: int = 0
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'
  extra_words: int = 0

  def setup(self):
    V, D = self.vocab_size - self.extra_words, self.embed_dim
    normal = nn.initializers.normal(D**-0.5)
    self.text = param(self, 'text', normal, (V, D), ('vocab', 'embed'), self.param_dtype)
    if self.extra_words:
      shape, axes = (self.extra_words, D), (None, 'embed')
      self.extra = param(self, 'extra', normal, shape, axes, self.param_dtype)
    self.projections = {
      kind: MediaProjection(C, D, self.dtype, self.param_dtype, name=kind)
      for kind, C in self.media
    }
    if self.max_positions:
      shape, axes = (self.max_positions, D), (None, 'embed')
      self.positions = param(self, 'positions', normal, shape, axes, self.param_dtype)
    if self.modality:
      shape, axes = (1 + len(self.media), D), (None, 'embed')
      self.kinds = param(self, 'modality', normal, shape, axes, self.param_dtype)

  def __call__(
    self, batch: PackedBatch, ready: Mapping[str, jax.Array] = MappingProxyType({})
  ) -> jax.Array:
    """Returns f[B, T, D]; the batch may lack a kind that the model has.

    A slot at a position that has no vector is NaN, rather than silently wrong.

    Args:
      ready: by kind, f[B, P, D] that media slots take by `source` as they are.

    Raises:
      ValueError: a kind of media or its channels is not the model's.
    """
    stream = batch.stream
    x = self._words(jnp.maximum(stream.tokens, 0))
    if self.scale:
      x = x * self.embed_dim**0.5
    self._check(batch.bank)
    kind_ids = jnp.zeros_like(stream.tokens)
    # Every projection runs, also on no values, so that its parameters exist.
    for i, (kind, channels) in enumerate(self.media):
      here = stream.tokens == PLACEHOLDER[kind]
      if kind in batch.bank:
        values = batch.bank[kind].values
      else:
        values = jnp.zeros((len(stream.tokens), 1, channels), self.dtype)
      x = _gather(x, here, stream.source, self.projections[kind](values))
      kind_ids = jnp.where(here, i + 1, kind_ids)
    for kind, made in ready.items():
      here = stream.tokens == PLACEHOLDER[kind]
      x = _gather(x, here, stream.source, made.astype(self.dtype))
    if self.max_positions:
      # Below 0 would count from the end; both ways out of the table are filled.
      here = stream.positions[..., 0]
      here = jnp.where(here < 0, self.max_positions, here)
      vectors = rows(_whole(self.positions), here)
      x = x + vectors.astype(self.dtype)
    if self.modality:
      x = x + rows(_whole(self.kinds), kind_ids).astype(self.dtype)
    return constrain(x, 'batch', 'seq', 'act_embed')

  def head(self, soft_cap: float | None = None) -> Head:
    """The tied head: the tables of words."""
    if not self.extra_words:
      return Head((self.text,), (('vocab', 'embed'),), soft_cap)
    axes = (('vocab', 'embed'), (None, 'embed'))
    return Head((self.text, self.extra), axes, soft_cap)

  def _words(self, tokens):
    if not self.extra_words:
      return lookup(self.text, tokens, self.dtype)
    V = len(self.text)
    usual = lookup(self.text, jnp.minimum(tokens, V - 1), self.dtype)
    extra = rows(_whole(self.extra), jnp.maximum(tokens - V, 0))
    return jnp.where((tokens < V)[..., None], usual, extra.astype(self.dtype))

  def _check(self, bank: Mapping[str, Bank]) -> None:
    known = dict(self.media)
    for kind, b in bank.items():
      check('B P C', b.values, 'B P', b.items)
      if kind not in known:
        raise ValueError(f'batch has media {kind!r}, the model has {sorted(known)}')
      if b.values.shape[-1] != known[kind]:
        raise ValueError(
          f'{kind} patches have {b.values.shape[-1]} channels,'
          f' the model takes {known[kind]}'
        )
