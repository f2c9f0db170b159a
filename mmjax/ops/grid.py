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
