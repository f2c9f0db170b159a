"""EfficientNet-Lite0 (1905.11946, made simple: ReLU6, no squeeze-excite).

  picture 224 x 224 -> stem 112 -> 16 blocks 112, 56, 28, 14, 7 -> 7 x 7 tokens of 1,280

A block widens its channels, looks around in each by itself, and narrows again
(inverted residual, 1801.04381):

  x + project(relu6(depthwise(relu6(expand(x)))))

with batch norm after each of the three, frozen as it stood after training; the sum
is left out where the size changes. Zeros are padded as TensorFlow does, and bytes
become (x - 127) / 128.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.batch import Bank
from mmjax.nn.conv import ConvNorm, Encoder
from mmjax.nn.features import Features
from mmjax.nn.remat import remat
from mmjax.sharding import constrain

# Factor of widening, window, stride, channels, number of blocks.
Stage = tuple[int, int, int, int, int]
LITE0: tuple[Stage, ...] = (
  (1, 3, 1, 16, 1),
  (6, 3, 2, 24, 2),
  (6, 5, 2, 40, 2),
  (6, 3, 2, 80, 3),
  (6, 5, 1, 112, 3),
  (6, 5, 2, 192, 4),
  (6, 3, 1, 320, 1),
)


def relu6(x: jax.Array) -> jax.Array:
  return jnp.clip(x, 0, 6)


class EfficientNet(Encoder):
  """Pictures to the cells of the last grid.

  Fields:
    stem, stages, width: channels of the first and the last convolution, and what
      stands between; see `LITE0`.
    norm_eps: of the frozen norms.
    All others: see `nn.conv.Encoder`.

  Channels are few and of odd sizes, so only the head is split over devices.
  """

  mean: tuple[float, float, float] = (127.0, 127.0, 127.0)
  std: tuple[float, float, float] = (128.0, 128.0, 128.0)
  stem: int = 32
  stages: tuple[Stage, ...] = LITE0
  width: int = 1280
  norm_eps: float = 1e-3

  def out_grid(self, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tokens for a picture's height and width."""
    for stride in (2, *(stage[2] for stage in self.stages)):
      size = -(-size[0] // stride), -(-size[1] // stride)
    return size

  @nn.compact
  def __call__(self, bank: Bank, *, train: bool = False) -> Features:
    """Encodes a bank.

    Args:
      bank: values u8 (or f, as bytes are) [B, P, C], I items per row.

    Returns:
      tokens f[B, I * h * w, width]; pooled f[B, I, width] with pool='mean'.

    Raises:
      ValueError: shapes or channels that don't fit, or fields.
    """
    del train  # nothing here depends on it
    return self.encode(bank, self._body)

  def _body(self, x):
    kinds = dict(eps=self.norm_eps, axis=None, param_dtype=self.param_dtype)
    x = relu6(ConvNorm(self.stem, 3, 2, name='stem', **kinds)(x))
    block, i = remat(Inverted, self.remat), 0
    for expand, window, stride, channels, count in self.stages:
      for j in range(count):
        step = stride if j == 0 else 1
        x = block(
          expand, window, step, channels, self.norm_eps, self.param_dtype,
          name=f'block_{i}',
        )(x)  # fmt: skip
        x = constrain(x, 'batch', None, None, None)
        i += 1
    return relu6(ConvNorm(self.width, name='last', **kinds)(x))


class Inverted(nn.Module):
  """One block, f[B, H, W, D] -> f[B, H / stride, W / stride, channels]."""

  expand: int
  window: int
  stride: int
  channels: int
  eps: float = 1e-3
  param_dtype: Any = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kinds = dict(eps=self.eps, axis=None, param_dtype=self.param_dtype)
    y, D = x, x.shape[-1] * self.expand
    if self.expand != 1:
      y = relu6(ConvNorm(D, name='expand', **kinds)(y))
    y = ConvNorm(D, self.window, self.stride, groups=0, name='depthwise', **kinds)(y)
    y = ConvNorm(self.channels, name='project', **kinds)(relu6(y))
    return x + y if x.shape == y.shape else y
