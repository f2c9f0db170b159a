"""Perceiver Resampler: any number of media tokens to R latents per item.

(Flamingo, 2204.14198, figure 5; Perceiver, 2103.03206.) Every item of a row has its
own copy of R learned latents, which look at the item's tokens and at each other:

  media    a a a a a b b .      tokens of items a and b, padding
  latents  a a b b . .          R = 2, I = 3 (the third item is absent)

  x = x + Attention(q = norm(x), kv = [norm(media); norm(x)])      x: latents
  x = x + Mlp(norm(x))

The item is the segment of both sides, so items packed in a row give what each
would give alone. Shapes are static: [B, I * R, D], item after item.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.batch import KeyTags, QueryTags
from mmjax.nn.cross_attention import Config, CrossAttention
from mmjax.nn.dense import kernel_init
from mmjax.nn.remat import remat
from mmjax.nn.transformer import Mlp
from mmjax.ops.linear import linear
from mmjax.shape import check
from mmjax.sharding import constrain, param


class Layer(nn.Module):
  """One layer. (latents, media, tags) -> (latents, None), as `nn.scan` wants it."""

  config: Config

  @nn.compact
  def __call__(self, x, media, query_tags, key_tags):
    c = self.config
    norm = c.make_norm
    y = norm('latent_norm')(x)
    attention = CrossAttention(c, name='attention')
    seen = jnp.concatenate([norm('media_norm')(media), y], 1)
    x = x + attention(y, attention.keys(seen), query_tags, key_tags)
    x = constrain(x, 'batch', 'seq', 'act_embed')
    x = x + Mlp(c, name='mlp')(norm('mlp_norm')(x))
    return constrain(x, 'batch', 'seq', 'act_embed'), None


class Resampler(nn.Module):
  """A bank of media tokens to R latents per item.

  Fields:
    embed_dim, num_layers, num_heads, num_latents: D, L, N, R.
    head_dim, mlp_dim: H, F; by default D / N and 4 D.
    num_frames: length of the table of time embeddings; 0 = none. Later frames take
      the last one.
    activation, gated, norm, qk_norm: see `nn.cross_attention.Config`.
    remat: what a layer keeps for its backward pass, see `nn.remat`.
    chunk, attention, norm_eps, dtype, param_dtype: as everywhere.
  """

  embed_dim: int = 128
  num_layers: int = 6
  num_heads: int = 4
  head_dim: int | None = None
  mlp_dim: int | None = None
  num_latents: int = 64
  num_frames: int = 0
  activation: str = 'relu2'
  gated: bool = False
  norm: str = 'layer'
  qk_norm: bool = False
  remat: str = 'none'
  chunk: int = 512
  attention: str = 'auto'
  norm_eps: float = 1e-6
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'

  def config(self) -> Config:
    """The layers' part of the fields.

    Raises:
      ValueError: an unknown choice, or a width that doesn't divide over the heads.
    """
    D, N = self.embed_dim, self.num_heads
    if not self.head_dim and D % N:
      raise ValueError(f'resampler: embed_dim={D} does not divide over num_heads={N}')
    return Config(
      embed_dim=D,
      media_dim=D,
      num_heads=N,
      head_dim=self.head_dim or D // N,
      mlp_dim=self.mlp_dim or 4 * D,
      activation=self.activation,
      gated=self.gated,
      norm=self.norm,
      qk_norm=self.qk_norm,
      out_scale=1 / (2 * self.num_layers),
      chunk=self.chunk,
      attention=self.attention,
      norm_eps=self.norm_eps,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )

  @nn.compact
  def __call__(
    self,
    media: jax.Array,
    items: jax.Array,
    num_items: int,
    times: jax.Array | None = None,
  ) -> jax.Array:
    """Resamples all items of every row.

    Args:
      media: f[B, P, C]; if C is not D, they go through a linear projection first.
      items: i32[B, P] which item of the row owns the token, from 1; 0 = padding.
      num_items: I, static.
      times: i32[B, P] the token's frame; needed if there are time embeddings.

    Returns:
      f[B, I * R, D] after a final norm; latents of absent items are finite, and of
      no meaning.

    Raises:
      ValueError: shapes that don't fit, or times missing; and see `config`.
    """
    c, R = self.config(), self.num_latents
    C = check('B P C', media, 'B P', items)['C']
    D, B = c.embed_dim, len(items)
    media = media.astype(c.dtype)
    if C != D:
      axes = (None, 'embed')
      kernel = param(self, 'input', kernel_init(), (C, D), axes, c.param_dtype)
      media = linear(media, kernel)
    normal = nn.initializers.normal(0.02)
    if self.num_frames:
      if times is None:
        raise ValueError('resampler: time embeddings need the frames of the tokens')
      shape, axes = (self.num_frames, D), (None, 'embed')
      table = param(self, 'time', normal, shape, axes, c.param_dtype)
      table = constrain(table.astype(c.dtype), None, None)
      media = media + jnp.take(table, jnp.clip(times, 0, self.num_frames - 1), axis=0)
    axes = ('latents', 'embed')
    latents = param(
      self, 'latents', nn.initializers.normal(1.0), (R, D), axes, c.param_dtype
    )
    x = jnp.broadcast_to(latents.astype(c.dtype), (B, num_items, R, D))
    x = constrain(x.reshape(B, num_items * R, D), 'batch', 'seq', 'act_embed')

    owner = jnp.repeat(jnp.arange(1, num_items + 1, dtype=jnp.int32), R)
    owner = jnp.broadcast_to(owner, (B, num_items * R))
    zeros = jnp.zeros_like(owner)
    query_tags = QueryTags(owner, zeros, zeros)
    segments = jnp.concatenate([jnp.asarray(items), owner], 1)
    key_tags = KeyTags(segments, jnp.zeros_like(segments))

    layer = remat(Layer, self.remat, prevent_cse=False)
    layer = nn.scan(
      layer,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      length=self.num_layers,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    x, _ = layer(c, name='layers')(x, media, query_tags, key_tags)
    return c.make_norm('norm')(x)
