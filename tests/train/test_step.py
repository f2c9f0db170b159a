"""A step is the same step, however it is cut into microbatches and over devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.train import step as step_lib

PLAIN = dict(learning_rate=1.0, options=dict(momentum=0.0))
SGD = dict(name='sgd', **PLAIN)


def gradients(run, batch):
  """SGD with rate 1 makes the change of the parameters minus the gradient."""
  before = jax.device_get(run.state.params)
  metrics = run(batch)
  after = jax.device_get(run.state.params)
  return metrics, jax.tree.map(np.subtract, before, after)


def assert_same(one, other, tolerance):
  """Relative to the largest entry of each leaf."""
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
  ):
    scale = max(np.abs(a).max(), 1e-6)
    np.testing.assert_array_less(np.abs(a - b).max() / scale, tolerance, str(path))


def test_learns_to_look(tiny, pictures, stepper):
  config = tiny(optim=dict(weight_decay=0.01, clip_norm=1.0, ema=0.9))
  run, parts = stepper(config)
  first = run(pictures(parts.budget, 8, 0))
  assert first['weight'] == 16
  np.testing.assert_allclose(first['loss'], np.log(8), rtol=0.5)
  last = [run(pictures(parts.budget, 8, i)) for i in range(1, 120)][-20:]
  assert np.mean([m['accuracy'] for m in last]) > 0.95
  assert np.mean([m['loss'] for m in last]) < 0.2
  assert int(run.state.step) == 120
  # What was learnt is the picture: with grey ones it can only guess.
  blind = []
  for i in range(200, 220):
    batch = pictures(parts.budget, 8, i)
    batch.bank['image'].values[:] = 128
    blind.append(run(batch)['accuracy'])
  assert np.mean(blind) < 0.8


def uneven(batch):
  """Rows with different numbers of targets, so that a mean of means would be wrong."""
  weights = batch.stream.weights.copy()
  weights[:3] = 0
  weights[3, :8] = 0
  return dataclasses.replace(
    batch, stream=dataclasses.replace(batch.stream, weights=weights)
  )


@pytest.mark.slow
def test_eight_devices_equal_one(tiny, pictures, stepper):
  run, parts = stepper(tiny(optim=SGD))
  batch = uneven(pictures(parts.budget, 8))
  want, want_grads = gradients(run, batch)
  assert want['weight'] == 9
  for preset, mesh, accumulate in (
    ('dp', dict(data=8), 1),
    ('fsdp', dict(data=1, fsdp=8), 1),
    ('fsdp+tensor', dict(data=1, fsdp=4, tensor=2), 2),
    ('fsdp+tensor', dict(data=1, fsdp=2, tensor=2, context=2), 2),
  ):
    config = tiny(
      optim=SGD,
      sharding=dict(preset=preset, mesh=mesh),
      train=dict(accumulate=accumulate),
    )
    many, _ = stepper(config, devices=8)
    whole = [x.sharding.is_fully_replicated for x in jax.tree.leaves(many.state.params)]
    assert all(whole) == (preset == 'dp')
    got, got_grads = gradients(many, batch)
    np.testing.assert_allclose(got['loss'], want['loss'], rtol=1e-5)
    np.testing.assert_allclose(got['grad_norm'], want['grad_norm'], rtol=1e-5)
    assert_same(want_grads, got_grads, 1e-5)


def dtypes_seen(params, batch, rng, train):
  """A loss whose sums tell in which type parameters came; its gradient is x's sum."""
  assert params['up'].dtype == jnp.bfloat16
  rows = jnp.sum(batch['x'], 1) * batch['weight']
  total = jnp.sum(rows) * jnp.sum(params['up'].astype(jnp.float32))
  return total, {'weight': jnp.sum(batch['weight'])}


@pytest.mark.parametrize('accumulate', [1, 4])
def test_gradients_are_narrow_and_their_sums_are_wide(toy, toy_batch, accumulate):
  run = toy(accumulate, dtypes_seen, grad_dtype='bfloat16', **PLAIN)
  batch = toy_batch()
  metrics, grads = gradients(run, batch)
  assert {x.dtype for x in jax.tree.leaves(run.state.params)} == {jnp.dtype('float32')}
  parts = [np.sum(batch['x'][i::accumulate]) for i in range(accumulate)]
  narrow = sum(float(jnp.asarray(p).astype(jnp.bfloat16)) for p in parts) / 8
  np.testing.assert_allclose(grads['up'], narrow, atol=1e-6)
  assert (np.abs(grads['up'] - np.sum(batch['x']) / 8) > 1e-5).all()


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [dict(data=1), dict(data=2, fsdp=2, tensor=2)])
def test_narrow_gradients_are_close(tiny, pictures, stepper, mesh):
  """To those of a bfloat16 model with float32 gradients: 2 % by norm of each leaf."""
  made = {}
  for grad_dtype in (None, 'bfloat16'):
    config = tiny(
      model=dict(dtype='bfloat16'),
      optim={**SGD, 'grad_dtype': grad_dtype},
      sharding=dict(preset='fsdp+tensor', mesh=mesh),
    )
    run, parts = stepper(config, devices=8 if len(mesh) > 1 else 1)
    made[grad_dtype] = gradients(run, pictures(parts.budget, 8))
  (want, want_grads), (got, got_grads) = made.values()
  np.testing.assert_allclose(got['loss'], want['loss'], rtol=1e-2)
  for a, b in zip(jax.tree.leaves(want_grads), jax.tree.leaves(got_grads)):
    assert np.linalg.norm(np.ravel(a - b)) < 0.02 * np.linalg.norm(np.ravel(a))


