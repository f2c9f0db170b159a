"""Rotary positions over time, height and width.

RoPE (Su et al., 2104.09864, eq. 34) turns pair i of a head by the angle
position * base^(-2i/H). Here a slot has three positions, and each pair listens
to one of them (M-RoPE, Qwen2-VL, 2409.12191, section 2.1):

  pair      0 1 2 3 4 5 6 7 ...         sections=None: the axes take turns, so each
  position  t h w t h w t h ...         hears slow and fast frequencies alike

  pair      0 1 2 3 4 5 6 7             sections=(2, 3, 3): contiguous, as released
  position  t t h h h w w w             with Qwen2-VL

Where the three positions are equal, as for text, both are plain RoPE exactly. For
contexts longer than a model was trained on, frequencies are scaled: `scaled`.
Pairs are (i, i + H/2), the "rotate half" layout of Llama checkpoints.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import sharding
from mmjax.names import closest
from mmjax.shape import check

Sections = tuple[int, int, int]
# ('linear', factor), or ('llama3', factor, low, high, original positions).
Scaling = tuple[str | float, ...]
_SCALINGS = {'linear': 1, 'llama3': 4}  # how many numbers each has


def rotary_angles(
  positions: jax.Array,
  head_dim: int,
  base: float = 10_000.0,
  sections: Sections | None = None,
  scaling: Scaling | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of every pair's angle, once per batch for all layers.

  Args:
    positions: i32[B, T, 3] time, height, width.
    head_dim: H, even.
    base: the slowest pair's wavelength is about 2 pi * base.
    sections: pairs per axis, H/2 together; None = the axes take turns.
    scaling: of the frequencies, see `scaled`.

  Returns:
    (cos, sin), each f32[B, T, H/2].

  Raises:
    ValueError: odd head_dim, sections that don't add up to H/2, or no scaling.
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
  frequency = scaled(base ** (-np.arange(half) / half), scaling).astype(np.float32)
  angle = positions[..., axis].astype(jnp.float32) * frequency[None, None]
  return jnp.cos(angle), jnp.sin(angle)


def scaled(frequency: np.ndarray, scaling: Scaling | None) -> np.ndarray:
  """Frequencies for longer contexts, f[H/2] -> f[H/2].

  ('linear', factor): positions are counted in steps of 1/factor (2306.15595).
  ('llama3', factor, low, high, original): the same for pairs that turn fewer than
    `low` times in the original context, nothing for those over `high` turns, and
    between them a mixture (Llama 3.1, 2407.21783; as in its released code).

  Raises:
    ValueError: another name, another count of numbers, or some that can't be.
  """
  if scaling is None:
    return frequency
  name, *numbers = scaling
  if name not in _SCALINGS:
    raise ValueError(f'unknown rotary scaling {name!r}{closest(name, _SCALINGS)}')
  wrong = len(numbers) != _SCALINGS[name] or not min(numbers, default=0) > 0
  if wrong or (name == 'llama3' and numbers[1] >= numbers[2]):
    raise ValueError(
      f"rotary scaling {tuple(scaling)} must be ('linear', factor) or ('llama3', factor,"
      ' low, high, original positions), all > 0 and low < high'
    )
  if name == 'linear':
    return frequency / numbers[0]
  factor, low, high, original = numbers
  turns = frequency * original / (2 * np.pi)
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return frequency * (kept + (1 - kept) / factor)


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
  y = x[..., :R]
  if sharding.device()[0] == 'cpu':
    turned = _rolled(y, cos, sin)
  else:
    a, b = jnp.split(y.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
  if x.shape[-1] == R:
    return turned
  return jnp.concatenate([turned, x[..., R:]], -1)


@jax.custom_vjp
def _rolled(x, cos, sin):
  """Without putting halves together, which isn't vectorised on a CPU; nor is it in one
  loop with attention's transpositions, so both ways it is alone between barriers. Its
  gradient is the turn back, not autodiff's, which puts halves together. For a TPU
  (unified_1b on v5e) the step's modelled time would be 6 % longer so."""
  alone = jax.lax.optimization_barrier
  y = alone(x.astype(jnp.float32))
  cos, sin = jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
  return alone(y * cos + jnp.roll(y, y.shape[-1] // 2, -1) * sin).astype(x.dtype)


def _rolled_backward(angles, g):
  cos, sin = angles
  return _rolled(g, cos, -sin), None, None


_rolled.defvjp(lambda x, cos, sin: (_rolled(x, cos, sin), (cos, sin)), _rolled_backward)
