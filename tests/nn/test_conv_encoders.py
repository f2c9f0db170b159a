"""What every convolutional encoder of a bank must do, whatever is inside of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax import sharding
from mmjax.batch import Bank, Item
from mmjax.nn.efficientnet import EfficientNet
from mmjax.nn.nfnet import NFNet
from mmjax.nn.resnet import ResNet

C, GRID, I = 48, (3, 4), 3  # pictures of 12 x 16 pixels
P = I * 12 + 2
SHARED = dict(channels=C, image_grid=GRID, pool='mean')
MODELS = {
  'efficientnet': EfficientNet(
    stem=4, stages=((1, 3, 1, 4, 1), (2, 3, 2, 8, 1)), width=16, **SHARED
  ),
  'resnet': ResNet(stem=8, widths=(16, 32), depths=(1, 2), **SHARED, num_classes=4),
  'resnet-group': ResNet(
    stem=8,
    widths=(8, 16),
    depths=(1, 1),
    block='basic',
    norm='group',
    norm_groups=4,
    **SHARED,
  ),
  'nfnet': NFNet(stem=(4, 4, 8), widths=(16, 32), depths=(1, 2), group_width=4, **SHARED),
}
CELLS = {
  'nfnet': (2, 2),
  'efficientnet': (3, 4),
  'resnet': (2, 2),
  'resnet-group': (2, 2),
}
# Row and item; row 1 has no second item.
ITEMS = ((0, 1), (0, 2), (1, 1), (1, 3))
models = pytest.mark.parametrize('name', MODELS)


def bank(which=ITEMS, rows=2, items=I):
  """Pictures of noise, end to end in each row; which of them is drawn by its number."""
  patches = items * 12 + 2
  made = Bank(
    values=np.full((rows, patches, C), 7, np.uint8),
    items=np.zeros((rows, patches), np.int32),
    positions=np.zeros((rows, patches, 3), np.int32),
    item_segments=np.zeros((rows, items), np.int32),
    item_order=np.zeros((rows, items), np.int32),
  )
  at = [1] * rows  # the first patch is padding too
  cells = np.indices((1, *GRID)).reshape(3, -1).T
  for b, i in which:
    here = b, slice(at[b], at[b] + 12)
    values = np.random.default_rng((b, i)).integers(0, 255, (12, C))
    made.values[here], made.items[here], made.positions[here] = values, i, cells
    made.item_segments[b, i - 1], at[b] = 1, at[b] + 12
  return made


@functools.cache
def variables(name):
  """Random in every leaf, so that norms, gates and gains say something."""
  made = jax.eval_shape(MODELS[name].init, jax.random.key(0), bank())
  rng = np.random.default_rng(0)

  def draw(path, x):
    noise = rng.standard_normal(x.shape).astype(x.dtype)
    leaf = path[-1].key
    if leaf in ('scale', 'var', 'gain', 'skip_gain'):
      return 1 + 0.3 * np.tanh(noise)
    if leaf == 'kernel':
      return noise * np.sqrt(2 / np.prod(x.shape[:-1])).astype(x.dtype)
    return 0.3 * noise

  return jax.tree_util.tree_map_with_path(draw, made)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, bank):
  return model.apply(variables, bank)


@functools.cache
def whole(name):
  return apply(MODELS[name], variables(name), bank())


@models
def test_packed_pictures_equal_each_alone(name):
  got, (h, w) = whole(name), CELLS[name]
  model = MODELS[name]
  assert model.grid(Item('image', (1, *GRID))) == (1, h, w)
  assert got.values.shape == (2, I * h * w, model.width)
  assert got.pooled.shape == (2, I, model.width)
  assert np.isfinite(got.values).all() and np.std(got.values) > 0.05
  alone = bank([(0, 1)], 1, 1)
  for b, i in ITEMS:
    alone.values[0, 1:13] = bank().values[b, bank().items[b] == i]
    want = apply(model, variables(name), alone)
    mine = got.items[b] == i
    # The i-th picture's cells stand at (i - 1) * h * w.
    assert np.flatnonzero(mine).tolist() == [*range((i - 1) * h * w, i * h * w)]
    np.testing.assert_allclose(got.values[b, mine], want.values[0], atol=2e-5)
    np.testing.assert_allclose(got.pooled[b, i - 1], want.pooled[0, 0], atol=2e-5)
    np.testing.assert_allclose(
      want.pooled[0, 0], np.asarray(want.values[0]).mean(0), atol=2e-5
    )
    cells = np.indices((1, h, w)).reshape(3, -1).T
    np.testing.assert_array_equal(got.positions[b, mine], cells)
  assert not got.items[0, 2 * h * w :].any()
  assert not got.items[1, h * w : 2 * h * w].any()


@models
def test_tokens_change_with_their_picture_only(name):
  other = bank()
  other.values[0, other.items[0] == 2] ^= 255
  other.values[other.items == 0] = 77  # padding
  before, after = whole(name), apply(MODELS[name], variables(name), other)
  mine = np.zeros((2, I), bool)
  mine[0, 1] = True
  changed = np.any(before.pooled != after.pooled, -1)
  np.testing.assert_array_equal(changed, mine)
  tokens = np.any(before.values != after.values, -1).reshape(2, I, -1)
  np.testing.assert_array_equal(tokens.any(-1), mine)
  assert tokens[0, 1].all()


@functools.partial(jax.jit, static_argnums=0)
def gradients(model, variables, bank):
  def loss(variables):
    out = model.apply(variables, bank)
    there = (out.items > 0).astype(out.values.dtype)
    total = jnp.sum(jnp.sin(out.values) * there[..., None]) + jnp.sum(jnp.sin(out.pooled))
    if not model.num_classes:
      return total
    return total + jnp.sum(model.apply(variables, out.pooled, method='logits'))

  return jax.value_and_grad(loss)(variables)


def assert_close(got, want, share):
  leaves = jax.tree_util.tree_leaves_with_path(want)
  for (path, w), g in zip(leaves, jax.tree.leaves(got), strict=True):
    scale = max(np.abs(w).max(), 1e-3)
    where = jax.tree_util.keystr(path)
    np.testing.assert_allclose(g, w, rtol=0, atol=share * scale, err_msg=where)


def eight_rows():
  return bank([(b, i) for b in range(8) for i in (1, 2)], 8)


@functools.cache
def wanted(name):
  return gradients(MODELS[name], variables(name), eight_rows())


@models
def test_every_parameter_has_a_finite_gradient(name):
  """And none, where a frozen norm holds what it saw."""
  for path, g in jax.tree_util.tree_leaves_with_path(wanted(name)[1]):
    frozen = path[-1].key in ('mean', 'var')
    assert np.isfinite(g).all() and np.any(g) != frozen, jax.tree_util.keystr(path)


@models
def test_eight_devices_and_remat_equal_one(name):
  model, batch, weights = MODELS[name], eight_rows(), variables(name)
  mesh = sharding.make_mesh({'fsdp': 4, 'tensor': 2})
  rules = sharding.RULES['fsdp+tensor']
  names = sharding.axis_names(functools.partial(model.init, jax.random.key(0)), batch)
  with sharding.use(mesh, rules):
    where = sharding.shardings(names, weights, mesh, rules)
    weights = jax.device_put(weights, where)
    batch = jax.device_put(batch, sharding.batch_shardings(batch, mesh, rules))
    got = gradients(model.clone(remat='full'), weights, batch)
  assert_close(got, wanted(name), 5e-5)
  split = [not w.is_fully_replicated for w in jax.tree.leaves(where)]
  assert any(split) == (name != 'efficientnet')


@models
def test_bridges_to_nnx(name):
  @jax.jit
  def run(weights, bank):
    bridged = nnx.bridge.ToNNX(MODELS[name], rngs=nnx.Rngs(0))
    bridged = nnx.bridge.lazy_init(bridged, bank)
    made = nnx.to_pure_dict(nnx.state(bridged, nnx.Param))
    assert jax.tree.structure(made) == jax.tree.structure(weights)
    nnx.update(bridged, weights)
    return bridged(bank)

  got = run(variables(name)['params'], bank())
  np.testing.assert_allclose(got.values, whole(name).values, atol=2e-6)
  np.testing.assert_allclose(got.pooled, whole(name).pooled, atol=2e-6)


@models
def test_bfloat16_stays_near(name):
  got = apply(MODELS[name].clone(dtype='bfloat16'), variables(name), bank())
  assert got.values.dtype == jnp.bfloat16
  want = np.asarray(whole(name).pooled)
  error = np.abs(got.pooled.astype(np.float32) - want).max()
  assert error < 0.05 * np.abs(want).max()


@models
@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(pool='max'), "unknown pool 'max'"),
    (dict(remat='ful'), "unknown remat 'ful'; did you mean 'full'"),
    (dict(channels=12), 'patches have 48 channels, .* takes 12'),
  ],
)
def test_refuses(name, change, message):
  with pytest.raises(ValueError, match=message):
    MODELS[name].clone(**change).init(jax.random.key(0), bank())


@models
@pytest.mark.parametrize('grid', [(1, 4, 3), (2, 3, 4), (1, 1, 1)])
def test_refuses_items_of_another_size(name, grid):
  with pytest.raises(ValueError, match=r'takes pictures of \(1, 3, 4\) patches'):
    MODELS[name].grid(Item('video', grid))
