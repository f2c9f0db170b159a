import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.generate.once import once


def f(params, i, x):
  kernel = jnp.tanh(params['kernel']).T * params['scale']
  hidden = jax.nn.relu(x @ kernel + jnp.sin(jnp.arange(3.0))[None])
  return {'y': hidden + params['bias'][None], 'i': i + 1, 'kept': params['bias']}


def example():
  rng = np.random.default_rng(0)
  params = {'kernel': rng.normal(size=(3, 4)), 'scale': 2.0, 'bias': np.arange(3.0)}
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  return params, jnp.int32(3), jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)


def test_is_the_function():
  params, i, x = example()
  step = once(f, params, i, x)
  for j in range(3):
    got, want = step(i + j, x + j), f(params, i + j, x + j)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


def test_in_a_loop_only_what_changes_is_left():
  """Compiled, the loop's body has neither the tanh nor the transposition."""

  def loop(params, x):
    step = once(lambda p, x: x + f(p, 0, x)['y'] @ p['kernel'], params, x)
    return jax.lax.fori_loop(0, 5, lambda _, x: step(x), x)

  params, _, x = example()
  want = x
  for _ in range(5):
    want = want + f(params, 0, want)['y'] @ params['kernel']
  np.testing.assert_allclose(jax.jit(loop)(params, x), want, rtol=1e-5)
  (outer,) = [e for e in jax.make_jaxpr(loop)(params, x).eqns if 'jaxpr' in e.params]
  inside = {e.primitive.name for e in outer.params['jaxpr'].eqns}
  assert 'tanh' not in inside and 'transpose' not in inside
  assert 'dot_general' in inside and 'sin' in inside


def test_what_reads_nothing_of_the_known_stays():
  x = jnp.ones(3)
  step = once(lambda known, x: x + jnp.sin(jnp.arange(3.0)), 1.0, x)
  names = [e.primitive.name for e in jax.make_jaxpr(step)(x).eqns]
  assert names == ['iota', 'sin', 'add']


def test_shapes_are_those_of_the_example():
  params, i, x = example()
  step = once(f, params, i, x)
  with pytest.raises(ValueError):
    step(i)
