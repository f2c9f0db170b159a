"""Parameters that don't quite fit: more words, another grid, parts put together.

  grow_vocabulary   rows for new tokens, at the mean of the old (Hewitt, 2021): a new
                    word begins about as likely as the average one, and what the old
                    words get is theirs bit by bit
  resize_positions  a table of positions for another grid, as the model reads it
  cut_positions     the first of a table's vectors
  stitch            this encoder, that language model, in one tree

Pure functions of arrays and trees of arrays.
"""

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.names import closest
from mmjax.ops.grid import read_table


def grow_vocabulary(
  table: Any, size: int, *, axis: int = 0, seed: int = 0, noise: float = 0.02
) -> np.ndarray:
  """A table with `size` words: the old as they are, then new ones.

  Args:
    table: f[V, D], or with the words on another axis: f[D, V], f[V].
    size: >= V; see `padded`.
    axis: of the words.
    seed: of the noise, which tells the new words apart.
    noise: its size, in standard deviations of the old words.

  Raises:
    ValueError: fewer words than there are.
  """
  old = np.moveaxis(np.asarray(table), axis, 0)
  if size < len(old):
    raise ValueError(f'a vocabulary of {len(old)} does not shrink to {size}')
  exact = old.astype(np.float32)
  shape = (size - len(old), *old.shape[1:])
  draw = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
  new = exact.mean(0) + noise * exact.std(0) * draw
  return np.moveaxis(np.concatenate([old, new.astype(old.dtype)]), 0, axis)


def padded(size: int, multiple: int) -> int:
  """The least multiple that is no less than size, so that a table divides."""
  return -(-size // multiple) * multiple


def resize_positions(
  table: Any, old: tuple[int, int], new: tuple[int, int]
) -> np.ndarray:
  """A learned table for another grid, f[X + rows * columns, D] -> f[X + r * c, D].

  What a picture of `new` patches reads of the old table (`ops.grid.read_table`) are the
  entries of the new one; the same grid gives the same table. The first X entries are
  those of class tokens, and stay.

  Raises:
    ValueError: the table is smaller than the old grid.
  """
  table = np.asarray(table)
  first = len(table) - old[0] * old[1]
  if first < 0:
    raise ValueError(f'a table of {len(table)} positions has no grid {tuple(old)}')
  rows, columns = new
  at = np.indices((1, rows, columns), np.int32).reshape(3, 1, -1).transpose(1, 2, 0)
  sizes = np.broadcast_to(np.int32(new), (1, rows * columns, 2))
  grid = table[first:].reshape(*old, -1)
  read = jax.jit(read_table)(jnp.asarray(grid), jnp.asarray(at), jnp.asarray(sizes))
  return np.concatenate([table[:first], np.asarray(read)[0].astype(table.dtype)])


def cut_positions(table: Any, count: int) -> np.ndarray:
  """The first `count` vectors, f[P, D] -> f[count, D].

  Raises:
    ValueError: more than there are; nobody has trained those.
  """
  if count > len(table):
    raise ValueError(f'a table of {len(table)} positions does not grow to {count}')
  return np.asarray(table)[:count]


def stitch(params: Any, parts: Mapping[str, Any]) -> Any:
  """The tree with subtrees put in by path: {'lm': ..., 'vision': ...}.

  Raises:
    ValueError: no such path, or a part that isn't what stands there.
  """
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  for path, part in parts.items():
    here = {k for k in flat if k.startswith(path + '/') or k == path}
    if not here:
      tops = {'/'.join(k.split('/')[:n]) for k in flat for n in (1, 2)}
      raise ValueError(f'stitch: no parameters at {path!r}{closest(path, tops)}')
    new = flax.traverse_util.flatten_dict({path: part}, sep='/')
    for name in sorted(here | new.keys()):
      a, b = (
        jax.tree.map(np.shape, tree[name]) if name in tree else None
        for tree in (flat if name in here else {}, new)
      )
      if a != b:
        raise ValueError(f'stitch: {name} is {_told(b)} in the part, {_told(a)} here')
    flat |= new
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def _told(shape):
  return 'absent' if shape is None else str(list(shape))
