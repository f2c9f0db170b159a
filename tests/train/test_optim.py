"""Optimizers converge, don't recompile, and leave alone what they are told to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from mmjax.train import optim
from mmjax.train import state as state_lib

PARAMS = {
  'embed': {'text': np.ones((6, 4), np.float32)},
  'layers': {
    'up': np.ones((2, 4, 8), np.float32),
    'qkv_bias': np.ones((2, 2, 4), np.float32),
    'scale': np.ones((2, 4), np.float32),
  },
  'head': np.ones((4, 6), np.float32),
}
NAMES = {
  'embed': {'text': P('vocab', 'embed')},
  'layers': {
    'up': P('layers', 'embed', 'mlp'),
    'qkv_bias': P('layers', 'heads', 'head_dim'),
    'scale': P('layers', 'embed'),
  },
  'head': P('embed', 'vocab'),
}


def build(name='sgd', **kwargs):
  return optim.build(
    PARAMS, NAMES, **{'learning_rate': 0.1, 'steps': 100, **kwargs}, name=name
  )


@pytest.mark.parametrize('name', sorted(optim.OPTIMIZERS))
def test_converges_on_a_quadratic_with_one_compile(name):
  params = {'w': jnp.ones((3, 4)), 'b': jnp.ones(4)}
  names = {'w': P('embed', 'mlp'), 'b': P('mlp')}
  rate = {'lion': 0.02, 'sgd': 0.05}.get(name, 0.1)
  made = optim.build(
    params, names, name=name, learning_rate=rate, steps=120, clip_norm=5.0,
    schedule=dict(name='cosine', warmup_steps=5),
  )  # fmt: skip
  goal = jax.tree.map(lambda x: 0.5 * x, params)
  traces = []

  @jax.jit
  def step(params, opt_state):
    traces.append(1)
    loss, grads = jax.value_and_grad(
      lambda p: sum(jnp.sum((p[k] - goal[k]) ** 2) for k in p)
    )(params)
    updates, opt_state = made.tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  opt_state = made.tx.init(params)
  losses = []
  for _ in range(120):
    params, opt_state, loss = step(params, opt_state)
    losses.append(float(loss))
  assert losses[-1] < 1e-2 * losses[0]
  assert len(traces) == 1


def test_muon_turns_each_layers_gradient_into_the_nearest_orthogonal_matrix():
  rng = np.random.default_rng(0)
  grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), PARAMS)
  made = build('muon', learning_rate=1.0, options=dict(ns_steps=12))
  update = jax.jit(made.tx.update)(grads, made.tx.init(PARAMS), PARAMS)[0]
  for g, u in zip(grads['layers']['up'], update['layers']['up']):
    left, _, right = np.linalg.svd(g, full_matrices=False)
    # The iteration leaves singular values near, not at, one (Jordan 2024).
    values = -left.T @ u @ right.T / (0.2 * np.sqrt(8))
    np.testing.assert_allclose(values, np.diag(np.diag(values)), atol=1e-5)
    assert (np.abs(np.diag(values) - 1) < 0.35).all()
  for rest in (('embed', 'text'), ('layers', 'qkv_bias'), ('layers', 'scale'), ('head',)):
    g, u = grads, update
    for key in rest:
      g, u = g[key], u[key]
    np.testing.assert_allclose(u, -np.sign(g), rtol=1e-4)  # Adam's first step


def test_decay_leaves_out_norms_biases_and_embeddings():
  got = optim.decay_mask(PARAMS, NAMES)
  assert got == {
    'embed': {'text': False},
    'layers': {'up': True, 'qkv_bias': False, 'scale': False},
    'head': True,
  }
  assert not optim.decay_mask(PARAMS, NAMES, ['he*'])['head']


def test_update_is_the_equation():
  """w' = w - lr * multiplier * (g + decay * w), with sgd as direction."""
  made = build(
    weight_decay=0.5, multipliers=[('layers/u*', 0.1), ('layers/*', 2.0)],
    options=dict(momentum=0.0),
  )  # fmt: skip
  grads = jax.tree.map(lambda x: 3 * x, PARAMS)
  updates, _ = made.tx.update(grads, made.tx.init(PARAMS), PARAMS)
  got = jax.tree.map(lambda x: float(x.ravel()[0]), updates)
  np.testing.assert_allclose(got['head'], -0.1 * 3.5, rtol=1e-6)
  np.testing.assert_allclose(got['embed']['text'], -0.1 * 3, rtol=1e-6)
  np.testing.assert_allclose(got['layers']['up'], -0.1 * 0.1 * 3.5, rtol=1e-6)
  np.testing.assert_allclose(got['layers']['scale'], -0.1 * 2 * 3, rtol=1e-6)


