"""Against the whole matrix of logits, for any number of devices and any chunk."""

import collections
import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from wide import float64, largest_error

from mmjax import sharding
from mmjax.ops import contrastive
from mmjax.ops.contrastive import clipped_exp, contrastive_loss

N, E = 16, 5


@pytest.fixture
def quick_compiles():
  """Programs run for milliseconds here; to optimise them takes seconds."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


def pairs(seed=0, absent=True, dtype=np.float32):
  rng = np.random.default_rng(seed)
  x, y = rng.normal(size=(2, N, E))
  weights = rng.integers(0, 2, N) * rng.uniform(0.5, 2, N) if absent else np.ones(N)
  scalars = np.array(3.0), np.array(-0.7)
  return tuple(np.asarray(a, dtype) for a in (x, y, weights, *scalars))


def whole(x, y, w, scale, bias, loss, groups=None):
  """All at once, of the pairs that are there."""
  here = np.flatnonzero(np.asarray(w) > 0)
  groups = (np.arange(N) if groups is None else groups)[here]
  x, y, w = x[here], y[here], w[here]
  logits = scale * x @ y.T + bias
  eye = np.eye(len(here), dtype=bool)
  if loss == 'sigmoid':
    terms = jnp.where(eye, jax.nn.softplus(-logits), jax.nn.softplus(logits))
    terms = jnp.where(eye | (groups[:, None] != groups[None]), terms, 0)
    return jnp.sum(w * terms.sum(1))
  logits = jnp.where(eye | (groups[:, None] != groups[None]), logits, -jnp.inf)
  to_y, to_x = (jax.nn.logsumexp(logits, a) - jnp.diag(logits) for a in (1, 0))
  return jnp.sum(w * (to_y + to_x) / 2)


def graded(loss, chunk, args, groups=None):
  def value(x, y, scale, bias):
    return contrastive_loss(x, y, args[2], scale, bias, loss=loss, chunk=chunk,
                            groups=groups)[0]  # fmt: skip

  inputs = (args[0], args[1], args[3], args[4])
  return jax.jit(jax.value_and_grad(value, (0, 1, 2, 3)))(*inputs)


def reference(loss, args, groups=None):
  x, y, w, scale, bias = args

  def value(x, y, scale, bias):
    return whole(x, y, w, scale, bias, loss, groups)

  return jax.value_and_grad(value, (0, 1, 2, 3))(*map(jnp.asarray, (x, y, scale, bias)))


MESHES = {
  'one': None,
  'two': dict(data=2),
  'eight': dict(data=2, fsdp=2, tensor=2),
  'both axes': dict(data=4, fsdp=2),
  'slices': dict(slice=2, data=2, fsdp=2),
}


@pytest.mark.parametrize('loss', contrastive.LOSSES)
@pytest.mark.parametrize('mesh', MESHES)
def test_value_and_gradient_of_the_whole_batch(loss, mesh, quick_compiles):
  """In float64, where what is no rounding can't hide; 3 doesn't divide any block."""
  with float64():
    args = pairs(dtype=np.float64)
    want = reference(loss, args)
    if MESHES[mesh] is None:
      got = graded(loss, 3, args)
    else:
      devices = jax.devices()[: np.prod(list(MESHES[mesh].values()))]
      made = sharding.make_mesh(MESHES[mesh], devices)
      with sharding.use(made, sharding.rules_for('fsdp+tensor')):
        got = graded(loss, 3, args)
    if loss == 'infonce':  # a bias moves nothing: 0 but for rounding
      assert abs(got[1][3]) < 1e-12
      got, want = (got[0], got[1][:3]), (want[0], want[1][:3])
    assert largest_error(got, want) < 1e-12


@pytest.mark.parametrize('loss', contrastive.LOSSES)
def test_the_same_group_is_no_negative(loss, quick_compiles):
  args, groups = pairs(1), np.arange(N, dtype=np.int32) // 3
  got, want = graded(loss, 1024, args, groups), reference(loss, args, groups)
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, 2e-5, 2e-5), got, want)
  assert abs(float(got[0]) - float(reference(loss, args)[0])) > 0.1


def test_sums():
  x, y, w, scale, bias = pairs(2)
  loss, weight, sums = contrastive_loss(x, y, w, scale, bias, chunk=4)
  here = w > 0
  logits = (x @ y.T)[here][:, here]
  own = np.diag(logits)
  assert np.isclose(weight, w.sum()) and np.isfinite(loss)
  assert np.isclose(sums['x_to_y'], w[here][own >= logits.max(1)].sum())
  assert np.isclose(sums['y_to_x'], w[here][own >= logits.max(0)].sum())
  same = np.ones((N, E), np.float32)
  _, _, sums = contrastive_loss(same, same, w, scale, bias)
  assert sums == {'x_to_y': 0, 'y_to_x': 0}  # all alike: nothing is found


@pytest.mark.parametrize('loss', contrastive.LOSSES)
def test_nothing_is_finite(loss, quick_compiles):
  """Without pairs, and with huge logits."""
  x, y, w, scale, bias = pairs()
  for args in ((x, y, 0 * w, scale, bias), (x, y, w, 1e4 * scale, bias)):
    value, grads = graded(loss, 8, args)
    assert all(np.isfinite(g).all() for g in grads) and np.isfinite(value)
    if not args[2].any():
      assert value == 0 and not any(np.any(g) for g in grads)


def test_bfloat16_is_taken_in_float32():
  args = pairs()
  low = [jnp.asarray(a, jnp.bfloat16) for a in args[:2]]
  loss, _, _ = contrastive_loss(*low, *args[2:])
  want = whole(*(np.asarray(a, np.float32) for a in low), *args[2:], 'infonce')
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_memory_does_not_hold_the_matrix():
  """Of 4,096 pairs the logits are 64 MB; loss and gradient hold a tenth of that."""
  shapes = [jax.ShapeDtypeStruct((4096, 8), jnp.float32)] * 2

  def value(x, y):
    one = jnp.ones((), jnp.float32)
    return contrastive_loss(x, y, jnp.ones(4096), one, one, chunk=64)[0]

  compiled = jax.jit(jax.grad(value, (0, 1))).lower(*shapes).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 4096 * 4 / 10


def moves(jaxpr, times=1):
  """How often a jaxpr sends something along each mesh axis."""
  found = collections.Counter()
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'ppermute':
      (axis,) = eqn.params['axis_name']
      found[axis] += times
    inner = times * eqn.params.get('length', 1)
    for sub in jax.extend.core.jaxprs_in_params(eqn.params):
      found += moves(sub, inner)
  return found


def test_pieces_cross_slices_once_for_all_rounds_inside(quick_compiles):
  """A ring of rings: `slice` moves a piece as often as there are slices, not chips."""
  mesh = dict(slice=2, data=2, fsdp=2)
  with sharding.use(sharding.make_mesh(mesh), sharding.rules_for('fsdp')):
    x, y, *rest = map(jnp.asarray, pairs())
    made = jax.make_jaxpr(lambda x, y: contrastive_loss(x, y, *rest)[0])(x, y)
  found = moves(made.jaxpr)
  leaves = found['slice'] // 2
  assert leaves > 0 and dict(found) == {
    'slice': 2 * leaves, 'data': 4 * leaves, 'fsdp': 8 * leaves
  }  # fmt: skip


def test_the_scale_is_clipped_and_finds_back():
  value = functools.partial(clipped_exp, most=100.0)
  f32 = jnp.float32
  np.testing.assert_allclose(value(f32(1.0)), np.e, rtol=1e-6)
  assert value(f32(9.0)) == 100
  for sign, here, want in ((1, 1.0, np.e), (-1, 1.0, -np.e), (1, 9.0, 100), (-1, 9.0, 0)):
    got = jax.grad(lambda a, sign=sign: sign * value(a))(f32(here))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_refuses():
  args = pairs()
  with pytest.raises(ValueError, match="unknown contrastive loss 'infonse'; did you"):
    contrastive_loss(*args, loss='infonse')
  with pytest.raises(ValueError, match='16 pairs over 1 devices in chunks of 0'):
    contrastive_loss(*args, chunk=0)
  use = sharding.use(sharding.make_mesh(dict(data=8)), sharding.rules_for('dp'))
  with use, pytest.raises(ValueError, match='12 pairs over 8 devices'):
    contrastive_loss(*(a[:12] if a.ndim else a for a in args))
