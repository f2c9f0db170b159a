import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax import sharding
from mmjax.ops import conv as ops


def draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def windows(x, h, stride, before, size):
  """[B, H', W', h, h, D]: what a window sees, zeros outside, written as loops."""
  B, H, W, D = x.shape
  out = np.zeros((B, *size, h, h, D), x.dtype)
  for r, c, i, j in np.ndindex(*size, h, h):
    row, column = r * stride + i - before[0], c * stride + j - before[1]
    if 0 <= row < H and 0 <= column < W:
      out[:, r, c, i, j] = x[:, row, column]
  return out


def laid_out(seed=0, dtype=np.uint8):
  """Three items of 2 x 3 patches of 2 x 2 pixels, shuffled in the bank; none is 2."""
  rng = np.random.default_rng(seed)
  images = rng.integers(1, 255, (3, 4, 6, 3)).astype(dtype)
  images[1] = 0
  values, items, positions = [], [], []
  for i, r, c in np.ndindex(3, 2, 3):
    if i != 1:
      values.append(images[i, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].reshape(12))
      items.append(i + 1)
      positions.append((0, r, c))
  values += [np.full(12, 9, dtype)] * 2  # padding, which is not black
  items, positions = [*items, 0, 0], [*positions, (0, 0, 0), (0, 1, 1)]
  order = rng.permutation(len(items))
  bank = (np.array(a)[order][None] for a in (values, items, positions))
  values, items, positions = bank
  return images, values, items.astype(np.int32), positions.astype(np.int32)


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
def test_patches_become_the_pictures_they_were_cut_from(dtype):
  images, values, items, positions = laid_out(dtype=dtype)
  got = ops.pictures(values, items, positions, 3, (2, 3))
  assert got.dtype == dtype
  np.testing.assert_array_equal(got, images)


def test_rows_keep_to_themselves():
  rows = [laid_out(seed) for seed in (0, 1)]
  images, *bank = (np.concatenate(parts) for parts in zip(*rows))
  got = ops.pictures(*bank, 3, (2, 3))
  np.testing.assert_array_equal(got, images)


@pytest.mark.parametrize('where', [(0, 2, 0), (0, 0, 3), (1, 0, 0), (0, -1, 0)])
def test_what_is_outside_of_the_grid_is_left_out(where):
  images, values, items, positions = laid_out()
  positions[0, items[0] == 0] = where
  items[0, items[0] == 0] = 1
  got = ops.pictures(values, items, positions, 3, (2, 3))
  np.testing.assert_array_equal(got, images)


def test_items_beyond_the_last_are_left_out():
  images, values, items, positions = laid_out()
  got = ops.pictures(values, items, positions, 2, (2, 3))
  np.testing.assert_array_equal(got, images[:2])


def test_cells_stand_item_after_item_in_reading_order():
  owner, where = ops.cells(jnp.array([[1, 0], [1, 2]], jnp.int32), (1, 2))
  np.testing.assert_array_equal(owner, [[1, 1, 0, 0], [1, 1, 2, 2]])
  np.testing.assert_array_equal(where[0], [[0, 0, 0], [0, 0, 1]] * 2)
  np.testing.assert_array_equal(where[0], where[1])


