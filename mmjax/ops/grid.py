"""Where a patch is in its picture: tables and waves over rows and columns.

A learned table of one size serves pictures of every size: each patch reads it where
the patch's middle would be, between its neighbours (bilinear, as the resizing of an
image without antialiasing):

  table    0   1   2   3         4 columns
  patch    0     1     2         of 3 columns: at (c + 1/2) * 4/3 - 1/2

Letters: B rows, P patches, I items, D width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.shape import check


def item_sizes(positions: jax.Array, items: jax.Array, num_items: int) -> jax.Array:
  """Rows and columns of the item that each patch belongs to.

  Args:
    positions: i32[B, P, 3] time, row, column.
    items: i32[B, P] the owner, from 1; 0 = padding.
    num_items: I.

  Returns:
    i32[B, P, 2]; 1, 1 for padding.
  """
  check('B P 3', positions, 'B P', items)
  ids = jnp.arange(1, num_items + 1, dtype=jnp.int32)
  mine = items[:, :, None] == ids[None, None]  # [B, P, I]
  here = jnp.where(mine[..., None], positions[:, :, None, 1:], 0)
  sizes = jnp.max(here, 1) + 1  # [B, I, 2]
  owner = jnp.maximum(items - 1, 0)[..., None]
  return jnp.where(items[..., None] > 0, jnp.take_along_axis(sizes, owner, 1), 1)


def read_table(table: jax.Array, positions: jax.Array, sizes: jax.Array) -> jax.Array:
  """Reads a table of positions between its entries, in float32.

  Args:
    table: f[rows, columns, D]
    positions: i32[B, P, 3] time, row, column.
    sizes: i32[B, P, 2] rows and columns of the patch's picture.

  Returns:
    f32[B, P, D]; the table's own entries, exactly, where sizes are the table's.
  """
  have = np.array(table.shape[:2], np.float32)[None, None]
  at = (positions[..., 1:].astype(jnp.float32) + 0.5) * (
    have / sizes.astype(jnp.float32)
  ) - 0.5
  at = jnp.clip(at, 0, have - 1)
  low = jnp.floor(at)
  share = at - low  # of the next entry
  low = low.astype(jnp.int32)
  high = jnp.minimum(low + 1, have.astype(jnp.int32) - 1)
  flat = table.astype(jnp.float32).reshape(-1, table.shape[-1])

  def read(rows, columns):
    return jnp.take(flat, rows * table.shape[1] + columns, axis=0)

  down, right = share[..., :1], share[..., 1:]
  above = (1 - right) * read(low[..., 0], low[..., 1])
  above = above + right * read(low[..., 0], high[..., 1])
  below = (1 - right) * read(high[..., 0], low[..., 1])
  below = below + right * read(high[..., 0], high[..., 1])
  return (1 - down) * above + down * below


def waves(positions: jax.Array, width: int, base: float = 10_000.0) -> jax.Array:
  """Sines and cosines of row and column (2205.01580, section 2; as in MAE).

  Args:
    positions: i32[B, P, 3] time, row, column.
    width: D, a multiple of 4.

  Returns:
    f32[B, P, D]: sin and cos of the column, then of the row, D/4 frequencies each.

  Raises:
    ValueError: a width that 4 doesn't divide.
  """
  if width % 4:
    raise ValueError(f'sin-cos positions: the width must be a multiple of 4, got {width}')
  frequency = (base ** (-np.arange(width // 4) / (width // 4))).astype(np.float32)
  angle = positions[..., 1:, None].astype(jnp.float32) * frequency[None, None, None]
  row, column = angle[..., 0, :], angle[..., 1, :]
  parts = jnp.sin(column), jnp.cos(column), jnp.sin(row), jnp.cos(row)
  return jnp.concatenate(parts, -1)


def pool_squares(
  x: jax.Array, items: jax.Array, positions: jax.Array, num_items: int, side: int
) -> jax.Array:
  """The mean of each side x side tokens of every picture, picture after picture.

  Args:
    x: f[B, P, D]
    items: i32[B, P] the owner, from 1; 0 = padding.
    positions: i32[B, P, 3] time, row, column; a picture's tokens stand in reading order
      and its rows and columns are multiples of `side`.
    num_items: I.

  Returns:
    f[B, P / side^2, D], rounded down; 0 where there is no picture.
  """
  P = check('B P D', x, 'B P', items, 'B P 3', positions)['P']
  sizes = item_sizes(positions, items, num_items) // side
  time, row, column = (positions[..., i] for i in range(3))
  ids = jnp.arange(1, num_items + 1, dtype=items.dtype)
  before = jnp.sum((items[:, :, None] > 0) & (items[:, :, None] < ids[None, None]), 1)
  before = jnp.take_along_axis(before, jnp.maximum(items - 1, 0), 1) // side**2
  place = (time * sizes[..., 0] + row // side) * sizes[..., 1] + column // side
  place = jnp.where(items > 0, before + place, -1)
  into = place[..., None] == jnp.arange(P // side**2, dtype=place.dtype)[None, None]
  total = jnp.einsum(
    'BPQ,BPD->BQD', into.astype(x.dtype), x, preferred_element_type=jnp.float32
  )
  return (total / side**2).astype(x.dtype)
