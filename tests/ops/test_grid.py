import jax
import numpy as np
import pytest

from mmjax.ops.grid import item_sizes, pool_squares, read_table, waves


def cells(rows, columns):
  """i32[1, rows * columns, 3] in reading order."""
  grid = np.indices((1, rows, columns), np.int32).reshape(3, -1).T
  return np.ascontiguousarray(grid)[None]


@pytest.mark.parametrize('size', [(4, 6), (3, 5), (7, 6), (9, 2), (1, 1)])
def test_reads_a_table_as_an_image_is_resized(size):
  table = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)
  want = jax.image.resize(table, (*size, 3), 'linear', antialias=False)
  sizes = np.broadcast_to(np.array(size, np.int32), (1, size[0] * size[1], 2))
  got = read_table(table, cells(*size), sizes)
  np.testing.assert_allclose(got[0], want.reshape(-1, 3), atol=1e-6)
  if size == (4, 6):
    np.testing.assert_array_equal(got[0], table.reshape(-1, 3))


def test_sizes_are_of_the_owner():
  positions = np.concatenate([cells(2, 3), cells(3, 1), cells(1, 2)], 1)
  items = np.array([[1] * 6 + [2] * 3 + [0] * 2], np.int32)
  got = item_sizes(positions, items, 4)
  want = [[2, 3]] * 6 + [[3, 1]] * 3 + [[1, 1]] * 2
  np.testing.assert_array_equal(got[0], want)


def test_waves_tell_rows_from_columns():
  got = np.asarray(waves(cells(3, 4), 8))[0].reshape(3, 4, 8)
  np.testing.assert_array_equal(got[:1, :, :4], got[2:, :, :4])  # the column's half
  np.testing.assert_array_equal(got[:, :1, 4:], got[:, 3:, 4:])
  np.testing.assert_allclose(got[2, 3, :2], np.sin([3, 0.03]), atol=1e-6)
  np.testing.assert_allclose(got[2, 3, 6:], np.cos([2, 0.02]), atol=1e-6)
  with pytest.raises(ValueError, match='must be a multiple of 4, got 6'):
    waves(cells(1, 1), 6)


def test_squares_are_averaged_picture_by_picture():
  sizes = [(1, 4, 2), (2, 2, 6), (1, 2, 2)]
  rng = np.random.default_rng(0)
  pictures = [rng.normal(size=(*s, 3)).astype(np.float32) for s in sizes]
  grids = [np.indices(s, np.int32).reshape(3, -1).T for s in sizes]
  pad = 3
  x = np.concatenate([*(p.reshape(-1, 3) for p in pictures), np.ones((pad, 3), 'f')])
  positions = np.concatenate([*grids, np.zeros((pad, 3), np.int32)])
  items = np.repeat([1, 2, 3, 0], [*(len(g) for g in grids), pad]).astype(np.int32)
  want = [
    p.reshape(t, r // 2, 2, c // 2, 2, 3).mean((2, 4)).reshape(-1, 3)
    for p, (t, r, c) in zip(pictures, sizes)
  ]
  got = pool_squares(x[None], items[None], positions[None], 4, 2)
  assert got.shape == (1, len(x) // 4, 3)
  want = np.concatenate(want)
  np.testing.assert_allclose(got[0, : len(want)], want, atol=1e-6)
  np.testing.assert_array_equal(got[0, len(want) :], 0)
