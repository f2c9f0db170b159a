import jax
import numpy as np
import pytest

from mmjax.ops.grid import item_sizes, read_table, waves


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
