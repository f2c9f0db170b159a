"""Flamingo: a language model that looks at media in between its layers (2204.14198).

  patches --ViT--> features --Resampler--> R latents per item ---.
                                                                 v
  tokens --lookup--> [gated cross-attention, k layers] x L/k --> hidden --> logits

The stream holds the text and one marker per item, where the item stands; a token
looks at the latest item at or before it, or at all. The language model is a `Unified`
under `lm/`, with the same tree of parameters, so a trained one goes in as it is.
While the gates are 0, as they begin, the outputs are its own, bit by bit.

Trained as in the paper, vision and language stay what they are:

  config.optim.freeze = FROZEN
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.batch import FOREVER, PLACEHOLDER, Bank, Item, KeyTags, PackedBatch, Stream
from mmjax.models.unified import Unified
from mmjax.names import closest
from mmjax.nn import cross_attention
from mmjax.nn.cache import KV, Cache
from mmjax.nn.gated_xattn import GATES, GatedCrossAttention, latent_tags, look_at
from mmjax.nn.resampler import Resampler
from mmjax.nn.transformer import REMAT, Before
from mmjax.nn.vit import Vit

# What the paper leaves as it was trained before: patterns for `optim.freeze`.
FROZEN = ('vision/*', 'lm/*')


class MediaCache(NamedTuple):
  """The language model's cache, and what it looks at.

  media: the latents' keys and values, stacked f[G, B, I * R, N, H] or one `KV` per
    cross-attention; items: tags i32[B, I]. Both None until there is a prompt.
  """

  text: Cache
  media: KV | tuple[KV, ...] | None = None
  items: KeyTags | None = None


class Flamingo(Unified):
  """A language model with gated cross-attention to the latents of media.

  Fields: those of `Unified` are the language model's; `media` is of one kind.
    marker: the token that the language model reads at an item's slot.
    cross_every: k, layers from one cross-attention to the next; divides the layers.
    cross_heads, cross_head_dim, cross_mlp_dim: default: num_heads, head_dim, 4 D.
    gate: 'tanh' or 'sigmoid'; gate_init: see `nn.gated_xattn`.
    latest: a token looks at the latest item; else at all earlier ones.
    num_latents, num_frames: see `nn.resampler.Resampler`.
    resampler_dim, resampler_layers, resampler_heads, resampler_head_dim,
      resampler_mlp_dim: of the resampler; default of the last two: dim / heads, 4 dim.
    vision_dim, vision_layers, vision_heads, vision_mlp_dim, vision_positions,
      vision_grid: of the encoder, `nn.vit.Vit`.
    remat, chunk, dtype, param_dtype: of all parts; reach and scan: of the language
      model (and scan of what stands between its layers).
  """

  marker: int = 0
  cross_every: int = 1
  cross_heads: int | None = None
  cross_head_dim: int | None = None
  cross_mlp_dim: int | None = None
  gate: str = 'tanh'
  gate_init: float = 0.0
  latest: bool = True
  num_latents: int = 64
  num_frames: int = 0
  resampler_dim: int = 128
  resampler_layers: int = 6
  resampler_heads: int = 4
  resampler_head_dim: int | None = None
  resampler_mlp_dim: int | None = None
  vision_dim: int = 128
  vision_layers: int = 4
  vision_heads: int = 4
  vision_mlp_dim: int = 512
  vision_positions: str = 'learned'
  vision_grid: tuple[int, int] = (16, 16)

  def __post_init__(self):
    super().__post_init__()
    if len(self.media) != 1:
      raise ValueError(f'flamingo looks at one kind of media, got {self.media}')
    if self.cross_every < 1 or self.num_layers % self.cross_every:
      raise ValueError(
        f'cross_every={self.cross_every} does not divide num_layers={self.num_layers}'
      )
    if not 0 <= self.marker < self.vocab_size:
      raise ValueError(f'marker={self.marker} is not in 0..{self.vocab_size - 1}')
    if self.gate not in GATES:
      raise ValueError(f'unknown gate {self.gate!r}{closest(self.gate, GATES)}')
    if not self.resampler_head_dim and self.resampler_dim % self.resampler_heads:
      raise ValueError(
        f'resampler_dim={self.resampler_dim} does not divide over'
        f' resampler_heads={self.resampler_heads}'
      )
    Vit(**self._vision_fields(), parent=None).config()

  def setup(self):
    self.vision = Vit(**self._vision_fields())
    D = self.resampler_dim
    self.resampler = Resampler(
      cross_attention.Config(
        embed_dim=D,
        media_dim=D,
        num_heads=self.resampler_heads,
        head_dim=self.resampler_head_dim or D // self.resampler_heads,
        mlp_dim=self.resampler_mlp_dim or 4 * D,
        out_scale=1 / (2 * self.resampler_layers),
        **self._shared(),
      ),
      self.resampler_layers,
      self.num_latents,
      self.num_frames,
      self.remat,
    )
    if self.scan:
      stacked = nn.vmap(
        GatedCrossAttention,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=None,
        axis_size=self.num_layers // self.cross_every,
        metadata_params={nn.PARTITION_NAME: 'layers'},
      )
      self.cross = stacked(*self._cross_fields())
    else:
      count = self.num_layers // self.cross_every
      self.cross = [GatedCrossAttention(*self._cross_fields()) for _ in range(count)]
    self.lm = Unified(**self._lm_fields())

  def __call__(self, batch: PackedBatch, *, train: bool = False) -> jax.Array:
    """Hidden states after the final norm, f[B, T, D].

    Raises:
      ValueError: media that are not the model's.
    """
    bank = self._bank(batch)
    items = self._items(batch.stream, bank)
    latents = self._latents(bank, train)
    if self.is_initializing():
      query_tags = look_at(batch.stream.query_tags, items, self.latest)
      args = (latents, query_tags, latent_tags(items, self.num_latents))
      x = jnp.zeros((*batch.stream.tokens.shape, self.embed_dim), self.dtype)
      for cross in [self.cross] if self.scan else self.cross:
        cross(x, *args)
      return self.lm(self._words(batch), train=train)
    parts = self._parts(None)
    before = self._before(batch.stream, items, parts, latents)
    return self.lm(self._words(batch), train=train, before=before)

  def extend(
    self, batch: PackedBatch, cache: MediaCache, slot: jax.Array | int
  ) -> tuple[jax.Array, MediaCache]:
    """Runs new slots against the cache: f[B, T, D] and the cache with them written.

    Args:
      batch: the next T slots of every row. If it has a bank, that is what is looked
        at from now on: it holds the items of all slots so far, and maybe of later ones.
      cache: of S >= slot + T slots, from `empty_cache`.
      slot: where the new slots are written.
    """
    media, items = cache.media, cache.items
    if media is None or batch.bank:
      bank = self._bank(batch)
      items = self._items(batch.stream, bank, items)
      media = self._keys(self._latents(bank, False))
    before = self._before(batch.stream, items, self._parts(media))
    hidden, text = self.lm.extend(self._words(batch), cache.text, slot, before)
    return hidden, MediaCache(text, media, items)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """f[..., D] -> f32[..., V]."""
    return self.lm.logits(hidden)

  def slots(self, item: Item) -> tuple[int, int, int]:
    """The grid of stream slots an item takes: its marker."""
    del item
    return (1, 1, 1)

  def empty_cache(self, rows: int, slots: int) -> MediaCache:
    """A cache for `extend`; a plain function of the fields."""
    return MediaCache(super().empty_cache(rows, slots))

  def unscanned(self, params: dict) -> tuple['Flamingo', dict]:
    """The same model with layers one by one, and its parameters."""
    if not self.scan:
      return self, params
    params = dict(params)
    _, params['lm'] = Unified(**self._lm_fields(), parent=None).unscanned(params['lm'])
    stacked = params.pop('cross')
    for i in range(self.num_layers // self.cross_every):
      params[f'cross_{i}'] = jax.tree.map(lambda x, i=i: x[i], stacked)
    return self.clone(scan=False), params

  def _shared(self) -> dict[str, Any]:
    names = ('chunk', 'norm_eps', 'dtype', 'param_dtype')
    return {name: getattr(self, name) for name in names}

  def _lm_fields(self) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(Unified)} - {'parent', 'name', 'media'}
    return {name: getattr(self, name) for name in names}

  def _vision_fields(self) -> dict[str, Any]:
    return dict(
      channels=self.media[0][1],
      embed_dim=self.vision_dim,
      num_layers=self.vision_layers,
      num_heads=self.vision_heads,
      mlp_dim=self.vision_mlp_dim,
      positions=self.vision_positions,
      grid=self.vision_grid,
      remat=self.remat,
      **self._shared(),
    )

  def _cross_fields(self) -> tuple[cross_attention.Config, str, float]:
    config = cross_attention.Config(
      embed_dim=self.embed_dim,
      media_dim=self.resampler_dim,
      num_heads=self.cross_heads or self.num_heads,
      head_dim=self.cross_head_dim or self.head_dim,
      mlp_dim=self.cross_mlp_dim or 4 * self.embed_dim,
      **self._shared(),
    )
    return config, self.gate, self.gate_init

  def _bank(self, batch: PackedBatch) -> Bank:
    """The bank of the model's kind; one of padding if the batch has none."""
    [(kind, channels)] = self.media
    for other in batch.bank:
      if other != kind:
        raise ValueError(f'batch has media {other!r}, the model looks at {kind!r}')
    if kind in batch.bank:
      return batch.bank[kind]
    B = len(batch.stream.tokens)
    zeros = jnp.zeros((B, 1), jnp.int32)
    values = jnp.zeros((B, 1, channels), self.dtype)
    return Bank(values, zeros, jnp.zeros((B, 1, 3), jnp.int32), zeros, zeros)

  def _items(self, stream: Stream, bank: Bank, old: KeyTags | None = None) -> KeyTags:
    """Tags of the items; `until` is that of the marker, as far as markers were seen."""
    B, I = bank.item_order.shape
    until = jnp.full((B, I), FOREVER, jnp.int32) if old is None else old.until
    here = stream.tokens == PLACEHOLDER[self.media[0][0]]
    place = jnp.where(here, stream.source, I)  # I is outside, and dropped
    rows = jnp.broadcast_to(jnp.arange(B)[:, None], place.shape)
    until = until.at[rows, place].set(stream.until, mode='drop')
    return KeyTags(jnp.asarray(bank.item_segments), jnp.asarray(bank.item_order), until)

  def _latents(self, bank: Bank, train: bool) -> jax.Array:
    """f[B, I * R, D of the resampler]."""
    features = self.vision(bank, train=train)
    times = bank.positions[..., 0] if self.num_frames else None
    return self.resampler(features, bank.items, bank.item_order.shape[1], times)

  def _words(self, batch: PackedBatch) -> PackedBatch:
    """What the language model reads: text, and its word for an item."""
    s = batch.stream
    tokens = jnp.where(s.tokens < 0, self.marker, s.tokens)
    return PackedBatch(dataclasses.replace(s, tokens=tokens), {})

  def _parts(self, media: Any) -> Any:
    """(parameters, keys and values) for each cross-attention; see `Before.parts`."""
    if self.scan:
      return self.cross.variables['params'], media
    media = media or (None,) * len(self.cross)
    return tuple((c.variables['params'], kv) for c, kv in zip(self.cross, media))

  def _keys(self, latents: jax.Array) -> KV | tuple[KV, ...]:
    if not self.scan:
      return tuple(cross.keys(latents) for cross in self.cross)
    block = GatedCrossAttention(*self._cross_fields(), parent=None)
    return jax.vmap(lambda p: block.apply({'params': p}, latents, method='keys'))(
      self.cross.variables['params']
    )

  def _before(self, stream, items, parts, latents=None) -> Before:
    block = GatedCrossAttention(*self._cross_fields(), parent=None)
    query_tags = look_at(stream.query_tags, items, self.latest)
    key_tags = latent_tags(items, self.num_latents)

    def run(part, x):
      params, kv = part
      media = latents if kv is None else kv
      return block.apply({'params': params}, x, media, query_tags, key_tags)

    if self.remat != 'none':
      run = jax.checkpoint(run, prevent_cse=not self.scan, policy=REMAT[self.remat])
    return Before(self.cross_every, run, parts)
