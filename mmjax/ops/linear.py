"""Matrix products of tokens and kernels.

All tokens are flattened into one dimension before the kernel, which keeps its own:

  [B, T, D] x [D, N, H]  =  [B*T, D] x [D, N, H]

so that the gradient of the kernel contracts one dimension instead of B and T,
which XLA on CPU runs up to 2.4 times faster. Compiled for a TPU v5e mesh of fsdp
and tensor it has the collectives of the plain einsum, where flattening the
kernel as well would gather it once more in the backward pass. B is the major
dimension, so rows that are split over devices stay where they are. Only when T
itself is split would the flat dimension not be splittable; then nothing is
flattened. On one CPU, with nothing to gather, the kernel is flat too: else XLA
turns the tokens' gradient round before the kernel's is made of it.

In bfloat16 XLA's CPU backend has a fast product (AMX, AVX-512) only if the result is
float32 and the first factor's contracted axis is its last; all else it computes from
float32 copies. There, `linear` and its gradients are written in that form:

  y         = x kernel           x [tokens, in], kernel [in, out]
  dx        = dy kernel^T
  dkernel   = x^T dy             x turned before
  y^T       = kernel^T x^T       of kernels that are `reused`, turned before: the first
                                 factor is read as it lies, the second written anew for
                                 the processor, which for few tokens should be x
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import sharding

_ZEROS = 32  # columns that move rows apart, see `_narrow_forward`
_reused = contextvars.ContextVar('reused', default=False)


@contextlib.contextmanager
def reused():
  """Inside, kernels are those of a loop's body, see `generate.once`: what is made of them
  is made once, so it pays to turn them, and to join those of one x."""
  token = _reused.set(True)
  try:
    yield
  finally:
    _reused.reset(token)


def linear(
  x: jax.Array,
  kernel: jax.Array,
  num_in: int = 1,
  dtype=None,
  scale: jax.Array | None = None,
) -> jax.Array:
  """Contracts the last `num_in` axes of x with the first `num_in` of the kernel.

  Args:
    x: f[..., *in], e.g. f[B, T, D] or f[B, T, N, H] with num_in = 2.
    kernel: f[*in, *out]; cast to x's dtype.
    num_in: number of contracted axes.
    dtype: of the result; default x's. float32 keeps the accumulator's precision.
    scale: f[] or f[out], a factor of the result (of one axis). Of many tokens it goes
      into the kernel, and so does its gradient: no pass over the tokens more.

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
  dtype = jnp.dtype(x.dtype if dtype is None else dtype)
  rows = _reused.get() and _is_narrow(x)
  fold = scale is not None and (rows or math.prod(lead) > math.prod(inner))
  if fold:
    kernel = _times(kernel, scale)
  if rows:
    return _by_rows(x, (kernel,), num_in)[0].astype(dtype)
  out = kernel.shape[num_in:]
  if sharding.parts('seq') == 1:
    x = x.reshape(-1, *inner)
  if sharding.one_cpu():
    x, kernel, num_in = x.reshape(len(x), -1), kernel.reshape(math.prod(inner), -1), 1
  one = sharding.one_cpu() and _is_narrow(x) and len(x) == 1
  if one:  # one token alone has no fast product
    x = _longer(x, 0, 1)
  if dtype == x.dtype and _is_narrow(x):
    y = _narrow(x, kernel, num_in)
  else:
    kernel = kernel.astype(x.dtype)
    y = jnp.tensordot(x, kernel, num_in, preferred_element_type=dtype)
  y = (y[:1] if one else y).reshape(lead + out)
  return y if scale is None or fold else _times(y, scale)


def linears(x: jax.Array, kernels: Sequence[jax.Array]) -> list[jax.Array]:
  """`linear` of x f[..., D] with each kernel f[D, *out]; maybe one product in all."""
  if _reused.get() and _is_narrow(x):
    return [y.astype(x.dtype) for y in _by_rows(x, kernels, 1)]
  return [linear(x, kernel) for kernel in kernels]


