"""NFNet (Brock et al., 2102.06171): a ResNet that needs no norm, over pictures of a bank.

The variance of the stream is known at every depth instead of measured. A block divides
by the standard deviation it expects, and what it adds has variance 1:

  x + alpha * gain * SE(f(act(x) * beta))        beta = 1 / sqrt(expected variance)

  expected variance   1, 1 + alpha**2, 1 + 2 alpha**2, ...   back to 1 + alpha**2 after
                      the first block of a stage, whose shortcut starts from act(x) * beta

Two things keep it so: kernels are standardised whenever they are used (`ops.conv.
standardised`, 2101.08692), and the activation is scaled by gamma, so that it gives
variance 1 for variance 1. The gain of each block is learned and starts at 0.

  picture -> 4 convolutions /4 -> stages /4, /8, /16, /32 -> 1 x 1 -> tokens
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.batch import Bank
from mmjax.nn.conv import Dense, Encoder, check_choice
from mmjax.nn.features import Features
from mmjax.nn.remat import remat
from mmjax.ops import conv as ops
from mmjax.sharding import constrain, param


class Scaled(NamedTuple):
  """A nonlinearity and gamma, 1 / its standard deviation for standard normal x."""

  function: Any
  gamma: float

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.function(x) * self.gamma


# Gammas as published; by integration they are right to 0.13 %.
ACTIVATIONS = {
  'gelu': Scaled(lambda x: jax.nn.gelu(x, approximate=True), 1.7015043),
  'relu': Scaled(jax.nn.relu, 1.7139589),
  'silu': Scaled(jax.nn.silu, 1.7881293),
}
# Number of blocks by stage (table 1).
DEPTHS = {f'F{i}': tuple((i + 1) * n for n in (1, 2, 6, 3)) for i in range(7)}


class NFNet(Encoder):
  """Pictures to the cells of the last grid; as given, F0.

  Fields:
    widths, depths: channels and number of blocks of each stage; see `DEPTHS`.
    stem: channels of the four convolutions at the start; the last is widths[0] / 2.
    group_width: channels of a group of the 3 x 3 convolutions.
    final: channels of the tokens as a multiple of the last width.
    alpha: how much a block adds; activation: 'gelu', 'relu' or 'silu'.
    drop_rate: of blocks in training, growing from 0 to this with depth (stochastic
      depth, 1603.09382), drawn for each picture; needs the rng 'dropout'.
    All others: see `nn.conv.Encoder`.
  """

  mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
  std: tuple[float, float, float] = (58.395, 57.12, 57.375)
  widths: tuple[int, ...] = (256, 512, 1536, 1536)
  depths: tuple[int, ...] = DEPTHS['F0']
  stem: tuple[int, int, int] = (16, 32, 64)
  group_width: int = 128
  final: int = 2
  alpha: float = 0.2
  activation: str = 'gelu'
  drop_rate: float = 0.0

  @property
  def width(self) -> int:
    """D of the tokens."""
    return self.final * self.widths[-1]

  def out_grid(self, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tokens for a picture's height and width."""
    for _ in range(len(self.widths) + 1):
      size = -(-size[0] // 2), -(-size[1] // 2)
    return size

  def check_fields(self) -> None:
    """Refuses fields of the wrong kind.

    Raises:
      ValueError: an unknown choice, lists of two lengths, a rate that is none, or a
        width of no whole number of groups.
    """
    super().check_fields()
    check_choice('NFNet', activation=(self.activation, ACTIVATIONS))
    if len(self.widths) != len(self.depths):
      raise ValueError(
        f'NFNet: widths={self.widths} and depths={self.depths} differ in length'
      )
    if not 0 <= self.drop_rate < 1:
      raise ValueError(f'NFNet: drop_rate={self.drop_rate} is not in [0, 1)')
    for width in self.widths:
      if width % (2 * self.group_width):
        raise ValueError(
          f'NFNet: half of width {width} does not divide into groups of'
          f' group_width={self.group_width}'
        )

  @nn.compact
  def __call__(self, bank: Bank, *, train: bool = False) -> Features:
    """Encodes a bank.

    Args:
      bank: values u8 or f[B, P, C], I items per row.
      train: whether blocks are dropped.

    Returns:
      tokens f[B, I * h * w, width]; pooled f[B, I, width] with pool='mean'.

    Raises:
      ValueError: shapes or channels that don't fit, or fields.
    """
    return self.encode(bank, lambda x: self._body(x, train))

  def _body(self, x, train):
    act, kinds = ACTIVATIONS[self.activation], dict(param_dtype=self.param_dtype)
    strides = 2, 1, 1, 2
    for i, channels in enumerate((*self.stem, self.widths[0] // 2)):
      # The first are too narrow to be worth splitting over devices.
      axis = 'channels' if i == 3 else None
      x = x if i == 0 else act(x)
      x = WSConv(channels, 3, strides[i], axis=axis, name=f'stem_{i}', **kinds)(x)
    block, k, total, variance = remat(Block, self.remat), 0, sum(self.depths), 1.0
    for i, (width, depth) in enumerate(zip(self.widths, self.depths)):
      for j in range(depth):
        keep = 1.0
        if train and self.drop_rate:
          keep = 1 - self.drop_rate * k / total
        x = block(
          width, 2 if i and not j else 1, self.group_width, self.alpha,
          1 / math.sqrt(variance), self.activation, keep, name=f'stage_{i}_block_{j}',
          **kinds,
        )(x)  # fmt: skip
        x = constrain(x, 'batch', None, None, None)
        variance = (1.0 if j == 0 else variance) + self.alpha**2
        k += 1
    return act(WSConv(self.width, name='last', **kinds)(x))


class WSConv(nn.Module):
  """A convolution of standardised weights with bias, f[B, H, W, D] -> f[B, H', W', E].

  Fields: E; the window; stride; channels in a group (0: one group of all); axis, the
  name of E in the sharding rules. Zeros are padded as TensorFlow does.
  """

  channels: int
  window: int = 1
  stride: int = 1
  group_width: int = 0
  axis: str | None = 'channels'
  param_dtype: Any = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    D, E, h = x.shape[-1], self.channels, self.window
    shape = (h, h, self.group_width or D, E)
    axes = None, None, None, self.axis
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    init = nn.initializers.variance_scaling(
      1.0, 'fan_in', 'normal', in_axis=(0, 1, 2), out_axis=3
    )
    kernel = param(self, 'kernel', init, shape, axes, self.param_dtype)
    gain = param(self, 'gain', ones, (E,), axes[3:], self.param_dtype)
    bias = param(self, 'bias', zeros, (E,), axes[3:], self.param_dtype)
    kernel = ops.standardised(kernel, gain).astype(x.dtype)
    y = ops.conv(x, kernel, self.stride, groups=D // shape[2])
    return y + bias.astype(x.dtype)[None, None, None]


class Block(nn.Module):
  """One block, f[B, H, W, D] -> f[B, H / stride, W / stride, E].

  Fields: E; stride; group_width; alpha; beta; activation; keep, the share of pictures
  for which it isn't dropped.
  """

  channels: int
  stride: int
  group_width: int
  alpha: float
  beta: float
  activation: str = 'gelu'
  keep: float = 1.0
  param_dtype: Any = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    act, kinds = ACTIVATIONS[self.activation], dict(param_dtype=self.param_dtype)
    E, half, groups = self.channels, self.channels // 2, self.group_width
    y = act(x) * jnp.asarray(self.beta, x.dtype)
    if self.stride > 1 or x.shape[-1] != E:
      pooled = ops.mean_pool(y, self.stride).astype(y.dtype) if self.stride > 1 else y
      x = WSConv(E, name='shortcut', **kinds)(pooled)
    y = WSConv(half, name='conv_0', **kinds)(y)
    y = WSConv(half, 3, self.stride, groups, name='conv_1', **kinds)(act(y))
    y = WSConv(half, 3, 1, groups, name='conv_2', **kinds)(act(y))
    y = WSConv(E, name='conv_3', **kinds)(act(y))
    y = SqueezeExcite(E // 2, name='se', **kinds)(y)
    if self.keep < 1:
      shape = (len(y), 1, 1, 1)
      kept = jax.random.bernoulli(self.make_rng('dropout'), self.keep, shape)
      y = jnp.where(kept, y / jnp.asarray(self.keep, y.dtype), jnp.zeros((), y.dtype))
    zeros = nn.initializers.zeros
    gain = param(self, 'skip_gain', zeros, (), (), self.param_dtype)
    return x + y * (gain.astype(jnp.float32) * self.alpha).astype(y.dtype)


class SqueezeExcite(nn.Module):
  """Channels weighed by the whole picture (1709.01507), doubled: 1 on average.

  f[B, H, W, D] -> f[B, H, W, D], with `hidden` channels between.
  """

  hidden: int
  param_dtype: Any = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = jnp.mean(x, (1, 2), dtype=jnp.float32)
    y = jax.nn.relu(Dense(self.hidden, param_dtype=self.param_dtype, name='down')(y))
    y = Dense(x.shape[-1], param_dtype=self.param_dtype, name='up')(y)
    return x * (2 * jax.nn.sigmoid(y)).astype(x.dtype)[:, None, None]
