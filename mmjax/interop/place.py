"""From tensors of files to a parameter on its devices.

A process reads what its devices hold, slice by slice, and keeps little on the host:

  up to HOST bytes   the parts of all devices are read and handed over
  more               zeros are made on the devices, and written block by block, a layer
                     or a few rows at a time

On a CPU what is handed over is the memory that was read into, not a copy of it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mmjax.interop.leaf import Leaf

HOST = 16_000_000  # bytes of a parameter that may be on the host at once
_BLOCK = 4_000_000  # bytes of a block of rows, over all devices
_ALIGNED = 64  # what JAX asks of memory that it takes as it is


def place(source: Any, leaf: Leaf, abstract: Any, where: NamedSharding) -> jax.Array:
  """The parameter on its devices.

  Args:
    source: source[name] gives slices of a tensor, see `interop.files.Source`.
    abstract: shape and dtype of the parameter, stacked over layers if the leaf is.
  """
  shape, axis = tuple(abstract.shape), 0 if leaf.stacked else leaf.slowest
  part = math.prod(where.shard_shape(shape)) * np.dtype(abstract.dtype).itemsize
  parts = len(set(map(_key, where.addressable_devices_indices_map(shape).values())))
  if not shape or part * parts <= HOST or where.shard_shape(shape)[axis] < shape[axis]:
    return _read(source, leaf, shape, abstract.dtype, where)
  size = math.prod(shape) * np.dtype(abstract.dtype).itemsize
  step = 1 if leaf.stacked else min(shape[axis], max(1, shape[axis] * _BLOCK // size))
  block = (*shape[:axis], step, *shape[axis + 1 :])
  whole = _zeros(shape, abstract.dtype, where)
  for i in range(0, shape[axis], step):
    i = min(i, shape[axis] - step)  # blocks are of one size; the last may overlap
    x = _read(source, leaf, shape, abstract.dtype, where, block, axis, i)
    whole = _set(whole, x, np.int32(i), axis, where)
  return whole


def _read(source, leaf, shape, dtype, where, block=None, axis=0, start=0) -> jax.Array:
  """The parameter, or its block from `start` on, through memory of the host."""
  block = block or shape
  found = where.addressable_devices_indices_map(block)
  held = {}  # devices that hold the same part share one
  for index in found.values():
    spans = [slice(*i.indices(n)[:2]) for i, n in zip(index, block)]
    if spans:
      here = spans[axis]
      spans[axis] = slice(here.start + start, here.stop + start)
    held[_key(index)] = spans, _empty([s.stop - s.start for s in spans], dtype)
  if leaf.stacked:
    layers = [(s[0].start, s[0].stop) for s, _ in held.values()]
    for i in range(min(a for a, _ in layers), max(b for _, b in layers)):
      tensor = source[leaf.theirs.format(i)]
      for (layer, *index), memory in held.values():
        if layer.start <= i < layer.stop:
          memory[i - layer.start] = leaf.take(tensor, shape[1:], index)
  else:
    tensor = source[leaf.theirs]
    for index, memory in held.values():
      memory[...] = leaf.take(tensor, shape, index)
  arrays = [jax.device_put(held[_key(index)][1], d) for d, index in found.items()]
  return jax.make_array_from_single_device_arrays(tuple(block), where, arrays)


def _key(index):
  return tuple((i.start, i.stop) for i in index)


def _empty(shape, dtype) -> np.ndarray:
  size = math.prod(shape) * np.dtype(dtype).itemsize
  memory = np.empty(size + _ALIGNED, np.uint8)
  first = -memory.ctypes.data % _ALIGNED
  return memory[first : first + size].view(dtype).reshape(shape)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape, dtype, where):
  return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), where)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
def _set(whole, block, start, axis, where):
  """Writes one block in place, so that the parameter is there only once."""
  whole = jax.lax.dynamic_update_slice_in_dim(whole, block, start, axis)
  return jax.lax.with_sharding_constraint(whole, where)
