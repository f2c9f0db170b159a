"""ResNet (He et al., 1512.03385) over a bank of pictures, by default ResNet-50.

  picture 224 -> conv 7 x 7 112 -> max pool 56 -> stages 56, 28, 14, 7 -> 7 x 7 tokens

  relu(shortcut(x) + norm(conv(... relu(norm(conv(x))))))

A 'bottleneck' is three convolutions, 1 x 1 to a quarter of the channels, 3 x 3, and
1 x 1 back; a 'basic' block is two of 3 x 3. The first block of a stage halves the
size with its 3 x 3 ("version 1.5"; the paper: with its first 1 x 1). Zeros are padded
evenly, as in torch. No norm looks at the batch: batch norm is frozen, its `mean` and
`var` are parameters that `nn.conv.FROZEN` names for `optim.freeze`; or group norm
(1803.08494) takes its place.
"""

from typing import Any

import flax.linen as nn
import jax

from mmjax.batch import Bank
from mmjax.nn.conv import NORMS, ConvNorm, Encoder, check_choice
from mmjax.nn.features import Features
from mmjax.nn.remat import remat
from mmjax.ops import conv as ops
from mmjax.sharding import constrain

BLOCKS = ('bottleneck', 'basic')


class ResNet(Encoder):
  """Pictures to the cells of the last grid.

  Fields:
    stem, widths, depths: channels of the first convolution and of each stage, and
      the number of each stage's blocks.
    block: 'bottleneck' or 'basic'.
    norm: 'frozen' batch norm or 'group' norm of `norm_groups` groups; norm_eps.
    early_stride: whether a bottleneck's first convolution has the stride.
    All others: see `nn.conv.Encoder`.
  """

  mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
  std: tuple[float, float, float] = (58.395, 57.12, 57.375)
  stem: int = 64
  widths: tuple[int, ...] = (256, 512, 1024, 2048)
  depths: tuple[int, ...] = (3, 4, 6, 3)
  block: str = 'bottleneck'
  norm: str = 'frozen'
  norm_groups: int = 32
  norm_eps: float = 1e-5
  early_stride: bool = False

  @property
  def width(self) -> int:
    """D of the tokens."""
    return self.widths[-1]

  def out_grid(self, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tokens for a picture's height and width."""
    windows = [(7, 3), (3, 1)] + [(3, 1)] * (len(self.widths) - 1)
    for window, padding in windows:
      size = tuple(ops.out_size(n, window, 2, padding) for n in size)
    return size

  def check_fields(self) -> None:
    """Refuses fields of the wrong kind.

    Raises:
      ValueError: an unknown choice, or widths and depths of two lengths.
    """
    super().check_fields()
    check_choice('ResNet', norm=(self.norm, NORMS), block=(self.block, BLOCKS))
    if len(self.widths) != len(self.depths):
      raise ValueError(
        f'ResNet: widths={self.widths} and depths={self.depths} differ in length'
      )

  @nn.compact
  def __call__(self, bank: Bank, *, train: bool = False) -> Features:
    """Encodes a bank.

    Args:
      bank: values u8 or f[B, P, C], I items per row.

    Returns:
      tokens f[B, I * h * w, width]; pooled f[B, I, width] with pool='mean'.

    Raises:
      ValueError: shapes or channels that don't fit, or fields.
    """
    del train  # nothing here depends on it
    return self.encode(bank, self._body)

  def _body(self, x):
    kinds = dict(
      norm=self.norm, norm_groups=self.norm_groups, eps=self.norm_eps,
      param_dtype=self.param_dtype,
    )  # fmt: skip
    x = jax.nn.relu(ConvNorm(self.stem, 7, 2, 3, name='stem', **kinds)(x))
    x = ops.max_pool(x, 3, 2, 1)
    block = remat(Residual, self.remat)
    for i, (width, depth) in enumerate(zip(self.widths, self.depths)):
      for j in range(depth):
        stride = 2 if i and not j else 1
        x = block(
          width, stride, self.block, self.early_stride, name=f'stage_{i}_block_{j}',
          **kinds,
        )(x)  # fmt: skip
        x = constrain(x, 'batch', None, None, None)
    return x


class Residual(nn.Module):
  """One block, f[B, H, W, D] -> f[B, H / stride, W / stride, channels]."""

  channels: int
  stride: int = 1
  kind: str = 'bottleneck'
  early_stride: bool = False
  norm: str = 'frozen'
  norm_groups: int = 32
  eps: float = 1e-5
  param_dtype: Any = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kinds = dict(
      norm=self.norm, norm_groups=self.norm_groups, eps=self.eps,
      param_dtype=self.param_dtype,
    )  # fmt: skip
    E, s = self.channels, self.stride
    if self.kind == 'basic':
      convs = (E, 3, s, 1), (E, 3, 1, 1)
    else:
      first, second = (s, 1) if self.early_stride else (1, s)
      convs = (E // 4, 1, first, 0), (E // 4, 3, second, 1), (E, 1, 1, 0)
    y = x
    for i, conv in enumerate(convs):
      y = ConvNorm(*conv, name=f'conv_{i}', **kinds)(y if i == 0 else jax.nn.relu(y))
    if s != 1 or x.shape[-1] != E:
      x = ConvNorm(E, 1, s, 0, name='shortcut', **kinds)(x)
    return jax.nn.relu(x + y)
