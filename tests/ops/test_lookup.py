"""The gradient of a narrow table is the float32 sum, rounded once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import sharding
from mmjax.ops.across import lookup

V, D, B, T = 8, 4, 8, 512


def example(dtype):
  rng = np.random.default_rng(0)
  table = jnp.asarray(rng.normal(size=(V, D)), dtype)
  tokens = jnp.asarray(rng.integers(0, 3, (B, T)), jnp.int32)
  return table, tokens, jnp.asarray(1 + rng.random((B, T, D)), dtype)


def gradient(table, tokens, g):
  value, pull = jax.vjp(lambda table: lookup(table, tokens), table)
  return value, pull(g)[0]


def plain(table, tokens, g):
  want = np.zeros((V, D))
  np.add.at(want, np.asarray(tokens), np.asarray(g, np.float64))
  return np.asarray(table)[np.asarray(tokens)], want


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_sums_of_many_are_rounded_once(dtype):
  args = example(dtype)
  value, got = jax.jit(gradient)(*args)
  want_value, want = plain(*args)
  np.testing.assert_array_equal(value, want_value)
  assert got.dtype == dtype
  rtol = 2.0**-8 if dtype == 'bfloat16' else 1e-5
  np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=rtol)


@pytest.mark.parametrize(
  'sizes', [dict(data=2, fsdp=4), dict(data=2, context=2, tensor=2)]
)
def test_many_devices_equal_one(sizes):
  args = example('bfloat16')
  mesh, rules = sharding.make_mesh(sizes), sharding.RULES['fsdp+tensor']
  with sharding.use(mesh, rules):

    def put(x, *names):
      spec = sharding.to_spec(names, rules, '', x.shape, mesh)
      return jax.device_put(x, jax.NamedSharding(mesh, spec))

    table, tokens, g = args
    args = put(table, 'vocab', 'embed'), put(tokens, 'batch', None)
    args = *args, put(g, 'batch', 'seq', None)
    value, got = jax.jit(gradient)(*args)
    assert got.sharding.is_equivalent_to(args[0].sharding, 2)
  want_value, want = plain(*args)
  np.testing.assert_array_equal(value, want_value)
  # Each group rounds its own sum, and the sum of those is rounded.
  np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2.0**-7)
