"""Rows taken from arrays that are split over devices, moving no more than need be.

  take     x [B, S, D] and the slots are both split over the stream's devices: a ring
  lookup   the table [V, D] is split by words and by width: each device looks its part
           up, for the rows of all that share it, and then they exchange

                 tokens          part of the table       exchanged
    device 0     a b        ->   a0 b0 c0 d0         ->  a0 a1 b0 b1
    device 1     c d             a1 b1 c1 d1             c0 c1 d0 d1

Left to the compiler, both gather one of the sides whole on every device as soon as a
mesh has three axes. On one device both are plain indexing.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mmjax import sharding
from mmjax.sharding import mesh_axes


def take(x: jax.Array, index: jax.Array) -> jax.Array:
  """x[b, index[b, t]], f[B, S, D] and i32[B, T] -> f[B, T, D], both split by 'seq'.

  E.g. an encoder's outputs at the slots whose `source` names them, which may stand on
  another device. Pieces of x go round the ring of devices, or, if those are fewer, the
  slots do; neither is ever whole on a device.

  Raises:
    ValueError: T doesn't divide over the mesh.
  """
  axes = mesh_axes('seq')
  if not axes or x.shape[1] % ways(axes):  # then x is whole
    return jnp.take_along_axis(x, index[..., None], 1)
  names = 'batch', 'seq', 'act_embed'
  x_spec = spec('what is taken from', x.shape, names)
  i_spec = spec('slots', index.shape, names[:2])
  run = functools.partial(_take_round, axes)
  return jax.shard_map(run, in_specs=(x_spec, i_spec), out_specs=P(*i_spec, x_spec[2]))(
    x, index
  )


def _take_round(axes, x, index):
  n, size = ways(axes), x.shape[1]
  here = jax.lax.axis_index(axes)
  slots_travel = index.shape[1] < size

  def more(out, x, index, owner):
    at = index - owner * size
    rows = jnp.take_along_axis(x, jnp.clip(at, 0, size - 1)[..., None], 1)
    rows = jnp.where(((at >= 0) & (at < size))[..., None], rows, 0)
    return rows if out is None else out + rows

  def one_round(carry, i):
    out, moved = carry
    if slots_travel:
      out, moved = onward((out, moved), axes)
      return (more(out, x, moved, here), moved), None
    moved = onward(moved, axes)
    return (more(out, moved, index, (here - i) % n), moved), None

  carry = more(None, x, index, here), index if slots_travel else x
  (out, _), _ = jax.lax.scan(one_round, carry, jnp.arange(1, n))
  return onward(out, axes) if slots_travel else out


def lookup(table: jax.Array, index: jax.Array, dtype: Any = None) -> jax.Array:
  """table[index], f[V, D] named ('vocab', 'embed') and i32[B, T] -> f[B, T, D].

  What is V or more gives NaN.

  Args:
    dtype: of the result, and of what is exchanged; default the table's.

  Raises:
    ValueError: sizes that don't divide over the mesh.
  """
  dtype = table.dtype if dtype is None else dtype
  words, width = mesh_axes('vocab'), mesh_axes('embed')
  if not words and not width:
    return rows(table, index).astype(dtype)
  table_spec = spec('a table', table.shape, ('vocab', 'embed'))
  i_spec = spec('slots', index.shape, ('batch', 'seq'))
  batch, V = mesh_axes('batch'), len(table)
  # Rows go back to their own devices; what has no rows of its own gets all of D.
  shared = width if batch[len(batch) - len(width) :] == width else ()
  others = tuple(a for a in batch + mesh_axes('seq') if a not in words + width)

  def run(table, index):
    if shared:
      index = jax.lax.all_gather(index, shared, tiled=True)
    # Each device's own part, so that its gradient is summed here before it is sent.
    table = jax.lax.pcast(table, others, to='varying') if others else table
    if words:
      at = index - jax.lax.axis_index(words) * len(table)
      here = (at >= 0) & (at < len(table))
      out = rows(table, jnp.clip(at, 0, len(table) - 1)).astype(dtype)
      out = jax.lax.psum(jnp.where(here[..., None], out, 0), words)
      known = (index >= 0) & (index < V)
      out = jnp.where(known[..., None], out, jnp.nan)
    else:
      out = rows(table, index).astype(dtype)
    return jax.lax.all_to_all(out, shared, 0, 2, tiled=True) if shared else out

  out_spec = P(*i_spec, None if shared or not width else width)
  return jax.shard_map(run, in_specs=(table_spec, i_spec), out_specs=out_spec)(
    table, index
  )


def rows(table: jax.Array, index: jax.Array) -> jax.Array:
  """table[index], f[V, D] and i32[...] >= 0 -> f[..., D]; NaN beyond the table.

  The gradient of a frequent row is a sum of thousands, and one in bfloat16 stops to grow
  after 256 terms of one size. So a narrow table's is summed in float32 and rounded once.
  """
  if table.dtype.itemsize >= 4:
    return jnp.take(table, index, axis=0, mode='fill')
  return _rows(table, index)


@jax.custom_vjp
def _rows(table, index):
  if sharding.device()[0] != 'cpu' or table.dtype.itemsize != 2:
    return jnp.take(table, index, axis=0, mode='fill')
  # As bits, or the whole table would be converted to float32. All ones are NaN. Behind a
  # barrier with the index, or a loop would have the bits of all of it written before it.
  table, index = jax.lax.optimization_barrier((table, index))
  bits = jax.lax.bitcast_convert_type(table, jnp.uint16)
  bits = jnp.take(bits, index, axis=0, mode='fill', fill_value=0xFFFF)
  return jax.lax.bitcast_convert_type(bits, table.dtype)


def _rows_backward(residuals, g):
  table, index = residuals
  sums = jnp.zeros_like(table, jnp.float32)
  sums = sums.at[index].add(g.astype(jnp.float32), mode='drop')
  return sums.astype(table.dtype), None


_rows.defvjp(lambda table, index: (_rows(table, index), (table, index)), _rows_backward)


def spec(what: str, shape: tuple[int, ...], names: tuple[str | None, ...]) -> P:
  """The `PartitionSpec` of an array here, of mesh axes that have several devices.

  Raises:
    ValueError: a size doesn't divide over the mesh.
  """
  rules = {name: mesh_axes(name) or None for name in names if name}
  mesh = jax.sharding.get_abstract_mesh()
  return sharding.to_spec(names, rules, f'{what} {tuple(shape)}', shape, mesh)


def ways(axes: tuple[str, ...]) -> int:
  """The number of devices along some mesh axes."""
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape[a] for a in axes)


def onward(tree: Any, axes: tuple[str, ...]) -> Any:
  """Everything to the next device of the ring along some mesh axes."""
  n = ways(axes)
  perm = [(i, (i + 1) % n) for i in range(n)]
  return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, perm), tree)
