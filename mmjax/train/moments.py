"""An optimizer's moments in bfloat16: half the memory, and no drift.

A moment m moves by (1 - b) (g - m) a step, which for b = 0.999 is less than half the gap
between neighbouring bfloat16s (m / 256): rounded to the nearest, it would never move.
So arithmetic is float32, and what is put back is rounded up or down at random, with the
mean right (Gupta et al. 1502.02551; for optimizers Zamirai et al. 2010.06192):

  kept bf16 --> f32 --> the optimizer --> f32 --> + 16 random bits, cut --> kept bf16

The bits are a function of the update's number and the leaf alone, so a run that resumes,
or has another mesh, draws the same ones.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Stored(NamedTuple):
  """count: i32[] updates made; inner: the optimizer's state, its moments bfloat16."""

  count: jax.Array
  inner: Any


def stored(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """`tx` with its moments kept in bfloat16.

  A moment is a leaf of the state that is like a parameter, see `parameter_of`; all
  others, such as Adafactor's rows and columns, are kept as they are.
  """

  def init(params):
    state = _moments(tx.init(params), params, lambda x, _: x.astype(jnp.bfloat16))
    return Stored(jnp.zeros((), jnp.int32), state)

  def update(updates, state, params=None):
    inner = _moments(state.inner, params, lambda x, _: x.astype(jnp.float32))
    updates, inner = tx.update(updates, inner, params)
    seed = _mix(state.count.astype(jnp.uint32))

    def put(x, i):
      return round_at_random(x, _mix(seed + jnp.uint32(i)))

    return updates, Stored(state.count + 1, _moments(inner, params, put))

  return optax.GradientTransformation(init, update)


def round_at_random(x: jax.Array, seed: jax.Array) -> jax.Array:
  """f32 -> bf16, one of the two neighbours of x, by chance so that the mean is x.

  Args:
    seed: u32[]
  """
  place, size = jnp.zeros(x.shape, jnp.uint32), 1
  for axis in reversed(range(x.ndim)):
    step = jnp.uint32(size % 2**32)
    place = place + step * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    size *= x.shape[axis]
  bits = _mix(_mix(place) ^ seed) >> 16
  whole = jax.lax.bitcast_convert_type(x, jnp.uint32)
  cut = (whole + bits) & jnp.uint32(0xFFFF0000)
  cut = jax.lax.bitcast_convert_type(cut, jnp.float32)
  return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def _mix(x):
  """Makes every bit of u32 depend on all of them (MurmurHash3's last step).

  As good here as JAX's generator, which on a CPU takes longer than the optimizer.
  """
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def parameter_of(path: tuple, leaf: Any, shapes: dict[tuple, tuple]) -> tuple | None:
  """The path of the parameter that a leaf of an optimizer's state is like, or None.

  That is the one whose path the leaf's ends in, such as mu/<path>, if shapes are equal.

  Args:
    shapes: by path of a parameter, its shape.
  """
  ends = (path[start:] for start in range(len(path)))
  return next((end for end in ends if shapes.get(end) == leaf.shape), None)


def _moments(state, params, f):
  """The state with f(leaf, its number) in place of every moment."""
  flat = jax.tree_util.tree_leaves_with_path(params)
  shapes = {path: x.shape for path, x in flat}
  leaves, tree = jax.tree_util.tree_flatten_with_path(state)

  def one(i, path, leaf):
    real = jnp.issubdtype(leaf.dtype, jnp.floating)
    return f(leaf, i) if real and parameter_of(path, leaf, shapes) else leaf

  made = [one(i, path, leaf) for i, (path, leaf) in enumerate(leaves)]
  return jax.tree.unflatten(tree, made)