def _is_narrow(x):
  return x.dtype == jnp.bfloat16 and sharding.device()[0] == 'cpu'


def _by_rows(x, kernels, num_in):
  """f32[..., *out] each: a product whose first factor is all kernels, [outs, in]."""
  lead = x.shape[: x.ndim - num_in]
  x = x.reshape(math.prod(lead), -1)
  rows = [k.reshape(x.shape[1], -1).T.astype(x.dtype) for k in kernels]
  # Two tokens at least, as above. Behind barriers, or XLA would undo the turning.
  tokens = _longer(x, 0, max(2 - len(x), 0))
  kernel, tokens = map(jax.lax.optimization_barrier, (jnp.concatenate(rows), tokens))
  dims = ((1,), (1,)), ((), ())
  y = jax.lax.dot_general(kernel, tokens, dims, preferred_element_type=jnp.float32)
  y = jax.lax.optimization_barrier(y).T[: len(x)]
  ends = np.cumsum([len(r) for r in rows])[:-1]
  parts = zip(jnp.split(y, ends, 1), kernels)
  return [part.reshape(lead + k.shape[num_in:]) for part, k in parts]


def rounded(x: jax.Array, dtype) -> jax.Array:
  """x f32[...] in `dtype`, to the nearest, halfway to the even one.

  For bfloat16 on a CPU by integers: in a loop with XLA's own conversion an exponential
  isn't vectorised, and takes three times as long.
  """
  if jnp.dtype(dtype) != jnp.bfloat16 or sharding.device()[0] != 'cpu':
    return x.astype(dtype)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  up = bits + 0x7FFF + (bits >> 16 & 1)
  bits = jnp.where(jnp.isnan(x), bits | 0x400000, up) >> 16
  return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)


def _times(x, scale):
  """x f[..., D] times f[] or f[D], in x's dtype."""
  return x * scale.astype(x.dtype).reshape((1,) * (x.ndim - scale.ndim) + scale.shape)


def _narrow_product(x, kernel, num_in):
  """The product in bfloat16 on a CPU, see above; the kernel's gradient in its dtype."""
  return _wide(x, kernel.astype(x.dtype), num_in).astype(x.dtype)


_narrow = jax.custom_vjp(_narrow_product, nondiff_argnums=(2,))


def _narrow_back(num_in, factors, g):
  x, kernel = factors
  lead, out = x.ndim - num_in, kernel.ndim - num_in
  rest = tuple(range(num_in, kernel.ndim))
  dims = (tuple(range(lead, lead + out)), rest), ((), ())
  back = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
  width = kernel.shape[num_in - 1]
  taller = _longer(kernel.astype(g.dtype), num_in - 1, x.shape[-1] - width)  # as x was
  d_x = back(g, taller, dims)[..., :width]
  d_kernel = _wide(turned(x, lead), g, lead)[: len(kernel)]
  return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)


def turned(x: jax.Array, lead: int, batch: int = 0) -> jax.Array:
  """x with the first `lead` axes after its `batch` axes last: f[*batch, *lead, *rest] to
  f[*batch, *rest, *lead], written so: a first factor as CPUs want it."""
  # Behind a barrier, or the product would turn it back; then a reshape, since XLA looks
  # for rows that lie as they are written.
  y = jnp.expand_dims(x, batch)
  y = jnp.moveaxis(y, range(batch, batch + lead + 1), range(-lead - 1, 0))
  y = jax.lax.optimization_barrier(y)
  outer, rows, rest = x.shape[:batch], x.shape[batch:][:lead], x.shape[batch + lead :]
  return y.reshape(outer + rest + rows)


def _wide(x, y, num_in):
  return jnp.tensordot(x, y, num_in, preferred_element_type=jnp.float32)


