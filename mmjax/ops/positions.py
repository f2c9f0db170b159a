"""Rotary positions over time, height and width.

RoPE (Su et al., 2104.09864, eq. 34) turns pair i of a head by the angle
position * base^(-2i/H). Here a slot has three positions, and each pair listens
to one of them (M-RoPE, Qwen2-VL, 2409.12191, section 2.1):

  pair      0 1 2 3 4 5 6 7 ...         sections=None: the axes take turns, so each
  position  t h w t h w t h ...         hears slow and fast frequencies alike

  pair      0 1 2 3 4 5 6 7             sections=(2, 3, 3): contiguous, as released
  position  t t h h h w w w             with Qwen2-VL

Where the three positions are equal, as for text, both are plain RoPE exactly.
Pairs are (i, i + H/2), the "rotate half" layout of Llama checkpoints.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.shape import check

Sections = tuple[int, int, int]


def rotary_angles(
  positions: jax.Array,
  head_dim: int,
  base: float = 10_000.0,
  sections: Sections | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of every pair's angle, once per batch for all layers.

  Args:
    positions: i32[B, T, 3] time, height, width.
    head_dim: H, even.
    base: the slowest pair's wavelength is about 2 pi * base.
    sections: pairs per axis, H/2 together; None = the axes take turns.

  Returns:
    (cos, sin), each f32[B, T, H/2].

  Raises:
    ValueError: odd head_dim, or sections that don't add up to H/2.
  """
  check('B T 3', positions)
  if head_dim % 2:
    raise ValueError(f'rotary: head_dim must be even, got {head_dim}')
  half = head_dim // 2
  if sections is None:
    axis = np.arange(half) % 3
  elif len(sections) == 3 and sum(sections) == half and min(sections) >= 0:
    axis = np.repeat(np.arange(3), sections)
  else:
    raise ValueError(
      f'rotary: sections {tuple(sections)} must be three that add up to'
      f' head_dim / 2 = {half}'
    )
  frequency = (base ** (-np.arange(half) / half)).astype(np.float32)
  angle = positions[..., axis].astype(jnp.float32) * frequency[None, None]
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Turns heads by their angles, in float32.

  Args:
    x: f[B, T, N, H]
    angles: from `rotary_angles`, of H/2 pairs; or of fewer, and then what is left of
      the head stays as it is (GPT-NeoX, 2204.06745).

  Returns:
    f[B, T, N, H] of x's dtype.
  """
  cos, sin = (a[:, :, None] for a in angles)
  R = 2 * cos.shape[-1]
  a, b = jnp.split(x[..., :R].astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
  if x.shape[-1] == R:
    return turned
  return jnp.concatenate([turned, x[..., R:]], -1)
