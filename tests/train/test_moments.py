"""Moments in bfloat16 take half the memory, and move as those in float32 on average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mmjax.train import moments, optim
from mmjax.train.checkpoint import Checkpoints

HALF = dict(state_dtype='bfloat16')
PARAMS = {'w': np.ones((256, 130), np.float32), 'b': np.ones(130, np.float32)}
NAMES = {'w': P('embed', 'mlp'), 'b': P('mlp')}


def build(name, **kwargs):
  return optim.build(PARAMS, NAMES, name=name, learning_rate=0.1, steps=10, **kwargs)


def kept(name, **kwargs):
  """Bytes of the state, but for what doesn't grow with the parameters."""
  state = jax.eval_shape(build(name, **kwargs).tx.init, PARAMS)
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.size > 100)


@pytest.mark.parametrize('name', sorted(set(optim.OPTIMIZERS) - {'adafactor'}))
def test_memory_halves(name):
  assert kept(name, **HALF) * 2 == kept(name) > 0
  assert kept(name, state_dtype='float32') == kept(name)


def test_rows_and_columns_stay():
  made = jax.eval_shape(build('adafactor', **HALF).tx.init, PARAMS)
  shapes = {x.shape: x.dtype for x in jax.tree.leaves(made) if x.ndim}
  assert shapes[256,] == jnp.float32 and (256, 130) not in shapes
  assert kept('adafactor', **HALF) < kept('adamw') / 50


def test_rounding_goes_to_a_neighbour_and_is_right_on_average():
  rng = np.random.default_rng(0)
  x = (rng.normal(size=40) * 10.0 ** rng.integers(-20, 20, 40)).astype(np.float32)
  x[:4] = 0, np.inf, np.nan, 1.0
  many = jnp.broadcast_to(jnp.asarray(x)[:, None], (40, 4096))
  got = jax.jit(moments.round_at_random)(many, jnp.uint32(7))
  assert got.dtype == jnp.bfloat16
  got = np.asarray(got.astype(jnp.float32))
  np.testing.assert_array_equal(got[:4], np.asarray(many)[:4])
  gap = np.abs(x[4:]) / 128
  assert (np.abs(got[4:] - x[4:, None]) < gap[:, None]).all()
  # Five standard deviations of a mean of 4096 draws from two neighbours.
  assert (np.abs(got[4:].mean(1, dtype=np.float64) - x[4:]) < 5 * gap / 2 / 64).all()


@pytest.mark.parametrize('at_random', [True, False])
def test_a_slow_average_moves(at_random, monkeypatch):
  """A second moment with decay 0.999 that has to fall from 1 to a quarter."""
  if not at_random:
    monkeypatch.setattr(moments, 'round_at_random', lambda x, _: x.astype(jnp.bfloat16))
  tx = build('adamw', options=dict(b2=0.999), **HALF).tx
  stored, *rest = tx.init(PARAMS)
  ones = jax.tree.map(jnp.ones_like, stored.inner.nu)
  stored = stored._replace(inner=stored.inner._replace(nu=ones))
  grads = jax.tree.map(lambda x: jnp.full_like(x, 0.5), PARAMS)

  def step(state, _):
    return tx.update(grads, state, PARAMS)[1], None

  many = jax.jit(lambda s: jax.lax.scan(step, s, None, 1000)[0])
  nu = many((stored, *rest))[0].inner.nu['w']
  assert nu.dtype == jnp.bfloat16
  want = 0.25 + 0.75 * 0.999**1000
  moved = abs(float(nu.astype(jnp.float32).mean()) - want) < 0.01
  assert moved == at_random
  if not at_random:
    assert (nu == 1).all()


@pytest.mark.parametrize('name', ['adamw', 'lion'])
def test_learns_as_in_float32(toy, toy_batch, name):
  """The loss of 60 steps ends within a tenth of what it is with float32."""
  rate = dict(adamw=0.03, lion=0.02)[name]
  ends = []
  for options in ({}, HALF):
    run = toy(name=name, learning_rate=rate, **options)
    losses = [run(toy_batch(rows=8, seed=i))['loss'] for i in range(60)]
    assert np.mean(losses[-10:]) < 0.2 * losses[0]
    ends.append(np.mean(losses[-10:]))
  assert abs(ends[1] / ends[0] - 1) < 0.1


def test_restored_it_goes_on_bit_for_bit(toy, toy_batch, tmp_path):
  run = toy(name='adamw', **HALF)
  for step in (1, 2):
    run(toy_batch(seed=step))
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(run.state, 2, {})
  run(toy_batch(seed=3))
  again = toy(name='adamw', **HALF)
  again.state, _ = checkpoints.restore(again.abstract)
  again(toy_batch(seed=3))
  checkpoints.close()
  for a, b in zip(jax.tree.leaves(run.state), jax.tree.leaves(again.state)):
    assert a.dtype == b.dtype
    assert jax.device_get(a).tobytes() == jax.device_get(b).tobytes()
  dtypes = {x.dtype for x in jax.tree.leaves(run.state.opt_state) if x.ndim}
  assert dtypes == {jnp.dtype('bfloat16')}


def test_moments_lie_where_their_parameter_does_and_rounding_is_the_same(toy, toy_batch):
  one, two = (toy(name='adamw', devices=n, preset='fsdp', **HALF) for n in (1, 2))
  for seed in range(3):
    one(toy_batch(seed=seed))
    two(toy_batch(seed=seed))
  leaves = [x for x in jax.tree.leaves(two.state.opt_state) if x.shape == (4, 8)]
  assert len(leaves) == 2 and not any(x.sharding.is_fully_replicated for x in leaves)
  for a, b in zip(jax.tree.leaves(one.state), jax.tree.leaves(two.state)):
    a, b = (np.asarray(x, np.float64) for x in jax.device_get((a, b)))
    # Sums over devices differ in the last bits, and so may a rounding, here and there.
    np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-6)
    assert np.mean(a == b) >= 0.5