def _narrow_forward(x, kernel, num_in):
  """Where rows lie a multiple of 1 KB apart, one column's entries push each other out of
  a CPU's cache: to turn x takes up to ten times as long, and results are written slowly.
  So tokens and results are made wider by zeros, here and in the gradient."""
  tokens, columns = len(x), kernel.shape[-1]
  taller = kernel
  if _crowds(tokens, x.shape[-1]):
    # By whole blocks: a loop that asks of each number if it is there, is slow.
    x = _longer(x.reshape(tokens, -1, _ZEROS), 1, 1).reshape(tokens, -1)
    taller = _longer(kernel, 0, _ZEROS)
  broader = _longer(taller, -1, _ZEROS * _crowds(tokens, columns))
  # By the function itself: remat's policies don't look into what has a gradient of its
  # own.
  return _narrow_product(x, broader, num_in)[..., :columns], (x, kernel)


def _crowds(tokens, width):
  return sharding.one_cpu() and width % 512 == 0 and tokens > 512


def _longer(x, axis, count):
  """x with so many zeros behind it along an axis."""
  if not count:
    return x
  width = [(0, 0)] * x.ndim
  width[axis] = 0, count
  return jnp.pad(x, width)


_narrow.defvjp(_narrow_forward, _narrow_back)


def batch_matmul(x: jax.Array, y: jax.Array, transpose: bool = False) -> jax.Array:
  """A product for each entry of two batch axes, e.g. for each row's heads.

  Args:
    x: f[B, K, M, C]
    y: f[B, K, C, S], or f[B, K, S, C] with `transpose`.

  Returns:
    f32[B, K, M, S]
  """
  if not (_is_narrow(x) and _is_narrow(y) and sharding.one_cpu()):
    spec = 'BKMC,BKSC->BKMS' if transpose else 'BKMC,BKCS->BKMS'
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)
  # Of one batch axis it is the fast product of above, of two it isn't.
  z = _narrow_each(*(z.reshape(-1, *z.shape[2:]) for z in (x, y)), transpose)
  return z.reshape(x.shape[:2] + z.shape[1:])


def _narrow_each_product(x, y, transpose):
  dims = ((2,), (2 if transpose else 1,)), ((0,), (0,))
  z = jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)
  # Transposed, it would be made a product that isn't there at all.
  return jax.lax.optimization_barrier(z)


_narrow_each = jax.custom_vjp(_narrow_each_product, nondiff_argnums=(2,))


def _narrow_each_back(transpose, factors, g):
  x, y = factors
  g = g.astype(x.dtype)
  left, right = (g, x) if transpose else (x, g)
  d_x = _narrow_each_product(g, y, not transpose)
  if left.shape[2] < 4 * right.shape[2]:
    d_y = _narrow_each_product(turned(left, 1, 1), right, False)
  else:  # it takes less to turn the other one, and the result
    d_y = _narrow_each_product(turned(right, 1, 1), left, False).swapaxes(1, 2)
  return d_x.astype(x.dtype), d_y.astype(y.dtype)


_narrow_each.defvjp(
  lambda x, y, t: (_narrow_each_product(x, y, t), (x, y)), _narrow_each_back
)


@jax.custom_vjp
def plus(y: jax.Array, bias: jax.Array) -> jax.Array:
  """y + bias over y's last axes, f[..., *out] + f[*out] -> f[..., *out].

  On a TPU the bias' gradient, a sum over all tokens, is a product with ones: the matrix
  unit adds up faster than the vector unit, and in float32.
  """
  return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def _plus_back(bias, g):
  lead = g.shape[: g.ndim - bias.ndim]
  if sharding.device()[0] != 'tpu':
    return g, jnp.sum(g, tuple(range(len(lead))))
  # Eight rows of ones, a register's, behind a barrier: else it is made a sum again.
  ones = jax.lax.optimization_barrier(jnp.ones((8, *lead), g.dtype))
  total = jnp.tensordot(ones, g, len(lead), preferred_element_type=jnp.float32)
  return g, total[0].astype(g.dtype)


plus.defvjp(lambda y, bias: (plus(y, bias), bias), _plus_back)
