"""Products with kernels, as parameters: how they are drawn, and their biases."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from mmjax.ops.linear import linear, linears, plus
from mmjax.sharding import param


def kernel_init(scale: float = 1.0, num_in: int = 1) -> nn.initializers.Initializer:
  """Truncated normal with variance scale / fan-in, over the first `num_in` axes."""

  def init(key, shape, dtype):
    out = tuple(range(num_in, len(shape)))
    make = nn.initializers.variance_scaling(
      scale, 'fan_in', 'truncated_normal', tuple(range(num_in)), out
    )
    return make(key, shape, dtype)

  return init


def add_bias(
  module: nn.Module,
  name: str,
  y: jax.Array,
  axes: tuple[str, ...],
  dtype: Any,
  scale: jax.Array | None = None,
) -> jax.Array:
  """y + bias (* scale), a new parameter over y's last axes, which have these names."""
  shape = y.shape[y.ndim - len(axes) :]
  bias = param(module, name, nn.initializers.zeros, shape, axes, dtype)
  if scale is not None:
    bias = bias * scale.astype(bias.dtype)
  return plus(y, bias.astype(y.dtype))


def project(
  module: nn.Module,
  x: jax.Array,
  outs: Sequence[tuple[str, tuple[int, ...], tuple[str, ...]]],
  bias: bool,
  dtype: Any,
) -> list[jax.Array]:
  """x W, maybe + b, by several new kernels: f[..., D] -> f[..., *shape] each.

  Args:
    outs: of each kernel its name, what shape it makes of D, and its axes' names.
  """
  kernels, biases, zeros = [], [], nn.initializers.zeros
  for name, shape, axes in outs:  # a bias after its kernel: draws follow the order
    whole = x.shape[-1], *shape
    kernels.append(param(module, name, kernel_init(), whole, axes, dtype))
    if bias:
      biases.append(param(module, f'{name}_bias', zeros, shape, axes[1:], dtype))
  made = linears(x, kernels)
  return [plus(y, b.astype(y.dtype)) for y, b in zip(made, biases)] if bias else made


class Dense(nn.Module):
  """x W, maybe + b: f[..., C] -> f[..., width]."""

  width: int
  bias: bool = True
  param_dtype: Any = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape, axes = (x.shape[-1], self.width), ('embed', None)
    y = linear(x, param(self, 'kernel', kernel_init(), shape, axes, self.param_dtype))
    return add_bias(self, 'bias', y, (None,), self.param_dtype) if self.bias else y
