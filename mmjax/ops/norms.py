"""Normalisation: root mean square (Zhang and Sennrich, 1910.07467), and the older

layer norm (Ba et al., 1607.06450), which also takes the mean out and adds a bias.
"""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, eps: float = 1e-6) -> jax.Array:
  """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in float32.

  Args:
    x: f[..., D]
    scale: f[D]

  Returns:
    f[..., D] of x's dtype; a row of zeros stays zeros.
  """
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
  scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + scale.shape)
  return (y * scale).astype(x.dtype)


def layer_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float = 1e-6
) -> jax.Array:
  """(x - mean(x)) / sqrt(var(x) + eps) * scale + bias, as `rms_norm` otherwise."""
  y = x.astype(jnp.float32)
  y = y - jnp.mean(y, -1, keepdims=True)
  lead = (1,) * (x.ndim - 1)
  bias = bias.astype(jnp.float32).reshape(lead + bias.shape)
  return (rms_norm(y, scale, eps) + bias).astype(x.dtype)