@pytest.mark.parametrize('parts', [2, 4])
def test_accumulation_equals_the_big_batch(toy, toy_batch, parts):
  batch = toy_batch()
  batch['weight'][:] = [0, 0, 0, 1, 2, 1, 0.5, 3]
  want, want_grads = gradients(toy(**PLAIN), batch)
  got, got_grads = gradients(toy(accumulate=parts, **PLAIN), batch)
  assert want['weight'] == got['weight'] == 7.5
  np.testing.assert_allclose(got['loss'], want['loss'], rtol=1e-6)
  np.testing.assert_allclose(got['grad_norm'], want['grad_norm'], rtol=1e-6)
  assert_same(want_grads, got_grads, 1e-6)


def test_split_rows_keeps_every_row_once():
  x = np.arange(24).reshape(8, 3)
  micros = step_lib.split_rows({'x': jnp.asarray(x)}, 2)['x']
  np.testing.assert_array_equal(micros[0], x[0::2])
  np.testing.assert_array_equal(micros[1], x[1::2])
  with pytest.raises(ValueError, match='accumulate = 3 does not divide 8 rows'):
    step_lib.split_rows({'x': jnp.asarray(x)}, 3)


def test_microbatches_stay_on_their_devices(toy):
  """Splitting rows moves no bytes: the only collectives add up gradients and sums."""
  run = toy(accumulate=2, rows=16, devices=8)
  text = run.compiled.as_text()
  assert 'all-reduce' in text
  for moving in ('all-gather', 'all-to-all', 'collective-permute'):
    assert moving not in text


def kinked(params, batch, rng, train):
  """Finite, with an infinite gradient, where y is 0: the slope of a square root."""
  size = jnp.sqrt(jnp.sum((params['up'] * 0) ** 2) + jnp.abs(jnp.sum(batch['y'])))
  return size, {'weight': jnp.sum(batch['weight'])}


@pytest.mark.parametrize('bad', ['loss', 'gradient'])
def test_a_bad_update_is_left_out_and_counted(toy, toy_batch, bad):
  loss_fn = {} if bad == 'loss' else {'loss_fn': kinked}
  run = toy(name='adamw', ema=0.9, clip_norm=1.0, weight_decay=0.1, **loss_fn)
  assert run(toy_batch())['skipped'] == 0
  kept = jax.device_get((run.state.params, run.state.opt_state, run.state.ema))
  broken = toy_batch()
  if bad == 'loss':
    broken['x'][3] = np.inf
  else:
    broken['y'][:] = 0
  for times in (1, 2):
    metrics = run(broken)
    assert np.isfinite(metrics['loss']) == (bad == 'gradient')
    assert metrics['skipped'] == 1
    assert metrics['skipped_in_a_row'] == times
  now = jax.device_get((run.state.params, run.state.opt_state, run.state.ema))
  jax.tree.map(np.testing.assert_array_equal, kept, now)
  assert int(run.state.step) == 3
  metrics = run(toy_batch())
  assert metrics['skipped'] == metrics['skipped_in_a_row'] == 0
  assert (int(run.state.skipped), int(run.state.skipped_in_a_row)) == (2, 0)


def test_a_batch_without_targets_changes_nothing_but_counts(toy, toy_batch):
  run = toy(**PLAIN)
  batch = toy_batch()
  batch['weight'][:] = 0
  metrics, grads = gradients(run, batch)
  assert metrics['loss'] == metrics['weight'] == metrics['skipped'] == 0
  assert all((g == 0).all() for g in jax.tree.leaves(grads))
  assert int(run.state.step) == 1


def test_random_numbers_are_a_function_of_the_step(toy, toy_batch):
  batch = toy_batch()
  batch['noise'][:] = 1
  run, again = toy(learning_rate=0.0), toy(learning_rate=0.0)
  losses = [run(batch)['loss'] for _ in range(3)]
  assert len(set(losses)) == 3
  assert losses == [again(batch)['loss'] for _ in range(3)]


def test_moving_average(toy, toy_batch):
  run = toy(ema=0.75)
  average = jax.device_get(run.state.params)
  for seed in range(3):
    run(toy_batch(seed=seed))
    now = jax.device_get(run.state.params)
    average = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, average, now)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
    average,
    jax.device_get(run.state.eval_params()),
  )


def test_another_shape_is_an_error_not_a_compile(toy, toy_batch):
  run = toy()
  run.rows = 16
  with pytest.raises(TypeError, match='differ'):
    run(toy_batch(16))


def test_rows_that_do_not_divide_over_the_mesh(toy):
  with pytest.raises(ValueError, match="'batch' of size 12 does not divide"):
    toy(rows=12, devices=8)
