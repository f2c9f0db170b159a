import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import sharding
from mmjax.ops.positions import rotary_angles, rotate, scaled


def turn(x, positions, **kwargs):
  return rotate(x, rotary_angles(jnp.asarray(positions), x.shape[-1], **kwargs))


def numpy_rope(x, position, base):
  """Plain 1-D RoPE, x[T, N, H], position[T]."""
  half = x.shape[-1] // 2
  angle = position[:, None, None] * base ** (-np.arange(half) / half)
  z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
  return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize('sections', [None, (2, 3, 3), (0, 8, 0)])
def test_text_is_plain_rope(sections):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 5, 3, 16)).astype(np.float32)
  p = rng.integers(0, 50, (2, 5)).astype(np.int32)
  got = turn(x, np.repeat(p[..., None], 3, -1), base=100.0, sections=sections)
  for b in range(2):
    np.testing.assert_allclose(got[b], numpy_rope(x[b], p[b], 100.0), atol=2e-5)


@pytest.mark.parametrize('rotary_dim', [16, 12])
def test_both_ways_of_turning_are_one(monkeypatch, rotary_dim):
  """A CPU's and the others', with their gradients."""
  rng = np.random.default_rng(0)
  x, weights = rng.normal(size=(2, 2, 5, 3, 16)).astype(np.float32)
  p = jnp.asarray(rng.integers(0, 50, (2, 5, 3)), jnp.int32)
  angles = rotary_angles(p, rotary_dim)

  def made(platform):
    monkeypatch.setattr(sharding, 'device', lambda: (platform, ''))
    return jax.value_and_grad(lambda x: jnp.sum(weights * rotate(x, angles)))(x)

  for a, b in zip(made('cpu'), made('tpu')):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('sections', [None, (2, 3, 3)])
def test_products_depend_on_differences_along_each_axis(sections):
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)
  p = rng.integers(0, 9, (2, 1, 1, 3)).astype(np.int32)

  def product(shift_q, shift_k):
    a = turn(q, p[0] + np.int32(shift_q), sections=sections)
    return float(jnp.sum(a * turn(k, p[1] + np.int32(shift_k), sections=sections)))

  same = product([0, 0, 0], [0, 0, 0])
  for axis in np.eye(3, dtype=np.int32):
    np.testing.assert_allclose(product(7 * axis, 7 * axis), same, atol=1e-5)
    assert abs(product(7 * axis, 0 * axis) - same) > 1e-3


def test_axes_take_turns_or_stand_in_sections():
  p = np.array([[[1, 0, 0], [0, 1, 0], [0, 0, 1]]], np.int32)
  _, sin = rotary_angles(jnp.asarray(p), 16)
  np.testing.assert_array_equal(np.argmax(sin[0], 0), [0, 1, 2, 0, 1, 2, 0, 1])
  _, sin = rotary_angles(jnp.asarray(p), 16, sections=(2, 3, 3))
  np.testing.assert_array_equal(np.argmax(sin[0], 0), [0, 0, 1, 1, 1, 2, 2, 2])


def test_keeps_dtype_and_length():
  x = np.random.default_rng(0).normal(size=(1, 4, 2, 8)).astype(np.float32)
  p = np.arange(12, dtype=np.int32).reshape(1, 4, 3)
  got = turn(x, p)
  np.testing.assert_allclose(
    np.linalg.norm(got, axis=-1), np.linalg.norm(x, axis=-1), 1e-5
  )
  assert turn(jnp.asarray(x, jnp.bfloat16), p).dtype == jnp.bfloat16


def test_refuses():
  p = jnp.zeros((1, 2, 3), jnp.int32)
  with pytest.raises(ValueError, match='head_dim must be even, got 7'):
    rotary_angles(p, 7)
  with pytest.raises(ValueError, match=r'sections \(1, 2, 3\).*= 4'):
    rotary_angles(p, 8, sections=(1, 2, 3))
  with pytest.raises(ValueError, match='axis 3 is 3 and 2'):
    rotary_angles(p[..., :2], 8)


def test_linear_scaling_counts_in_smaller_steps():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(1, 5, 3, 16)).astype(np.float32)
  p = np.repeat(np.arange(5, dtype=np.int32)[None, :, None], 3, -1)
  got = turn(x, 4 * p, scaling=('linear', 4.0), base=100.0)
  np.testing.assert_allclose(got, turn(x, p, base=100.0), atol=1e-5)


def test_llama3_scales_what_turns_seldom():
  """As its paper's code says it, wavelength by wavelength."""
  frequency = 500_000.0 ** (-np.arange(64) / 64)
  want = []
  for f in frequency:
    wave = 2 * np.pi / f
    if wave < 8192 / 4:
      want.append(f)
    elif wave > 8192 / 1:
      want.append(f / 8)
    else:
      smooth = (8192 / wave - 1) / (4 - 1)
      want.append((1 - smooth) * f / 8 + smooth * f)
  got = scaled(frequency, ('llama3', 8.0, 1.0, 4.0, 8192.0))
  np.testing.assert_allclose(got, want, rtol=1e-12)
  np.testing.assert_array_equal(scaled(frequency, None), frequency)
  assert set(np.round(frequency / got, 6)) > {1, 8} and np.all(np.diff(got) < 0)


@pytest.mark.parametrize(
  ('scaling', 'message'),
  [
    (('lama3', 8.0), "unknown rotary scaling 'lama3'; did you mean 'llama3'"),
    (('linear',), r"scaling \('linear',\) must be \('linear', factor\) or"),
    (('linear', 0.0), 'all > 0'),
    (('llama3', 8.0, 4.0, 1.0, 8192.0), 'low < high'),
  ],
)
def test_scalings_that_are_none(scaling, message):
  with pytest.raises(ValueError, match=message):
    scaled(np.ones(2), scaling)


def test_what_is_left_of_a_head_stays_as_it_is():
  """With angles for the first R entries, those turn as a head of R entries would."""
  x = np.random.default_rng(0).normal(size=(1, 5, 3, 16)).astype(np.float32)
  positions = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32)[None, :, None], (1, 5, 3))
  got = rotate(x, rotary_angles(positions, 6, 100.0))
  want = numpy_rope(x[0, ..., :6], np.arange(5), 100.0)
  np.testing.assert_allclose(got[0, ..., :6], want, atol=1e-5)
  np.testing.assert_array_equal(got[..., 6:], x[..., 6:])
