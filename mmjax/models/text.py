"""A text encoder that sees both ways: BERT (1810.04805) and its kin.

  tokens + positions + types --norm--> Transformer --> hidden --> pooled | logits

It reads the text of a `PackedBatch`: every slot of a document sees all text of
that document, whatever `order` says, and media slots are as padding. So documents
that share a row are encoded as if each were alone:

  stream        a  b  i  i  c | d  e  f | .         i = media
  segments      1  1  0  0  1   2  2  2   0         a and d head their documents

Decoders (Llama, Qwen2, Gemma, GPT-2) are `models.unified.Unified`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.batch import AttentionTags, KeyTags, PackedBatch, QueryTags
from mmjax.nn.dense import Dense
from mmjax.nn.embed import StreamEmbed
from mmjax.nn.transformer import (
  ACTIVATIONS,
  NORMS,
  Config,
  Transformer,
  unstack,
)
from mmjax.ops.across import rows
from mmjax.sharding import constrain, param


class Encoder(nn.Module):
  """A Transformer over the text of documents, each slot seeing all of its own.

  Fields: as of `models.unified.Unified`, and
    num_types: of a learned vector per kind of text; 0 = none. All slots are of
      type 0, unless `__call__` is told.
    embedding_norm: a norm before the first layer.
    pooler: tanh(W hidden + b) of documents' first slots, see `pool`.
    mlm_head: what BERT puts between hidden and the tied head, see `logits`.
  """

  vocab_size: int
  embed_dim: int = 128
  num_layers: int = 4
  num_heads: int = 4
  num_kv_heads: int = 4
  head_dim: int = 32
  mlp_dim: int = 512
  max_positions: int = 512
  num_types: int = 2
  embedding_norm: bool = True
  pooler: bool = False
  mlm_head: bool = False
  activation: str = 'gelu'
  gated: bool = False
  norm: str = 'layer'
  post_norm: bool = True
  bias: str = 'all'
  qk_norm: bool = False
  dropout: float = 0.0
  remat: str = 'none'
  scan: bool = True
  unroll: bool = False
  chunk: int = 512
  reach: int | tuple[int, int] | None = None
  attention: str = 'auto'
  rotary: bool = False
  rotary_dim: int | None = None
  rope_base: float = 10_000.0
  rope_sections: tuple[int, int, int] | None = None
  norm_eps: float = 1e-12
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'

  def __post_init__(self):
    super().__post_init__()
    if self.vocab_size < 1:
      raise ValueError(f'vocab_size must be at least 1, got {self.vocab_size}')
    self.config()

  def config(self) -> Config:
    """The Transformer's part of the fields."""
    return Config.of(self)

  def setup(self):
    D, dtype, config = self.embed_dim, self.param_dtype, self.config()
    self.embed = StreamEmbed(
      self.vocab_size,
      D,
      scale=False,
      max_positions=self.max_positions,
      dtype=self.dtype,
      param_dtype=dtype,
    )
    normal = nn.initializers.normal(D**-0.5)
    if self.num_types:
      shape, axes = (self.num_types, D), (None, 'embed')
      self.types = param(self, 'types', normal, shape, axes, dtype)
    if self.embedding_norm:
      self.embed_norm = NORMS[self.norm](self.norm_eps, dtype)
    self.transformer = Transformer(config)
    self.drop = nn.Dropout(self.dropout)
    if self.pooler:
      self.pool_dense = Dense(D, param_dtype=dtype)
    if self.mlm_head:
      self.head_dense = Dense(D, param_dtype=dtype)
      self.head_norm = NORMS[self.norm](self.norm_eps, dtype)
      zeros = nn.initializers.zeros
      self.head_bias = param(
        self, 'head_bias', zeros, (self.vocab_size,), ('vocab',), dtype
      )

  def __call__(
    self, batch: PackedBatch, *, types: jax.Array | None = None, train: bool = False
  ) -> jax.Array:
    """Hidden states, f[B, T, D]; only those of text slots mean anything.

    Args:
      batch: of which only the stream is read.
      types: i32[B, T], the type of each slot; None = all 0.
      train: dropout on; needs the rng 'dropout'.
    """
    s = batch.stream
    x = self.embed(PackedBatch(s, {}))
    if self.num_types:
      types = jnp.zeros_like(s.tokens) if types is None else types
      table = constrain(self.types, None, None)
      x = x + rows(table, types).astype(self.dtype)
    if self.embedding_norm:
      x = self.embed_norm(x)
    x = self.drop(x, deterministic=not train)
    tags = self.attention_tags(batch)['self']
    hidden, _ = self.transformer(x, s.positions, *tags, train=train)
    if self.is_initializing():  # parameters of the heads exist from `init` on
      self._heads(hidden)
    return hidden

  def attention_tags(self, batch: PackedBatch) -> dict[str, AttentionTags]:
    """By name of an attention, its tags; see `batch.AttentionTags`."""
    s = batch.stream
    segments = jnp.where(s.tokens >= 0, s.segment_ids, 0)
    zeros = jnp.zeros_like(segments)
    queries = QueryTags(segments, zeros, jnp.where(segments > 0, 0, -1))
    return {'self': AttentionTags(queries, KeyTags(segments, zeros))}

  def pool(self, hidden: jax.Array) -> jax.Array:
    """tanh(W hidden + b), f[..., D] -> f[..., D]; meant for documents' first slots.

    Raises:
      ValueError: the model has no pooler.
    """
    if not self.pooler:
      raise ValueError('pool: the encoder was built with pooler=False')
    return jnp.tanh(self.pool_dense(hidden))

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Logits of the tied head, f[..., D] -> f32[..., V]."""
    if self.mlm_head:
      hidden = self.head_norm(ACTIVATIONS[self.activation](self.head_dense(hidden)))
    logits = self.embed.head().logits(hidden)
    if self.mlm_head:
      bias = self.head_bias.astype(logits.dtype)
      logits = logits + bias.reshape((1,) * (logits.ndim - 1) + (-1,))
    if logits.ndim == 3:
      logits = constrain(logits, 'batch', 'seq', 'act_vocab')
    return logits

  def _heads(self, hidden):
    if self.pooler:
      self.pool(hidden)
    self.logits(hidden)

  def unscanned(self, params: dict) -> tuple['Encoder', dict]:
    """The same model with layers one by one, and its parameters."""
    if not self.scan:
      return self, params
    params = {**params, 'transformer': unstack(params['transformer'], self.num_layers)}
    return self.clone(scan=False), params
