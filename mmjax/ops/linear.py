"""Matrix products of tokens and kernels.

All tokens are flattened into one dimension before the kernel:

  [B, T, D] x [D, N, H]  =  [B*T, D] x [D, N*H]

so that the gradient of the kernel is a product over one contracted dimension.
XLA on CPU runs that 2.4 times faster than the product over B and T; on TPU both
are the same program. B is the major dimension, so rows that are split over
devices stay where they are. Only when T itself is split would the flat
dimension not be splittable, and the plain contraction is used.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import sharding


def linear(x: jax.Array, kernel: jax.Array, num_in: int = 1, dtype=None) -> jax.Array:
  """Contracts the last `num_in` axes of x with the first `num_in` of the kernel.

  Args:
    x: f[..., *in], e.g. f[B, T, D] or f[B, T, N, H] with num_in = 2.
    kernel: f[*in, *out]; cast to x's dtype.
    num_in: number of contracted axes.
    dtype: of the result; default x's. float32 keeps the accumulator's precision.

  Returns:
    f[..., *out]

  Raises:
    ValueError: the contracted axes differ.
  """
  lead, inner = x.shape[: x.ndim - num_in], x.shape[x.ndim - num_in :]
  if inner != kernel.shape[:num_in]:
    raise ValueError(
      f'linear: x ends in {inner}, the kernel takes {kernel.shape[:num_in]}'
    )
  dtype = x.dtype if dtype is None else dtype
  kernel = kernel.astype(x.dtype)
  if sharding.parts('seq') > 1:
    return jnp.tensordot(x, kernel, num_in, preferred_element_type=dtype)
  size = int(np.prod(inner))
  y = jnp.dot(x.reshape(-1, size), kernel.reshape(size, -1), preferred_element_type=dtype)
  return y.reshape(lead + kernel.shape[num_in:])