def test_frozen_leaves_keep_their_bits_and_cost_no_memory(toy, toy_batch):
  run = toy(name='adamw', weight_decay=0.1, freeze=('up', 'b*'), ema=0.9)
  before = jax.device_get(run.state.params)
  for seed in range(3):
    run(toy_batch(seed=seed))
  after = jax.device_get(run.state.params)
  for name in ('up', 'bias'):
    assert before[name].tobytes() == after[name].tobytes()
  assert not np.array_equal(before['down'], after['down'])
  shapes = [x.shape for x in jax.tree.leaves(run.state.opt_state) if x.ndim]
  assert shapes == [(8, 2), (8, 2)]  # Adam's two moments of `down` alone
  assert [x.shape for x in jax.tree.leaves(run.state.ema)] == [(8, 2)]
  assert jax.tree.structure(run.state.eval_params()) == jax.tree.structure(after)


def test_no_gradient_is_computed_for_frozen_leaves(toy):
  """The product x^T (dL/dh) [4, 8] of the frozen layer isn't in the program."""

  def products(run):
    return run.compiled.as_text().count('f32[4,8]{1,0} dot')

  assert products(toy()) == 1
  assert products(toy(freeze=('up',))) == 0


def test_clipping_by_global_norm():
  made = build(clip_norm=1.0, options=dict(momentum=0.0))
  grads = jax.tree.map(lambda x: 100 * x, PARAMS)
  updates, _ = made.tx.update(grads, made.tx.init(PARAMS), PARAMS)
  norm = np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(updates)))
  np.testing.assert_allclose(norm, 0.1, rtol=1e-5)


def test_schedules():
  cosine = optim.make_schedule('cosine', 1.0, 110, 10, 0.1)
  np.testing.assert_allclose([cosine(i) for i in (0, 4, 9)], [0.1, 0.5, 1.0], rtol=1e-6)
  np.testing.assert_allclose([cosine(60), cosine(110)], [0.55, 0.1], rtol=1e-5)
  linear = optim.make_schedule('linear', 2.0, 100)
  np.testing.assert_allclose([linear(i) for i in (0, 50, 100)], [2, 1, 0], atol=1e-6)
  rsqrt = optim.make_schedule('rsqrt', 1.0, 100, 10)
  np.testing.assert_allclose([rsqrt(10), rsqrt(40)], [1.0, 0.5], rtol=1e-6)
  constant = optim.make_schedule('constant', 3.0, 100, 2)
  np.testing.assert_allclose([constant(i) for i in (0, 1, 2, 99)], [1.5, 3, 3, 3])


@pytest.mark.parametrize('preset', ['dp', 'fsdp'])
@pytest.mark.parametrize('name', sorted(optim.OPTIMIZERS))
def test_optimizer_leaves_live_where_their_parameter_lives(toy, name, preset):
  run = toy(name=name, devices=2, preset=preset, ema=0.9)
  split = preset == 'fsdp'
  assert run.abstract.params['up'].sharding.spec == (
    P('fsdp', None) if split else P(None, None)
  )
  for leaf in jax.tree.leaves((run.state.opt_state, run.state.ema)):
    whole = leaf.sharding.is_fully_replicated
    assert whole == (not split or leaf.shape != (4, 8)), leaf.shape


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (dict(name='adamm'), "unknown optimizer 'adamm'; did you mean 'adamw'"),
    (dict(options=dict(momentun=0.1)), "no option 'momentun'; did you mean 'momentum'"),
    (dict(schedule=dict(name='cosin')), "unknown schedule 'cosin'; did you mean 'cos"),
    (dict(schedule=dict(name='linear', warmup_steps=100)), 'warmup_steps = 100 of 100'),
    (dict(freeze=['layer/*']), r"freeze: 'layer/\*' matches no.*layers/up"),
    (dict(multipliers=[('x', 2.0)]), "multipliers: 'x' matches no parameter"),
    (dict(no_decay=['x']), "no_decay: 'x' matches no parameter"),
    (dict(freeze=['*']), 'freezes every parameter'),
    (dict(state_dtype='bfloat'), "unknown optim.state_dtype 'bfloat'; did you mean 'b"),
    (dict(grad_dtype='float16'), "unknown optim.grad_dtype 'float16'; did you mean 'bf"),
  ],
)
def test_mistakes_are_one_line(kwargs, message):
  with pytest.raises(ValueError, match=message) as caught:
    build(**kwargs)
  assert '\n' not in str(caught.value)


def test_what_is_trained_is_float32():
  half = {**PARAMS, 'head': PARAMS['head'].astype(jnp.bfloat16)}
  kwargs = dict(name='sgd', learning_rate=0.1, steps=100)
  with pytest.raises(ValueError, match='head is trained in bfloat16: updates would be l'):
    optim.build(half, NAMES, **kwargs)
  made = optim.build(half, NAMES, freeze=['head'], **kwargs)
  assert not made.trained['head']


def test_state_without_average_evaluates_the_parameters():
  made = build()
  state = state_lib.create(PARAMS, made)
  assert state.eval_params() is PARAMS
