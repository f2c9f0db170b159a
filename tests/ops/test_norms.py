import jax
import jax.numpy as jnp
import numpy as np

from mmjax.ops.norms import layer_norm, rms_norm


def test_equals_numpy():
  rng = np.random.default_rng(0)
  x, scale = rng.normal(size=(2, 3, 8)), rng.normal(size=8)
  want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
  got = rms_norm(x.astype(np.float32), scale.astype(np.float32))
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_zeros_stay_zeros_with_finite_gradient():
  x = jnp.zeros((1, 2, 4))
  value, grad = jax.value_and_grad(lambda x: jnp.sum(rms_norm(x, jnp.ones(4))))(x)
  assert value == 0 and np.isfinite(grad).all()


def test_computes_in_float32_and_keeps_dtype():
  x = jnp.full((1, 4), 300.0, jnp.bfloat16)
  got = rms_norm(x * x, jnp.ones(4))  # squares overflow in 16 bits of float16 range
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got.astype(jnp.float32), 1, rtol=1e-2)


def test_layer_norm_equals_numpy():
  rng = np.random.default_rng(0)
  x, scale, bias = rng.normal(size=(2, 3, 8)) + 3, rng.normal(size=8), rng.normal(size=8)
  x, scale, bias = (a.astype(np.float32) for a in (x, scale, bias))
  mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  want = (x - mean) / np.sqrt(var + 1e-6) * scale + bias
  np.testing.assert_allclose(layer_norm(x, scale, bias), want, rtol=1e-4, atol=1e-6)
