"""Computes what rows really use of their places, at shapes that don't change.

Rows of one size hold targets of many numbers, so some places of each stay empty. A
device puts those of its rows that are used first, and computes as many as the fullest
device has, in steps of an eighth, five at least:

  used      xxxxx... xx...... xxxxxx..      of three rows
  computed  xxxxxxxxxxxxx--                 5 eighths of 24

Each of the sizes is compiled, and all devices take the same one. No place leaves the
device that its row is on.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmjax.sharding import parts

_EIGHTHS = range(5, 9)


class First(NamedTuple):
  """The first `size` places of each device G, once those that are used stand first.

  order: i32[G, N], the place that comes there; rank: i32[G, N], where a place went.
  """

  order: jax.Array
  rank: jax.Array
  size: int

  def pick(self, x: jax.Array) -> jax.Array:
    """[G * N, ...] -> [G * size, ...]"""
    return self._take(x, self.order[:, : self.size])

  def put(self, x: jax.Array) -> jax.Array:
    """[G * size, ...] -> [G * N, ...]; what has no place gets that of the last."""
    return self._take(x, jnp.minimum(self.rank, self.size - 1))

  def _take(self, x, index):
    x = x.reshape(len(index), -1, *x.shape[1:])
    index = index.reshape(index.shape + (1,) * (x.ndim - 2))
    x = jnp.take_along_axis(x, index, 1)
    return x.reshape(-1, *x.shape[2:])


def compute_used(run: Callable[[First], Any], used: jax.Array) -> Any:
  """run(`First`) with the least of the sizes that holds all used places of any device.

  Args:
    run: gives arrays whose shapes don't depend on the size, e.g. by `First.put`.
    used: bool[places], the rows of one device after those of another.
  """
  used = used.reshape(parts('batch'), -1)
  N = used.shape[1]
  order = jnp.argsort(~used, axis=1, stable=True).astype(jnp.int32)
  rank = jnp.argsort(order, axis=1).astype(jnp.int32)
  sizes = sorted({math.ceil(N * n / 8) for n in _EIGHTHS})
  most = jnp.max(jnp.sum(used, 1))
  which = sum((most > n).astype(jnp.int32) for n in sizes[:-1])
  return jax.lax.switch(which, [lambda n=n: run(First(order, rank, n)) for n in sizes])
