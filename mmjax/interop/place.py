"""From a tensor of a file to a parameter on its devices.

A process reads what its devices hold, slice by slice, and of stacked layers one at
a time, so that the host never holds more than a tensor's slices.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.interop.leaf import Leaf


def place(source: Any, leaf: Leaf, abstract: Any, where: NamedSharding) -> jax.Array:
  """The parameter on its devices.

  Args:
    source: source[name] gives slices of a tensor, see `interop.files.Source`.
    abstract: shape and dtype of the parameter, stacked over layers if the leaf is.
  """

  def put(theirs, shape, where):
    held = {}  # devices that hold the same slice share one read

    def read(index):
      key = tuple((i.start, i.stop) for i in index)
      if key not in held:
        held[key] = leaf.take(theirs, shape, index).astype(abstract.dtype)
      return held[key]

    return jax.make_array_from_callback(shape, where, read)

  if not leaf.stacked:
    return put(source[leaf.theirs], abstract.shape, where)
  L, *shape = abstract.shape
  layer_where = NamedSharding(where.mesh, P(*where.spec[1:]))
  stack = _zeros(abstract.shape, abstract.dtype, where)
  for i in range(L):
    layer = put(source[leaf.theirs.format(i)], tuple(shape), layer_where)
    stack = _set(stack, layer, np.int32(i), where)
  return stack


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape, dtype, where):
  return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), where)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _set(stack, layer, i, where):
  """Writes one layer in place, so that the stack is there only once."""
  stack = jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)
  return jax.lax.with_sharding_constraint(stack, where)
