"""One Transformer over text and raw media: untagged early fusion.

  tokens --lookup--.
                    >-- stream --> Transformer --> hidden --> logits
  patches --linear-'

Patches enter the stream through one linear projection, no encoder, no marker of
modality (Fuyu type); who sees whom stands in the batch's tags, so text can be
causal while the patches of one image see each other.

Without media it is a language model, and its fields make it that of Llama, Qwen2,
Gemma or GPT-2 (see `nn.transformer` and `interop.huggingface`).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax

from mmjax.batch import PLACEHOLDER, AttentionTags, Item, PackedBatch
from mmjax.nn.cache import Cache, empty_cache, write
from mmjax.nn.dense import kernel_init
from mmjax.nn.embed import StreamEmbed
from mmjax.nn.transformer import Before, Config, Transformer, unstack
from mmjax.ops.vocabulary import Head
from mmjax.sharding import param


class Unified(nn.Module):
  """A decoder over one stream of text tokens and media patches.

  Fields:
    vocab_size: V, any number.
    embed_dim, num_layers, num_heads, num_kv_heads, head_dim, mlp_dim: D, L, N, K, H, F.
    media: ((kind, channels), ...), e.g. (('image', 8 * 8 * 3),).
    activation: of the MLP: silu, gelu, gelu_tanh or quick_gelu.
    gated: act(x gate) * (x up) down, or act(x up) down.
    norm: rms, rms_offset (the factor is 1 + scale) or layer.
    post_norm: norms after each branch, as in BERT, and not before it.
    bias: of products: none, qkv or all.
    qk_norm: normalise queries and keys of each head.
    tie_embeddings: the head is the text table.
    scale_embedding: multiply text embeddings by sqrt(D) (1706.03762, section 3.4).
    modality_embedding: add a learned vector per media kind.
    extra_words: how many words, the last of the vocabulary, are parameters of their own,
      'embed/extra' and 'extra_head': new words beside a frozen vocabulary.
    logits_soft_cap: c * tanh(logits / c), as in Gemma 2; None = off.
    dropout: rate, on embeddings and on each branch; needs the rng 'dropout' in training.
    remat: what a layer keeps for the backward pass, see `nn.remat`.
    scan: one stacked layer, scanned, or layers one by one; unroll: scanned, but compiled
      as one by one: longer to compile, faster on a CPU.
    chunk, reach: of attention, see `ops.attention.attend`; attention: its
      implementation.
    max_positions: > 0 adds a learned vector per position; NaN from there on.
    rotary: rotary positions, in the first rotary_dim entries of a head (None = all);
      rope_base, rope_sections, rope_scaling: see `ops.positions`.
    dtype: of compute; param_dtype: of storage.
  """

  vocab_size: int
  embed_dim: int = 128
  num_layers: int = 4
  num_heads: int = 4
  num_kv_heads: int = 4
  head_dim: int = 32
  mlp_dim: int = 384
  media: tuple[tuple[str, int], ...] = ()
  activation: str = 'silu'
  gated: bool = True
  norm: str = 'rms'
  post_norm: bool = False
  bias: str = 'none'
  qk_norm: bool = False
  tie_embeddings: bool = True
  scale_embedding: bool = True
  modality_embedding: bool = False
  extra_words: int = 0
  max_positions: int = 0
  logits_soft_cap: float | None = None
  dropout: float = 0.0
  remat: str = 'none'
  scan: bool = True
  unroll: bool = False
  chunk: int = 512
  reach: int | tuple[int, int] | None = None
  attention: str = 'auto'
  rotary: bool = True
  rotary_dim: int | None = None
  rope_base: float = 10_000.0
  rope_sections: tuple[int, int, int] | None = None
  rope_scaling: tuple | None = None
  norm_eps: float = 1e-6
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'

  def __post_init__(self):
    super().__post_init__()
    if self.vocab_size < 1:
      raise ValueError(f'vocab_size must be at least 1, got {self.vocab_size}')
    if not 0 <= self.extra_words < self.vocab_size:
      raise ValueError(
        f'extra_words={self.extra_words} is not in 0..{self.vocab_size - 1}, the words'
        ' but one'
      )
    for kind, _ in self.media:
      if kind not in PLACEHOLDER:
        raise ValueError(f'unknown media kind {kind!r}; kinds are {sorted(PLACEHOLDER)}')
    self.config()

  def config(self) -> Config:
    """The Transformer's part of the fields."""
    return Config.of(self)

  def setup(self):
    self.embed = StreamEmbed(
      self.vocab_size,
      self.embed_dim,
      tuple((kind, channels) for kind, channels in self.media),
      self.scale_embedding,
      self.modality_embedding,
      self.max_positions,
      self.dtype,
      self.param_dtype,
      self.extra_words,
    )
    self.transformer = Transformer(self.config())
    self.drop = nn.Dropout(self.dropout)
    if not self.tie_embeddings:
      D, E, dtype = self.embed_dim, self.extra_words, self.param_dtype
      shape, axes = (D, self.vocab_size - E), ('embed', 'vocab')
      self.head_kernel = param(self, 'head', kernel_init(), shape, axes, dtype)
      if E:
        axes = ('embed', None)
        self.extra_head = param(self, 'extra_head', kernel_init(), (D, E), axes, dtype)

  def __call__(
    self,
    batch: PackedBatch,
    *,
    train: bool = False,
    ready: Mapping[str, jax.Array] = MappingProxyType({}),
    before: Before | None = None,
  ) -> jax.Array:
    """Hidden states after the final norm, f[B, T, D].

    Args:
      ready: by kind, what media slots take as it is, f[B, P, D]; not of `media`.
      before: what is put between the layers, see `nn.transformer.Before`.

    Raises:
      ValueError: media that are not the model's.
    """
    x = self.drop(self.embed(batch, ready), deterministic=not train)
    tags = self.attention_tags(batch)['self']
    hidden, _ = self.transformer(
      x, batch.stream.positions, *tags, train=train, before=before
    )
    return hidden

  def extend(
    self,
    batch: PackedBatch,
    cache: Cache,
    slot: jax.Array | int,
    before: Before | None = None,
    ready: Mapping[str, jax.Array] = MappingProxyType({}),
  ) -> tuple[jax.Array, Cache]:
    """Runs new slots against the cache: f[B, T, D] and the cache with them written.

    Args:
      batch: the next T slots of every row (all of an image's, or none).
      cache: of S >= slot + T slots, from `empty_cache`.
      slot: where the new slots are written.
      before, ready: as in `__call__`.
    """
    s = batch.stream
    tags = write(cache.tags, s.key_tags, slot)
    hidden, layers = self.transformer(
      self.embed(batch, ready),
      s.positions,
      s.query_tags,
      tags,
      cache.layers,
      slot,
      before=before,
    )
    return hidden, Cache(tags, layers)

  def head(self) -> Head:
    """What turns hidden states into logits."""
    if self.tie_embeddings:
      return self.embed.head(self.logits_soft_cap)
    kernels, axes = (self.head_kernel,), (('embed', 'vocab'),)
    if self.extra_words:
      kernels, axes = (*kernels, self.extra_head), (*axes, ('embed', None))
    return Head(kernels, axes, self.logits_soft_cap)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """f[..., D] -> f32[..., V]."""
    return self.head().logits(hidden)

  def attention_tags(self, batch: PackedBatch) -> dict[str, AttentionTags]:
    """By name of an attention, its tags; see `batch.AttentionTags`."""
    return {'self': AttentionTags(batch.stream.query_tags, batch.stream.key_tags)}

  def slots(self, item: Item) -> tuple[int, int, int]:
    """The grid of stream slots an item takes: one per patch."""
    return item.grid

  def empty_cache(self, rows: int, slots: int) -> Cache:
    """A cache for `extend`; a plain function of the fields."""
    return empty_cache(
      rows,
      slots,
      self.num_layers,
      self.num_kv_heads,
      self.head_dim,
      self.dtype,
      self.scan,
    )

  def unscanned(self, params: dict) -> tuple['Unified', dict]:
    """The same model with layers one by one, and its parameters."""
    if not self.scan:
      return self, params
    params = {**params, 'transformer': unstack(params['transformer'], self.num_layers)}
    return self.clone(scan=False), params
