"""Perceiver Resampler: any number of media tokens to R latents per item.

(Flamingo, 2204.14198, figure 5; Perceiver, 2103.03206.) Every item of a row has its
own copy of R learned latents, which look at the item's tokens and at each other:

  media    a a a a a b b .      tokens of items a and b, padding
  latents  a a b b . .          R = 2, I = 3 (the third item is absent)

  x = x + Attention(q = norm(x), kv = [norm(media); norm(x)])      x: latents
  x = x + FeedForward(norm(x))

The item is the segment of both sides, so items packed in a row give what each
would give alone. Shapes are static: [B, I * R, D], item after item.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.batch import KeyTags, QueryTags
from mmjax.nn.cross_attention import Config, CrossAttention, FeedForward
from mmjax.nn.transformer import REMAT, kernel_init
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
    x = x + FeedForward(c, name='mlp')(norm('mlp_norm')(x))
    return constrain(x, 'batch', 'seq', 'act_embed'), None


class Resampler(nn.Module):
  """A bank of media tokens to R latents per item.

  Fields:
    config: with media_dim = embed_dim = D.
    num_layers, num_latents: L, R.
    num_frames: length of the table of time embeddings; 0 = none. Later frames take
      the last one.
    remat: what a layer keeps for its backward pass, see `nn.transformer.REMAT`.
  """

  config: Config
  num_layers: int = 6
  num_latents: int = 64
  num_frames: int = 0
  remat: str = 'none'

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
      ValueError: shapes that don't fit, media_dim other than embed_dim, or times
        missing.
    """
    c, R = self.config, self.num_latents
    C = check('B P C', media, 'B P', items)['C']
    D, B = c.embed_dim, len(items)
    if c.media_dim != D:
      raise ValueError(f'resampler: media_dim={c.media_dim} is not embed_dim={D}')
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
      table = table.astype(c.dtype)
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

    layer = Layer
    if self.remat != 'none':
      layer = nn.remat(layer, prevent_cse=False, policy=REMAT[self.remat])
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