# Of TensorFlow's rule: sizes 7 and 8, windows 3 and 5 at stride 2.
@pytest.mark.parametrize(
  ('size', 'window', 'stride', 'want'),
  [(7, 3, 2, (1, 1)), (8, 3, 2, (0, 1)), (8, 5, 2, (1, 2)), (8, 3, 1, (1, 1)),
   (3, 1, 2, (0, 0)), (8, 2, 2, (0, 0)), (7, 2, 2, (0, 1))],
)  # fmt: skip
def test_same_padding_of_tensorflow(size, window, stride, want):
  assert ops.pads(size, window, stride, 'same') == want
  assert ops.out_size(size, window, stride, 'same') == -(-size // stride)


@pytest.mark.parametrize('padding', ['same', 1])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('groups', [1, 2])
def test_conv_is_products_with_windows(padding, stride, groups):
  x, kernel = draw(2, 5, 8, 4), draw(3, 3, 4 // groups, 6, seed=1)
  got = jax.jit(ops.conv, static_argnums=(2, 3, 4))(x, kernel, stride, padding, groups)
  before = [ops.pads(n, 3, stride, padding)[0] for n in (5, 8)]
  seen = windows(x, 3, stride, before, got.shape[1:3])
  seen = np.split(seen, groups, -1)
  parts = np.split(kernel, groups, -1)
  want = [np.einsum('BHWijd,ijdE->BHWE', s, k) for s, k in zip(seen, parts)]
  np.testing.assert_allclose(got, np.concatenate(want, -1), atol=1e-5)


def test_gradient_of_a_grouped_kernel_on_any_mesh():
  """Pictures are split over one axis of the mesh and whole over the other."""
  x, kernel = draw(8, 3, 4, 4), draw(3, 3, 2, 6, seed=1)

  def loss(kernel, x, groups):
    return jnp.sum(jnp.sin(ops.conv(x, kernel, 2, groups=groups)))

  def parts(kernel, x):  # the groups one by one
    pairs = zip(jnp.split(kernel, 2, -1), jnp.split(x, 2, -1))
    return sum(loss(k, a, 1) for k, a in pairs)

  want = jax.jit(jax.grad(parts, (0, 1)))(kernel, x)
  mesh = sharding.make_mesh({'fsdp': 4, 'tensor': 2})
  rows = NamedSharding(mesh, P('fsdp'))
  gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
  for at in (x, jax.device_put(x, rows)):
    for got, w in zip(gradient(kernel, at, 2), want):
      np.testing.assert_allclose(got, w, atol=1e-5)


@pytest.mark.parametrize(('window', 'stride', 'padding'), [(3, 1, 'same'), (5, 2, 'same'),
                                                           (3, 2, 1)])  # fmt: skip
def test_depthwise_is_a_conv_of_one_channel_per_group(window, stride, padding):
  x, kernel = draw(2, 7, 8, 4), draw(window, window, 1, 4, seed=1)

  def both(x, kernel):
    one = ops.depthwise(x, kernel, stride, padding)
    return one, ops.conv(x, kernel, stride, padding, groups=4)

  got, want = jax.jit(both)(x, kernel)
  assert got.shape == want.shape
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_pools():
  x = draw(2, 5, 6, 3)
  seen = windows(x - 100, 3, 2, (1, 1), (3, 3)) + 100  # what is outside is never largest
  want = np.where(seen == 100, -np.inf, seen).max((3, 4))
  np.testing.assert_allclose(ops.max_pool(x, 3, 2, 1), want, atol=2e-5)
  got = ops.mean_pool(x, 2)
  assert got.shape == (2, 3, 3, 3)
  np.testing.assert_allclose(got[:, 0, 1], x[:, :2, 2:4].mean((1, 2)), atol=1e-6)
  np.testing.assert_allclose(got[:, 2, 1], x[:, 4:, 2:4].mean((1, 2)), atol=1e-6)


def test_standardised_kernels():
  kernel, gain = 3 + 0.1 * draw(3, 3, 64, 5), 1 + draw(5, seed=1)
  got = np.asarray(ops.standardised(kernel, gain))
  np.testing.assert_allclose(got.mean((0, 1, 2)), np.zeros(5), atol=1e-6)
  np.testing.assert_allclose(got.var((0, 1, 2)) * 9 * 64, gain**2, rtol=1e-4)
  # What has no spread is divided by no zero.
  flat = ops.standardised(np.ones((1, 1, 4, 5), np.float32), gain)
  np.testing.assert_array_equal(flat, np.zeros((1, 1, 4, 5)))


def test_affine_and_group_norm():
  x, (scale, bias, mean) = 2 + draw(2, 3, 4, 6), draw(3, 6, seed=1)
  var = np.square(draw(6, seed=2)) + 0.1
  want = (x - mean) / np.sqrt(var + 1e-3) * scale + bias
  np.testing.assert_allclose(ops.affine(x, scale, bias, mean, var, 1e-3), want, atol=1e-5)
  parts = x.reshape(2, 12, 3, 2)
  want = (parts - parts.mean((1, 3), keepdims=True)) / np.sqrt(
    parts.var((1, 3), keepdims=True) + 1e-5
  )
  got = ops.group_norm(x, scale, bias, 3, 1e-5)
  np.testing.assert_allclose(got, want.reshape(x.shape) * scale + bias, atol=1e-5)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: ops.patch_size(10), '10 values are no p \\* p pixels of 3 colours'),
    (lambda: ops.patch_size(0), '0 values are no p \\* p'),
    (lambda: ops.conv(draw(1, 4, 4, 4), draw(3, 3, 3, 6)), 'a kernel of 3 to 6 channels'),
    (lambda: ops.depthwise(draw(1, 4, 4, 4), draw(3, 3, 2, 4)), 'axis 1 is 1 and 2'),
    (lambda: ops.group_norm(draw(1, 2, 2, 6), draw(6), draw(6), 4, 0.1),
     '6 channels do not divide into 4 groups'),
    (lambda: ops.pictures(draw(1, 4, 12), np.ones((1, 3), np.int32),
                          np.ones((1, 4, 3), np.int32), 1, (2, 2)), 'axis P is 4 and 3'),
  ],
)  # fmt: skip
def test_refuses(call, message):
  with pytest.raises(ValueError, match=message):
    call()
