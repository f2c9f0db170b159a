"""Flamingo: a language model that looks at media in between its layers (2204.14198).

  patches --encoder--> features --Resampler--> R latents per item ---.
                                                                      v
  tokens --lookup--> [gated cross-attention, k layers] x L/k --> hidden --> logits

The stream holds the text and one marker per item, where the item stands; a token
looks at the latest item at or before it, or at all. The language model is any
`Unified` under `lm/`, so a trained one goes in as it is; so does the encoder under
`vision/`. While the gates are 0, as they begin, the outputs are the language
model's own, bit by bit.

Trained as in the paper, vision and language stay what they are:

  config.optim.freeze = FROZEN
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.batch import AttentionTags, Bank, Item, KeyTags, PackedBatch, Stream
from mmjax.models.unified import Unified
from mmjax.names import closest
from mmjax.nn import cross_attention
from mmjax.nn.cache import KV, Cache, join
from mmjax.nn.features import bank_of
from mmjax.nn.gated_xattn import GATES, GatedCrossAttention, latent_tags, look_at
from mmjax.nn.markers import item_tags, words
from mmjax.nn.remat import remat
from mmjax.nn.resampler import Resampler
from mmjax.nn.transformer import Before
from mmjax.ops.vocabulary import Head
from mmjax.sharding import constrain

# What the paper leaves as it was trained before: patterns for `optim.freeze`.
FROZEN = ('vision/*', 'lm/*')


class MediaCache(NamedTuple):
  """The language model's cache, and what it looks at.

  media: the latents' keys and values, stacked f[G, B, N, I * R, H] or one `KV` per
    cross-attention; items: tags i32[B, I]. Both None until there is a prompt.
  """

  text: Cache
  media: KV | tuple[KV, ...] | None = None
  items: KeyTags | None = None


class Flamingo(nn.Module):
  """A language model with gated cross-attention to the latents of media.

  Fields:
    lm: the language model; scan, remat, chunk, dtype and param_dtype of what stands
      between its layers are its own.
    vision: an encoder, see `nn.features`.
    resampler: features to latents.
    media: ((kind, channels),), one kind.
    marker: the token that the language model reads at an item's slot.
    cross_every: k, layers from one cross-attention to the next: a share of 1/k of the
      layers has one before it.
    cross_heads, cross_head_dim, cross_mlp_dim: default: N and H of `lm`, 4 D.
    cross_norm, cross_activation, cross_gated, cross_qk_norm: see
      `nn.cross_attention.Config`.
    gate: 'tanh' or 'sigmoid'; gate_init, gate_vector: see `nn.gated_xattn`.
    latest: a token looks at the latest item; else at all earlier ones.
    latents_seen: it looks at the first so many of an item's R latents; None = all.
  """

  lm: Unified
  vision: nn.Module
  resampler: Resampler
  media: tuple[tuple[str, int], ...] = ()
  marker: int = 0
  cross_every: int = 1
  cross_heads: int | None = None
  cross_head_dim: int | None = None
  cross_mlp_dim: int | None = None
  cross_norm: str = 'layer'
  cross_activation: str = 'relu2'
  cross_gated: bool = False
  cross_qk_norm: bool = False
  gate: str = 'tanh'
  gate_init: float = 0.0
  gate_vector: bool = False
  latest: bool = True
  latents_seen: int | None = None

  def __post_init__(self):
    super().__post_init__()
    if len(self.media) != 1:
      raise ValueError(f'flamingo looks at one kind of media, got {self.media}')
    if self.cross_every < 1:
      raise ValueError(f'cross_every={self.cross_every} must be at least 1')
    if not 0 <= self.marker < self.lm.vocab_size:
      raise ValueError(f'marker={self.marker} is not in 0..{self.lm.vocab_size - 1}')
    if self.gate not in GATES:
      raise ValueError(f'unknown gate {self.gate!r}{closest(self.gate, GATES)}')
    R = self.resampler.num_latents
    if self.latents_seen is not None and not 0 < self.latents_seen <= R:
      raise ValueError(f'latents_seen={self.latents_seen} is not in 1..{R}')
    self.resampler.config()
    self._cross_config()

  @property
  def num_cross(self) -> int:
    """How many cross-attentions there are."""
    return -(-self.lm.num_layers // self.cross_every)

  @property
  def reach(self) -> int | tuple[int, int] | None:
    return self.lm.reach

  def setup(self):
    if self.lm.scan:
      stacked = nn.vmap(
        GatedCrossAttention,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=None,
        axis_size=self.num_cross,
        metadata_params={nn.PARTITION_NAME: 'layers'},
      )
      self.cross = stacked(*self._cross_fields())
    else:
      make = functools.partial(GatedCrossAttention, *self._cross_fields())
      self.cross = [make() for _ in range(self.num_cross)]

  def __call__(self, batch: PackedBatch, *, train: bool = False) -> jax.Array:
    """Hidden states after the final norm, f[B, T, D].

    Raises:
      ValueError: media that are not the model's.
    """
    tags = self.attention_tags(batch)['cross']
    latents = self._latents(bank_of(batch, self.media), train)
    if self.is_initializing():
      x = jnp.zeros((*batch.stream.tokens.shape, self.lm.embed_dim), self.lm.dtype)
      for cross in [self.cross] if self.lm.scan else self.cross:
        cross(x, latents, *tags)
      return self.lm(words(batch, self.marker), train=train)
    before = self._before(tags, self._parts(None), latents)
    return self.lm(words(batch, self.marker), train=train, before=before)

  def extend(
    self, batch: PackedBatch, cache: MediaCache, slot: jax.Array | int
  ) -> tuple[jax.Array, MediaCache]:
    """Runs new slots against the cache: f[B, T, D] and the cache with them written.

    Args:
      batch: the next T slots of every row, with a bank of the items that stand in them;
        without one (`{}`) if none do. They are looked at beside those of earlier slots.
      cache: of S >= slot + T slots, from `empty_cache`.
      slot: where the new slots are written.
    """
    media, items = cache.media, cache.items
    if media is None or batch.bank:
      bank = bank_of(batch, self.media)
      new = item_tags(batch.stream, bank, self.media[0][0])
      new = self._keys(self._latents(bank, False)), new
      # Slots of the items are the last axis but one of keys, and the last of tags.
      media = new[0] if media is None else join(media, new[0], -2)
      items = new[1] if items is None else join(items, new[1], -1)
    tags = self._cross_tags(batch.stream, items)
    before = self._before(tags, self._parts(media))
    hidden, text = self.lm.extend(words(batch, self.marker), cache.text, slot, before)
    return hidden, MediaCache(text, media, items)

  def head(self) -> Head:
    """What turns hidden states into logits."""
    return self.lm.head()

  def logits(self, hidden: jax.Array) -> jax.Array:
    """f[..., D] -> f32[..., V]."""
    return self.lm.logits(hidden)

  def attention_tags(self, batch: PackedBatch) -> dict[str, AttentionTags]:
    """By name of an attention, its tags; 'cross' is to latents: `batch.AttentionTags`."""
    bank = bank_of(batch, self.media)
    items = item_tags(batch.stream, bank, self.media[0][0])
    cross = self._cross_tags(batch.stream, items)
    return {**self.lm.attention_tags(batch), 'cross': cross}

  def slots(self, item: Item) -> tuple[int, int, int]:
    """The grid of stream slots an item takes: its marker.

    Raises:
      ValueError: the encoder can't take such an item.
    """
    self.vision.grid(item)
    return (1, 1, 1)

  def empty_cache(self, rows: int, slots: int) -> MediaCache:
    """A cache for `extend`; a plain function of the fields."""
    return MediaCache(self.lm.empty_cache(rows, slots))

  def unscanned(self, params: dict) -> tuple['Flamingo', dict]:
    """The same model with layers one by one, and its parameters."""
    if not self.lm.scan:
      return self, params
    params = dict(params)
    lm, params['lm'] = self.lm.unscanned(params['lm'])
    stacked = params.pop('cross')
    for i in range(self.num_cross):
      params[f'cross_{i}'] = jax.tree.map(lambda x, i=i: x[i], stacked)
    return self.clone(lm=lm), params

  @property
  def _num_seen(self) -> int:
    """Latents of an item that are looked at."""
    return self.latents_seen or self.resampler.num_latents

  def _cross_fields(self):
    return self._cross_config(), self.gate, self.gate_init, self.gate_vector

  def _cross_config(self) -> cross_attention.Config:
    lm = self.lm
    return cross_attention.Config(
      embed_dim=lm.embed_dim,
      media_dim=self.resampler.embed_dim,
      num_heads=self.cross_heads or lm.num_heads,
      head_dim=self.cross_head_dim or lm.head_dim,
      mlp_dim=self.cross_mlp_dim or 4 * lm.embed_dim,
      activation=self.cross_activation,
      gated=self.cross_gated,
      norm=self.cross_norm,
      qk_norm=self.cross_qk_norm,
      chunk=lm.chunk,
      attention=lm.attention,
      norm_eps=lm.norm_eps,
      dtype=lm.dtype,
      param_dtype=lm.param_dtype,
    )

  def _latents(self, bank: Bank, train: bool) -> jax.Array:
    """f[B, I * R, D of the resampler], R = those that are looked at."""
    features = self.vision(bank, train=train)
    times = features.positions[..., 0] if self.resampler.num_frames else None
    num_items = bank.item_order.shape[1]
    x = self.resampler(features.values, features.items, num_items, times)
    if self.latents_seen is None:
      return x
    B, _, D = x.shape
    x = x.reshape(B, num_items, -1, D)[:, :, : self.latents_seen]
    return constrain(x.reshape(B, -1, D), 'batch', 'seq', 'act_embed')

  def _parts(self, media: Any) -> Any:
    """(parameters, keys and values) for each cross-attention; see `Before.parts`."""
    if self.lm.scan:
      return self.cross.variables['params'], media
    media = media or (None,) * len(self.cross)
    return tuple((c.variables['params'], kv) for c, kv in zip(self.cross, media))

  def _block(self) -> GatedCrossAttention:
    return GatedCrossAttention(*self._cross_fields(), parent=None)

  def _keys(self, latents: jax.Array) -> KV | tuple[KV, ...]:
    if not self.lm.scan:
      return tuple(cross.keys(latents) for cross in self.cross)
    block = self._block()
    return jax.vmap(lambda p: block.apply({'params': p}, latents, method='keys'))(
      self.cross.variables['params']
    )

  def _cross_tags(self, stream: Stream, items: KeyTags) -> AttentionTags:
    query_tags = look_at(stream.query_tags, items, self.latest)
    return AttentionTags(query_tags, latent_tags(items, self._num_seen))

  def _before(self, tags, parts, latents=None) -> Before:
    block = self._block()

    def run(part, x):
      params, kv = part
      media = latents if kv is None else kv
      return block.apply({'params': params}, x, media, *tags)

    run = remat(run, self.lm.remat, prevent_cse=not self.lm.scan)
    return Before(self.cross_every, run, parts)
