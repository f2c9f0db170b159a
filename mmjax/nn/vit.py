"""A Vision Transformer over a bank of patches (Dosovitskiy et al., 2010.11929).

Pictures of any size stand end to end in a row (NaViT, 2307.06304), and patches see
those of their own picture: the item is the segment. Of a video every frame is seen
alone, since the frame's time is the rank:

  patches   a a a a b b .  |  A B C      A, B, C: class tokens, if there are any
  segment   1 1 1 1 2 2 0  |  1 2 3
  order     0 0 1 1 0 0 0  |  0 0 0      item 1 is a video of two frames

So a picture gives what it would give alone. Layers: pre-norm, layer norm, plain MLP,
biases; see `mmjax.nn.transformer`. Fields make of it the towers there are:

            class_token  embedding_norm  patch_bias  activation  pool
  ViT       yes          no              yes         gelu        class
  CLIP      yes          yes             no          quick_gelu  class
  SigLIP    no           no              yes         gelu_tanh   map
  in LLaVA  as CLIP, its last layer and final_norm left out      none
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.batch import Bank, Item, KeyTags, QueryTags
from mmjax.names import closest
from mmjax.nn import cross_attention
from mmjax.nn.dense import Dense
from mmjax.nn.embed import MediaProjection
from mmjax.nn.features import Features
from mmjax.nn.transformer import Config, Mlp, Transformer, unstack
from mmjax.ops.grid import item_sizes, read_table, waves
from mmjax.shape import check
from mmjax.sharding import constrain, param, parts

POSITIONS = ('learned', 'sincos', 'rotary')
POOLS = ('none', 'class', 'mean', 'map')


class Vit(nn.Module):
  """Patches to features of every patch, and maybe of every item.

  Fields:
    channels: C, values of a patch: rows, columns and colours, in this order.
    embed_dim, num_layers, num_heads, mlp_dim: D, L, N, F; head_dim is D / N.
    positions: 'learned', a table of `position_grid` entries that is read in between for
      other sizes (bilinear, see `ops.grid`); 'sincos', fixed waves; 'rotary', half of
      each head turned by the row, half by the column (`rope_base`).
    pool: 'none'; or besides one vector per item: 'class', the class token; 'mean';
      'map', a learned query that looks at all patches, and an MLP (Zhai et al.,
      2106.04560, section 3.4).
    class_token: a token that the patches (of the first frame) and it see takes part,
      though it isn't pooled. It has its own learned position, the table's first.
    give_class: the class tokens, one per item, are given behind the patches, as IDEFICS
      reads them; needs a class token.
    pooler: tanh(W pooled + b) instead of what is pooled.
    num_classes: of the head, see `logits`; 0 = no head.
    patch_bias, embedding_norm, final_norm: a bias of the patches' projection; a norm
      before the layers; one after them, of all tokens, also of the class token.
    mean, std: by colour; bytes become (x - mean) / std, other values stay as they are.
    activation, norm_eps, remat, scan, chunk, reach, attention, dtype, param_dtype: see
      `nn.transformer`. `reach` may be the patches of the largest item, less 1, unless
      there is a class token.
  """

  channels: int
  embed_dim: int = 128
  num_layers: int = 4
  num_heads: int = 4
  mlp_dim: int = 512
  positions: str = 'learned'
  position_grid: tuple[int, int] = (16, 16)
  pool: str = 'none'
  class_token: bool = False
  give_class: bool = False
  pooler: bool = False
  num_classes: int = 0
  patch_bias: bool = True
  embedding_norm: bool = False
  final_norm: bool = True
  mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
  std: tuple[float, float, float] = (127.5, 127.5, 127.5)
  activation: str = 'gelu'
  remat: str = 'none'
  scan: bool = True
  chunk: int = 512
  reach: int | tuple[int, int] | None = None
  attention: str = 'auto'
  rope_base: float = 100.0
  norm_eps: float = 1e-6
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'

  def config(self) -> Config:
    """The Transformer's part of the fields.

    Raises:
      ValueError: an unknown choice, or fields that don't go together.
    """
    for field, choices in (('positions', POSITIONS), ('pool', POOLS)):
      value = getattr(self, field)
      if value not in choices:
        raise ValueError(f'ViT: unknown {field} {value!r}{closest(value, choices)}')
    D, N = self.embed_dim, self.num_heads
    if D % N:
      raise ValueError(f'ViT: embed_dim={D} does not divide over num_heads={N}')
    if self.has_class_token and self.reach is not None:
      raise ValueError('ViT: a class token needs reach=None; it stands far off')
    if self.pool == 'none' and (self.pooler or self.num_classes):
      raise ValueError("ViT: pooler and num_classes need a pool, not 'none'")
    if self.give_class and not self.has_class_token:
      raise ValueError('ViT: give_class needs class_token')
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
      attention=self.attention,
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

  @property
  def has_class_token(self) -> bool:
    """Whether a class token takes part, pooled or not."""
    return self.class_token or self.pool == 'class'

  def grid(self, item: Item) -> tuple[int, int, int]:
    """The grid of tokens of an item: its patches."""
    return item.grid

  def setup(self):
    c, D, dtype = self.config(), self.embed_dim, self.param_dtype
    normal = nn.initializers.normal(0.02)
    self.patch = MediaProjection(
      self.channels, D, self.dtype, dtype, bias=self.patch_bias
    )
    if self.positions == 'learned':
      rows, columns = self.position_grid
      shape = (self.has_class_token + rows * columns, D)
      self.position = param(self, 'position', normal, shape, ('patch', 'embed'), dtype)
    if self.has_class_token:
      self.class_vector = param(self, 'class', normal, (D,), ('embed',), dtype)
    if self.embedding_norm:
      self.embed_norm = c.make_norm()
    self.transformer = Transformer(c, final_norm=self.final_norm)
    if self.pool == 'map':
      self.map_head = MapHead(c)
    if self.pooler:
      self.pool_dense = Dense(D, param_dtype=dtype)
    if self.num_classes:
      self.head = Dense(self.num_classes, param_dtype=dtype)

  def __call__(self, bank: Bank, *, train: bool = False) -> Features:
    """Encodes a bank.

    Args:
      bank: values u8 or f[B, P, C], I items per row.

    Returns:
      Tokens f[B, P, D], one for each patch (see also `give_class`), and with pooling
      f[B, I, D]; what is padding is finite, and of no meaning.

    Raises:
      ValueError: shapes or channels that don't fit, or fields; see `config`.
    """
    sizes = check('B P C', bank.values, 'B P', bank.items, 'B I', bank.item_segments)
    B, I = sizes['B'], sizes['I']
    if sizes['C'] != self.channels:
      raise ValueError(f'patches have {sizes["C"]} channels, ViT takes {self.channels}')
    items, positions = jnp.asarray(bank.items), jnp.asarray(bank.positions)
    each = jnp.broadcast_to(jnp.arange(1, I + 1, dtype=jnp.int32), (B, I))
    x, segments = self._embed(bank.values, items, positions, I), items
    if self.has_class_token:
      token = self.class_vector
      if self.positions == 'learned':
        token = token + self.position[0]
      more = -(x.shape[1] + I) % parts('seq')  # slots that nothing sees
      tokens = jnp.broadcast_to(token.astype(x.dtype), (B, I + more, self.embed_dim))
      x = jnp.concatenate([x, tokens], 1)
      segments = jnp.concatenate([items, jnp.pad(each, ((0, 0), (0, more)))], 1)
      positions = jnp.pad(positions, ((0, 0), (0, I + more), (0, 0)))
    x = constrain(x, 'batch', 'seq', 'act_embed')
    if self.embedding_norm:
      x = self.embed_norm(x)
    frames = positions[..., 0]
    query_tags, key_tags = QueryTags(segments, frames, frames), KeyTags(segments, frames)
    x, _ = self.transformer(x, positions, query_tags, key_tags, train=train)
    patches = items.shape[1]
    x, token = x[:, :patches], x[:, patches : patches + I]
    pooled = None
    if self.pool == 'class':
      pooled = token
    elif self.pool == 'mean':
      mine = (items[:, :, None] == each[:, None]).astype(jnp.float32)
      total = jnp.einsum('BPI,BPD->BID', mine, x.astype(jnp.float32))
      pooled = (total / jnp.maximum(jnp.sum(mine, 1)[..., None], 1)).astype(x.dtype)
    elif self.pool == 'map':
      pooled = self.map_head(x, items, each)
    if self.pooler:
      pooled = jnp.tanh(self.pool_dense(pooled))
    if self.num_classes and self.is_initializing():
      self.logits(pooled)
    positions = jnp.asarray(bank.positions)
    if self.give_class:
      x = jnp.concatenate([x, token], 1)
      theirs = jnp.where(jnp.asarray(bank.item_segments) > 0, each, 0)
      items = jnp.concatenate([items, theirs], 1)
      positions = jnp.pad(positions, ((0, 0), (0, I), (0, 0)))
    return Features(x, items, positions, pooled)

  def logits(self, pooled: jax.Array) -> jax.Array:
    """Of the classes, f[..., D] -> f[..., num_classes].

    Raises:
      ValueError: the model has no head.
    """
    if not self.num_classes:
      raise ValueError('logits: the ViT was built with num_classes=0')
    return self.head(pooled)

  def unscanned(self, params: dict) -> tuple['Vit', dict]:
    """The same model with layers one by one, and its parameters."""
    if not self.scan:
      return self, params
    params = {**params, 'transformer': unstack(params['transformer'], self.num_layers)}
    return self.clone(scan=False), params

  def _embed(self, values, items, positions, num_items):
    """Patches with their positions, f[B, P, D]."""
    if values.dtype == jnp.uint8:
      if self.channels % 3:
        raise ValueError(f'ViT: bytes have three colours, channels={self.channels}')
      mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
      factor, shift = (
        np.tile(a, self.channels // 3)[None, None] for a in (std, mean / std)
      )
      values = values.astype(jnp.float32) / factor - shift
    x = self.patch(values)
    if self.positions == 'learned':
      # Whole on every device before it is read: what is read is larger.
      table = constrain(self.position, None, None)[int(self.has_class_token) :]
      table = table.reshape(*self.position_grid, self.embed_dim)
      spots = read_table(table, positions, item_sizes(positions, items, num_items))
      x = x + spots.astype(x.dtype)
    elif self.positions == 'sincos':
      x = x + waves(positions, self.embed_dim).astype(x.dtype)
    return x


class MapHead(nn.Module):
  """Attention pooling: a learned query per item, then an MLP with a residual."""

  config: Config

  @nn.compact
  def __call__(self, x: jax.Array, items: jax.Array, each: jax.Array) -> jax.Array:
    """x f[B, P, D], items i32[B, P], each i32[B, I] = 1, 2, ... -> f[B, I, D]."""
    c = self.config
    cross = cross_attention.Config(
      c.embed_dim, c.embed_dim, c.num_heads, c.head_dim, c.mlp_dim, attention_bias=True,
      chunk=c.chunk, attention=c.attention, dtype=c.dtype, param_dtype=c.param_dtype,
    )  # fmt: skip
    D, I = c.embed_dim, each.shape[1]
    each = jnp.pad(each, ((0, 0), (0, -I % parts('seq'))))
    init = nn.initializers.normal(1.0)
    query = param(self, 'query', init, (D,), ('embed',), c.param_dtype)
    query = jnp.broadcast_to(query.astype(x.dtype), (*each.shape, D))
    zeros = jnp.zeros_like
    attention = cross_attention.CrossAttention(cross, name='attention')
    query_tags = QueryTags(each, zeros(each), zeros(each))
    key_tags = KeyTags(items, zeros(items))
    y = attention(query, attention.keys(x), query_tags, key_tags)
    y = constrain(y, 'batch', 'seq', 'act_embed')
    return (y + Mlp(c, name='mlp')(c.make_norm('norm')(y)))[:, :I]
