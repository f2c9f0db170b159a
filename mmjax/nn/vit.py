"""A Vision Transformer over a bank of patches (Dosovitskiy et al., 2010.11929).

Pictures of any size stand end to end in a row (NaViT, 2307.06304), and patches see
those of their own picture: the item is the segment. Of a video every frame is seen
alone, since the frame's time is the rank:

  patches   a a a a b b .  |  A B C      A, B, C: class tokens, if pooling is by them
  segment   1 1 1 1 2 2 0  |  1 2 3
  order     0 0 1 1 0 0 0  |  0 0 0      item 1 is a video of two frames

So a picture gives what it would give alone. Layers: pre-norm, layer norm, plain MLP,
biases; see `mmjax.nn.transformer`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.batch import Bank, Item, KeyTags, QueryTags
from mmjax.names import closest
from mmjax.nn import cross_attention
from mmjax.nn.embed import MediaProjection
from mmjax.nn.features import Features
from mmjax.nn.transformer import Config, Mlp, Transformer
from mmjax.ops.grid import item_sizes, read_table, waves
from mmjax.shape import check
from mmjax.sharding import constrain, param

POSITIONS = ('learned', 'sincos', 'rotary')
POOLS = ('none', 'class', 'mean', 'map')


class Vit(nn.Module):
  """Patches to features of every patch, and maybe of every item.

  Fields:
    channels: C, values of a patch.
    embed_dim, num_layers, num_heads, mlp_dim: D, L, N, F; head_dim is D / N.
    positions: 'learned', a table of `position_grid` entries that is read in between for
      other sizes; 'sincos', fixed waves; 'rotary', half of each head turned by the
      row, half by the column (`rope_base`).
    pool: 'none'; or besides one vector per item: 'class', a token that the patches
      (of the first frame) and it see; 'mean'; 'map', a learned query that looks at
      all patches, and an MLP (Zhai et al., 2106.04560, section 3.4).
    activation, norm_eps, remat, scan, chunk, reach, dtype, param_dtype: see
      `nn.transformer`. `reach` may be the patches of the largest item, less 1, unless
      pool is 'class'.
  """

  channels: int
  embed_dim: int = 128
  num_layers: int = 4
  num_heads: int = 4
  mlp_dim: int = 512
  positions: str = 'learned'
  position_grid: tuple[int, int] = (16, 16)
  pool: str = 'none'
  activation: str = 'gelu'
  remat: str = 'none'
  scan: bool = True
  chunk: int = 512
  reach: int | tuple[int, int] | None = None
  rope_base: float = 100.0
  norm_eps: float = 1e-6
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'

  def config(self) -> Config:
    """The Transformer's part of the fields.

    Raises:
      ValueError: an unknown choice, or sizes that don't divide.
    """
    for field, choices in (('positions', POSITIONS), ('pool', POOLS)):
      value = getattr(self, field)
      if value not in choices:
        raise ValueError(f'ViT: unknown {field} {value!r}{closest(value, choices)}')
    D, N = self.embed_dim, self.num_heads
    if D % N:
      raise ValueError(f'ViT: embed_dim={D} does not divide over num_heads={N}')
    if self.pool == 'class' and self.reach is not None:
      raise ValueError("ViT: pool='class' needs reach=None; class tokens stand far off")
    half = D // N // 2
    return Config(
      embed_dim=D,
      num_layers=self.num_layers,
      num_heads=N,
      num_kv_heads=N,
      head_dim=D // N,
      mlp_dim=self.mlp_dim,
      activation=self.activation,
      gated=False,
      norm='layer',
      bias='all',
      remat=self.remat,
      scan=self.scan,
      chunk=self.chunk,
      reach=self.reach,
      rotary=self.positions == 'rotary',
      rope_base=self.rope_base,
      rope_sections=(0, half // 2, half - half // 2),
      norm_eps=self.norm_eps,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )

  @property
  def width(self) -> int:
    """D, of the tokens."""
    return self.embed_dim

  def grid(self, item: Item) -> tuple[int, int, int]:
    """The grid of tokens of an item: its patches."""
    return item.grid

  @nn.compact
  def __call__(self, bank: Bank, *, train: bool = False) -> Features:
    """Encodes a bank.

    Args:
      bank: values u8 or f[B, P, C], I items per row.

    Returns:
      Tokens f[B, P, D], one for each patch, and with pooling f[B, I, D]; what is
      padding is finite, and of no meaning.

    Raises:
      ValueError: shapes or channels that don't fit, or fields; see `config`.
    """
    sizes = check('B P C', bank.values, 'B P', bank.items, 'B I', bank.item_segments)
    B, I, c = sizes['B'], sizes['I'], self.config()
    if sizes['C'] != self.channels:
      raise ValueError(f'patches have {sizes["C"]} channels, ViT takes {self.channels}')
    D, normal = self.embed_dim, nn.initializers.normal(0.02)
    embed = MediaProjection(self.channels, D, self.dtype, self.param_dtype, name='patch')
    x = embed(bank.values)
    items, positions = jnp.asarray(bank.items), jnp.asarray(bank.positions)
    if self.positions == 'learned':
      shape, axes = (*self.position_grid, D), ('patch', None, 'embed')
      table = param(self, 'position', normal, shape, axes, self.param_dtype)
      spots = read_table(table, positions, item_sizes(positions, items, I))
      x = x + spots.astype(x.dtype)
    elif self.positions == 'sincos':
      x = x + waves(positions, D).astype(x.dtype)
    each = jnp.broadcast_to(jnp.arange(1, I + 1, dtype=jnp.int32), (B, I))
    segments = items
    if self.pool == 'class':
      token = param(self, 'class', normal, (D,), ('embed',), self.param_dtype)
      tokens = jnp.broadcast_to(token.astype(x.dtype), (B, I, D))
      x = jnp.concatenate([x, tokens], 1)
      segments = jnp.concatenate([items, each], 1)
      positions = jnp.pad(positions, ((0, 0), (0, I), (0, 0)))
    x = constrain(x, 'batch', 'seq', 'act_embed')
    frames = positions[..., 0]
    query_tags = QueryTags(segments, frames, frames)
    key_tags = KeyTags(segments, frames)
    x, _ = Transformer(c, name='transformer')(
      x, positions, query_tags, key_tags, train=train
    )
    pooled = None
    if self.pool == 'class':
      x, pooled = x[:, :-I], x[:, -I:]
    elif self.pool == 'mean':
      mine = (items[:, :, None] == each[:, None]).astype(jnp.float32)
      total = jnp.einsum('BPI,BPD->BID', mine, x.astype(jnp.float32))
      pooled = (total / jnp.maximum(jnp.sum(mine, 1)[..., None], 1)).astype(x.dtype)
    elif self.pool == 'map':
      pooled = MapHead(c, name='pool')(x, items, each)
    return Features(x, items, jnp.asarray(bank.positions), pooled)


class MapHead(nn.Module):
  """Attention pooling: a learned query per item, then an MLP with a residual."""

  config: Config

  @nn.compact
  def __call__(self, x: jax.Array, items: jax.Array, each: jax.Array) -> jax.Array:
    """x f[B, P, D], items i32[B, P], each i32[B, I] = 1, 2, ... -> f[B, I, D]."""
    c = self.config
    cross = cross_attention.Config(
      c.embed_dim, c.embed_dim, c.num_heads, c.head_dim, c.mlp_dim, chunk=c.chunk,
      dtype=c.dtype, param_dtype=c.param_dtype,
    )  # fmt: skip
    D = c.embed_dim
    init = nn.initializers.normal(1.0)
    query = param(self, 'query', init, (D,), ('embed',), c.param_dtype)
    query = jnp.broadcast_to(query.astype(x.dtype), (*each.shape, D))
    zeros = jnp.zeros_like
    attention = cross_attention.CrossAttention(cross, name='attention')
    query_tags = QueryTags(each, zeros(each), zeros(each))
    key_tags = KeyTags(items, zeros(items))
    y = attention(query, attention.keys(x), query_tags, key_tags)
    return y + Mlp(c, name='mlp')(c.make_norm('norm')(y))
