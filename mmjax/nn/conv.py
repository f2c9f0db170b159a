"""What the convolutional encoders share: from the bank to a grid, and back to tokens.

  bank [B, P, C] -> pictures [B*I, H, W, 3] -> grid [B*I, h, w, D] -> [B, I*h*w, D]

A convolution can't leave out what is padding, so all pictures of one encoder have one
size, the field `image_grid`, and the cells of picture i stand at (i - 1) * h * w.
Nothing here looks at other pictures of the batch: batch norm is frozen, numbers as
they stood after training.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.batch import Bank, Item
from mmjax.names import closest
from mmjax.nn.features import Features
from mmjax.nn.remat import REMAT
from mmjax.ops import conv as ops
from mmjax.ops.linear import linear
from mmjax.shape import check
from mmjax.sharding import constrain, param

# What a frozen norm holds that no training may change: for `optim.freeze`.
FROZEN = ('*/norm/mean', '*/norm/var')
POOLS = ('none', 'mean')
NORMS = ('frozen', 'group')


class Conv(nn.Module):
  """A convolution without bias, f[B, H, W, D] -> f[B, H', W', E].

  Fields: E; the window h = w; stride, padding and groups, see `ops.conv.conv` (groups=0
  is one group per channel); axis, the name of E in the sharding rules.
  """

  channels: int
  window: int = 1
  stride: int = 1
  padding: ops.Padding = 'same'
  groups: int = 1
  axis: str | None = 'channels'
  param_dtype: Any = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    D, h = x.shape[-1], self.window
    shape = (h, h, D // (self.groups or D), self.channels)
    init = nn.initializers.he_normal(in_axis=(0, 1, 2), out_axis=3)
    axes = (None, None, None, self.axis)
    kernel = param(self, 'kernel', init, shape, axes, self.param_dtype)
    if not self.groups:
      return ops.depthwise(x, kernel, self.stride, self.padding)
    return ops.conv(x, kernel, self.stride, self.padding, self.groups)


class Norm(nn.Module):
  """Frozen batch norm, or group norm, over the channels of f[B, H, W, D].

  Fields: kind, of `NORMS`; eps; groups, of group norm; axis, the name of D.
  """

  kind: str = 'frozen'
  eps: float = 1e-5
  groups: int = 32
  axis: str | None = 'channels'
  param_dtype: Any = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    ones, zeros = nn.initializers.ones, nn.initializers.zeros

    def vector(name, init):
      return param(self, name, init, x.shape[-1:], (self.axis,), self.param_dtype)

    scale, bias = vector('scale', ones), vector('bias', zeros)
    if self.kind == 'group':
      return ops.group_norm(x, scale, bias, self.groups, self.eps)
    mean, var = vector('mean', zeros), vector('var', ones)
    mean, var = jax.lax.stop_gradient((mean, var))
    return ops.affine(x, scale, bias, mean, var, self.eps)


class ConvNorm(nn.Module):
  """A convolution and a norm; fields as of the two, `norm` is the kind."""

  channels: int
  window: int = 1
  stride: int = 1
  padding: ops.Padding = 'same'
  groups: int = 1
  norm: str = 'frozen'
  norm_groups: int = 32
  eps: float = 1e-5
  axis: str | None = 'channels'
  param_dtype: Any = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = Conv(
      self.channels, self.window, self.stride, self.padding, self.groups, self.axis,
      self.param_dtype, name='conv',
    )(x)  # fmt: skip
    return Norm(
      self.norm, self.eps, self.norm_groups, self.axis, self.param_dtype, name='norm'
    )(x)


class Dense(nn.Module):
  """A product with a bias, f[..., D] -> f32[..., E]: heads and gates.

  Fields: E; names of the kernel's axes; storage.
  """

  channels: int
  axes: tuple[str | None, str | None] = (None, 'channels')
  param_dtype: Any = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape, axes = (x.shape[-1], self.channels), self.axes
    init, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros
    kernel = param(self, 'kernel', init, shape, axes, self.param_dtype)
    bias = param(self, 'bias', zeros, shape[1:], axes[1:], self.param_dtype)
    y = linear(x.astype(jnp.float32), kernel)
    return y + bias.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))


def check_choice(what: str, **fields: tuple[str, Any]) -> None:
  """Refuses a field that is none of its choices: field=(value, choices).

  Raises:
    ValueError: see above.
  """
  for field, (value, choices) in fields.items():
    if value not in choices:
      raise ValueError(f'{what}: unknown {field} {value!r}{closest(value, choices)}')


class Encoder(nn.Module):
  """What a convolutional encoder has besides its blocks; one adds `width`, `out_grid`.

  Fields:
    channels: C, values of a patch.
    image_grid: rows and columns of a picture, in patches.
    mean, std: by colour; bytes become (x - mean) / std, other values stay as they are.
    pool: 'none', or 'mean' over the grid: one vector per item besides the tokens.
    num_classes: > 0 gives the head of a classifier, see `logits`.
    remat: what a block keeps for its backward pass, see `nn.remat`.
    dtype, param_dtype: of compute, of storage.
  """

  channels: int
  image_grid: tuple[int, int] = (14, 14)
  mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
  std: tuple[float, float, float] = (127.5, 127.5, 127.5)
  pool: str = 'none'
  num_classes: int = 0
  remat: str = 'none'
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'

  def setup(self):
    if self.num_classes:
      self.head = Dense(self.num_classes, ('channels', None), self.param_dtype)

  @property
  def image_size(self) -> tuple[int, int]:
    """Height and width of a picture in pixels."""
    p = ops.patch_size(self.channels)
    return self.image_grid[0] * p, self.image_grid[1] * p

  def grid(self, item: Item) -> tuple[int, int, int]:
    """The grid (1, h, w) of tokens that an item becomes.

    Raises:
      ValueError: an item that is not one picture of `image_grid` patches.
    """
    want = (1, *self.image_grid)
    if tuple(item.grid) != want:
      raise ValueError(
        f'{type(self).__name__} takes pictures of {want} patches (time, rows, columns),'
        f' not {item.kind} of {tuple(item.grid)}'
      )
    return 1, *self.out_grid(self.image_size)

  def check_fields(self) -> None:
    """Refuses fields of the wrong kind; more in the encoders themselves."""
    check_choice(type(self).__name__, pool=(self.pool, POOLS), remat=(self.remat, REMAT))

  def encode(self, bank: Bank, body: Callable[[jax.Array], jax.Array]) -> Features:
    """bank -> pictures -> normalised -> body -> tokens.

    Raises:
      ValueError: shapes or channels that don't fit, or fields.
    """
    self.check_fields()
    sizes = check('B P C', bank.values, 'B P', bank.items, 'B I', bank.item_segments)
    B, I = sizes['B'], sizes['I']
    if sizes['C'] != self.channels:
      raise ValueError(
        f'patches have {sizes["C"]} channels, {type(self).__name__} takes {self.channels}'
      )
    values, items, positions = map(jnp.asarray, (bank.values, bank.items, bank.positions))
    x = ops.pictures(values, items, positions, I, self.image_grid)
    if x.dtype == jnp.uint8:
      mean, std = (
        np.array(a, np.float32)[None, None, None] for a in (self.mean, self.std)
      )
      x = (x.astype(jnp.float32) - mean) / std
    x = body(constrain(x.astype(self.dtype), 'batch', None, None, None))
    _, h, w, D = x.shape
    there = jnp.arange(1, I + 1, dtype=jnp.int32)[None]
    there = jnp.where(jnp.asarray(bank.item_segments) > 0, there, 0)
    owner, where = ops.cells(there, (h, w))
    pooled = None
    if self.pool == 'mean':
      pooled = jnp.mean(x, (1, 2), dtype=jnp.float32).astype(x.dtype).reshape(B, I, D)
    tokens = constrain(x.reshape(B, I * h * w, D), 'batch', 'seq', 'act_embed')
    if self.is_initializing() and self.num_classes:
      self.head(tokens)  # so that its parameters exist
    return Features(tokens, owner, where, pooled)

  def logits(self, pooled: jax.Array) -> jax.Array:
    """The classes of what was pooled, f[..., width] -> f32[..., num_classes].

    Raises:
      ValueError: the model has no head.
    """
    if not self.num_classes:
      raise ValueError(f'{type(self).__name__}: num_classes=0, so there is no head')
    return self.head(pooled)
