"""Pictures out of a bank, and what convolutions do with them.

A bank holds patches, a convolution wants pictures. Each patch is laid where its row
and column say, whatever its place in the bank; an item that isn't there is black:

  bank     a0 a1 a2 a3 b0 b1 b2 b3 .        items of 2 x 2 patches of p x p pixels
  pictures a0 a1   b0 b1   0  0
           a2 a3   b2 b3   0  0             [B*I, 2p, 2p, 3], I = 3

Letters: B rows, P patches, I items, C values of a patch, H, W sizes of a picture
or grid, D channels in, E channels out.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.shape import check

Padding = str | int


def pictures(
  values: jax.Array,
  items: jax.Array,
  positions: jax.Array,
  num_items: int,
  grid: tuple[int, int],
) -> jax.Array:
  """Lays the patches of a bank out as pictures of one size.

  Args:
    values: u8 or f[B, P, C], C = p * p * 3, flattened as (row, column, channel).
    items: i32[B, P] the owner, from 1; 0 = padding.
    positions: i32[B, P, 3] time, row, column.
    num_items: I.
    grid: rows and columns of a picture, in patches.

  Returns:
    [B * I, rows * p, columns * p, 3] of the values' type. Patches outside of the
    grid, or of a later frame than the first, are left out.

  Raises:
    ValueError: shapes that don't fit, or C is no p * p * 3.
  """
  sizes = check('B P C', values, 'B P', items, 'B P 3', positions)
  B, C, (rows, columns) = sizes['B'], sizes['C'], grid
  p = patch_size(C)
  time, row, column = (positions[..., i] for i in range(3))
  inside = (items > 0) & (items <= num_items) & (time == 0)
  inside &= (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
  cells = num_items * rows * columns
  cell = ((items - 1) * rows + row) * columns + column
  cell = jnp.where(inside, cell, cells)  # beyond the end: dropped

  def lay(values, cell):
    return jnp.zeros((cells, C), values.dtype).at[cell].set(values, mode='drop')

  x = jax.vmap(lay)(jnp.asarray(values), cell)
  x = x.reshape(B, num_items, rows, columns, p, p, 3).swapaxes(3, 4)
  return x.reshape(B * num_items, rows * p, columns * p, 3)


def patch_size(channels: int) -> int:
  """p of C = p * p * 3.

  Raises:
    ValueError: C is no such number.
  """
  p = math.isqrt(max(channels, 0) // 3)
  if p < 1 or p * p * 3 != channels:
    raise ValueError(f'patches of {channels} values are no p * p pixels of 3 colours')
  return p


def cells(items: jax.Array, grid: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
  """Tags of the cells of the pictures' grids, in reading order, item after item.

  Args:
    items: i32[B, I] the items there are, by number from 1; 0 = none.
    grid: rows and columns (H, W) of every item's cells.

  Returns:
    (i32[B, I*H*W] the owner, i32[B, I*H*W, 3] time, row, column).
  """
  B, I = items.shape
  owner = jnp.repeat(items, grid[0] * grid[1], axis=1)
  where = np.indices((1, *grid)).reshape(3, -1).T.astype(np.int32)
  where = jnp.asarray(np.tile(where, (I, 1)))[None]
  return owner, jnp.broadcast_to(where, (B, *where.shape[1:]))


def pads(size: int, window: int, stride: int, padding: Padding) -> tuple[int, int]:
  """Zeros before and after one axis.

  'same' is TensorFlow's: the output has ceil(size / stride) entries, and of an odd
  number of zeros the larger half comes after; so it depends on the size. A number
  is that many on both sides, as in torch.
  """
  if padding == 'same':
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2
  return int(padding), int(padding)


def out_size(size: int, window: int, stride: int, padding: Padding) -> int:
  """Entries of one axis after a window has gone over it."""
  return (size + sum(pads(size, window, stride, padding)) - window) // stride + 1


def conv(
  x: jax.Array,
  kernel: jax.Array,
  stride: int = 1,
  padding: Padding = 'same',
  groups: int = 1,
) -> jax.Array:
  """A convolution over pictures, channels last.

  Args:
    x: f[B, H, W, D]
    kernel: f[h, w, D / groups, E]; cast to x's type.
    stride: in both directions.
    padding: see `pads`.
    groups: into how many parts D and E are split, each for itself.

  Returns:
    f[B, H', W', E]

  Raises:
    ValueError: shapes that don't fit.
  """
  check('B H W D', x, 'h w d E', kernel)
  D, (h, w, d, E) = x.shape[-1], kernel.shape
  if d * groups != D or E % groups:
    raise ValueError(
      f'conv: a kernel of {d} to {E} channels in {groups} groups does not fit x of {D}'
    )
  zeros = tuple(pads(n, k, stride, padding) for n, k in zip(x.shape[1:3], (h, w)))
  kernel = kernel.astype(x.dtype)
  if groups > 1:
    return _grouped(x, kernel, stride, zeros, groups)
  return _conv(x, kernel, stride, zeros, 1)


def _conv(x, kernel, stride, zeros, groups):
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), zeros, dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )  # fmt: skip


# XLA's own gradient of a grouped kernel is wrong on a mesh where pictures are split over
# one axis and whole over another: a multiple of it, by the size of the latter (jaxlib
# 0.10.2 and 0.12.0). So the kernel's gradient is taken group by group.
_grouped = jax.custom_vjp(_conv, nondiff_argnums=(2, 3, 4))


def _grouped_forward(x, kernel, stride, zeros, groups):
  return _conv(x, kernel, stride, zeros, groups), (x, kernel)


def _grouped_backward(stride, zeros, groups, kept, dy):
  x, kernel = kept
  parts = zip(*(jnp.split(a, groups, -1) for a in (x, kernel, dy)))
  dk = [
    jax.vjp(lambda k, a=a: _conv(a, k, stride, zeros, 1), k)[1](d)[0] for a, k, d in parts
  ]
  dx = jax.vjp(lambda a: _conv(a, kernel, stride, zeros, groups), x)[1](dy)[0]
  return dx, jnp.concatenate(dk, -1)


_grouped.defvjp(_grouped_forward, _grouped_backward)


def depthwise(
  x: jax.Array, kernel: jax.Array, stride: int = 1, padding: Padding = 'same'
) -> jax.Array:
  """A convolution of every channel by itself, as a sum of shifted pictures.

  The same as `conv` with as many groups as channels, for which XLA on CPU has no
  fast way: on one with two cores this was 9 to 25 times as fast in the sizes of
  EfficientNet-Lite0.

  Args:
    x: f[B, H, W, D]
    kernel: f[h, w, 1, D]; cast to x's type.

  Returns:
    f[B, H', W', D]

  Raises:
    ValueError: shapes that don't fit.
  """
  check('B H W D', x, 'h w 1 D', kernel)
  (h, w, _, _), (_, H, W, _) = kernel.shape, x.shape
  kernel = kernel.astype(x.dtype)
  rows, columns = pads(H, h, stride, padding), pads(W, w, stride, padding)
  down, right = out_size(H, h, stride, padding), out_size(W, w, stride, padding)
  x = jnp.pad(x, ((0, 0), rows, columns, (0, 0)))

  def tap(i, j):
    to = i + (down - 1) * stride + 1, j + (right - 1) * stride + 1
    return x[:, i : to[0] : stride, j : to[1] : stride] * kernel[None, None, i, j]

  return sum(tap(i, j) for i in range(h) for j in range(w))


def max_pool(x: jax.Array, window: int, stride: int, padding: Padding) -> jax.Array:
  """The largest of each window, f[B, H, W, D] -> f[B, H', W', D]."""
  zeros = [pads(n, window, stride, padding) for n in x.shape[1:3]]
  low = np.array(-np.inf, x.dtype)  # known when traced, which the gradient needs
  return jax.lax.reduce_window(
    x, low, jax.lax.max, (1, window, window, 1), (1, stride, stride, 1),
    ((0, 0), *zeros, (0, 0)),
  )  # fmt: skip


def mean_pool(x: jax.Array, window: int) -> jax.Array:
  """The mean of each window of w x w, w apart; at the edge, of what there is."""
  B, H, W, D = x.shape
  down, right = -H % window, -W % window
  x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, down), (0, right), (0, 0)))
  x = x.reshape(B, (H + down) // window, window, (W + right) // window, window, D)
  there = [
    np.minimum(np.arange(0, n, window) + window, n) - np.arange(0, n, window)
    for n in (H, W)
  ]
  count = np.outer(*there).astype(np.float32)[None, :, :, None]
  return jnp.sum(x, (2, 4)) / count


def standardised(kernel: jax.Array, gain: jax.Array, eps: float = 1e-4) -> jax.Array:
  """Scaled weight standardisation (2101.08692, equation 2), in float32.

  Each output's weights get mean 0 and variance gain**2 / fan-in, so that what comes
  out of the convolution has the variance of what came in, at every step of training.

  Args:
    kernel: f[h, w, D, E]
    gain: f[E]
    eps: the least fan-in * variance to divide by.

  Returns:
    f32[h, w, D, E]
  """
  check('h w D E', kernel, 'E', gain)
  kernel, axes = kernel.astype(jnp.float32), (0, 1, 2)
  mean = jnp.mean(kernel, axes, keepdims=True)
  fan_in = kernel[..., 0].size
  power = jnp.mean(jnp.square(kernel - mean), axes, keepdims=True) * fan_in
  scale = jax.lax.rsqrt(jnp.maximum(power, eps))
  return (kernel - mean) * scale * gain.astype(jnp.float32)[None, None, None]


def affine(x: jax.Array, scale, bias, mean, var, eps: float) -> jax.Array:
  """Batch norm as it stands after training: numbers that no batch changes.

  Args:
    x: f[..., D]
    scale, bias, mean, var: f[D]

  Returns:
    f[..., D] (x - mean) / sqrt(var + eps) * scale + bias, the factor and the shift
    in float32.
  """
  scale, bias, mean, var = (a.astype(jnp.float32) for a in (scale, bias, mean, var))
  factor = scale * jax.lax.rsqrt(var + eps)
  shift = bias - mean * factor
  lead = (1,) * (x.ndim - 1)
  return x * factor.reshape(*lead, -1).astype(x.dtype) + shift.reshape(*lead, -1).astype(
    x.dtype
  )


def group_norm(x: jax.Array, scale, bias, groups: int, eps: float) -> jax.Array:
  """Normalises each picture over its cells and groups of channels (1803.08494).

  Args:
    x: f[B, H, W, D]
    scale, bias: f[D]
    groups: must divide D.

  Returns:
    f[B, H, W, D], computed in float32.

  Raises:
    ValueError: groups that don't divide D.
  """
  check('B H W D', x, 'D', scale, 'D', bias)
  B, H, W, D = x.shape
  if D % groups:
    raise ValueError(f'group norm: {D} channels do not divide into {groups} groups')
  y = x.astype(jnp.float32).reshape(B, H * W, groups, D // groups)
  y = y - jnp.mean(y, (1, 3), keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), (1, 3), keepdims=True) + eps)
  scale, bias = (a.astype(jnp.float32)[None, None, None] for a in (scale, bias))
  return (y.reshape(x.shape) * scale + bias).astype(x.dtype)
