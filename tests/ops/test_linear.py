import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import sharding
from mmjax.ops.linear import batch_matmul, linear, linears, plus, reused, rounded


def example(num_in):
  rng = np.random.default_rng(0)
  inner = (5, 6)[-num_in:]
  shapes = (2, 4, *inner), (*inner, 3, 2)
  return [rng.normal(size=s).astype(np.float32) for s in shapes]


@pytest.mark.parametrize('num_in', [1, 2])
def test_equals_tensordot_with_its_gradients(num_in):
  x, kernel = example(num_in)

  def f(x, w):
    return jnp.sum(jnp.sin(linear(x, w, num_in)))

  def g(x, w):
    return jnp.sum(jnp.sin(jnp.tensordot(x, w, num_in)))

  got, want = (jax.jit(jax.value_and_grad(h, (0, 1)))(x, kernel) for h in (f, g))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize('num_in', [1, 2])
def test_narrow_products_on_a_cpu_are_those_it_has(num_in):
  """Given out in float32, contracted last axis first; gradients as of the plain one."""
  x, kernel = example(num_in)
  x = jnp.asarray(x, jnp.bfloat16)

  def f(x, w):
    return jnp.sum(jnp.sin(linear(x, w, num_in).astype(jnp.float32)))

  def g(x, w):
    w = w.astype(x.dtype).astype(jnp.float32)
    y = jnp.tensordot(x.astype(jnp.float32), w, num_in)
    return jnp.sum(jnp.sin(y.astype(x.dtype).astype(jnp.float32)))

  gradient = jax.value_and_grad(f, (0, 1))
  got, want = jax.jit(gradient)(x, kernel), jax.value_and_grad(g, (0, 1))(x, kernel)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    a, b = (np.asarray(y, np.float32) for y in (a, b))
    np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())
  assert len(fast_products(gradient, x, kernel)) == 3


def fast_products(f, *args):
  """The products of a program, each of them one that XLA has in bfloat16 on a CPU."""
  text = jax.jit(f).lower(*args).as_text()
  products = [line for line in text.splitlines() if 'dot_general' in line]
  for line in products:
    assert line.split('->')[-1].strip().split('>')[0].endswith('f32')
    first = re.search(r'\(tensor<([\dx]*)xbf16>', line).group(1).split('x')
    last = re.search(r'contracting_dims = \[([\d, ]*)\]', line).group(1).split(',')
    assert int(last[-1]) == len(first) - 1
    assert 'batching_dims = [0, 1]' not in line
  return products


def test_rounded_is_to_the_nearest_bit_for_bit():
  """Of all that bits can be: every exponent, both signs, halves, infinities, NaN."""
  rng = np.random.default_rng(0)
  bits = rng.integers(0, 2**32, 100_000, np.uint32)
  halves = (bits & 0xFFFF0000) | rng.choice([0x7FFF, 0x8000, 0x8001], bits.shape)
  special = [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001]
  x = np.concatenate([bits, halves, special]).astype(np.uint32).view(np.float32)
  got = np.asarray(jax.jit(lambda x: rounded(x, 'bfloat16'))(x))
  with np.errstate(invalid='ignore'):
    want = x.astype(jnp.bfloat16)
  assert np.isnan(x).any() and (np.isnan(x) == np.isnan(got)).all()
  real = ~np.isnan(x)
  np.testing.assert_array_equal(got[real].view(np.uint16), want[real].view(np.uint16))
  assert rounded(x, 'float32').dtype == jnp.float32


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_one_token_has_a_fast_product_too(dtype):
  """Of one row XLA makes a product in float32, for which it converts the kernel."""
  rng = np.random.default_rng(0)
  shapes = (1, 1, 32), (32, 64)
  x, kernel = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in shapes)
  compiled = jax.jit(lambda x, w: linear(x, w, dtype=dtype)).lower(x, kernel).compile()
  got = compiled(x, kernel)
  assert got.shape == (1, 1, 64) and got.dtype == dtype
  want = np.asarray(x[0, 0], np.float32) @ np.asarray(kernel, np.float32)
  got = np.asarray(got[0, 0], np.float32)
  np.testing.assert_allclose(got, want, rtol=0.01, atol=0.01)
  assert 'f32[32,64]' not in compiled.as_text()


@pytest.mark.parametrize('columns', [3, 512])
def test_rows_a_kilobyte_apart_are_moved_apart(columns):
  """One column of them, as turning x reads it, doesn't fit into a cache."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 300, 512)), jnp.bfloat16)
  kernel = jnp.asarray(rng.normal(size=(512, columns)), jnp.bfloat16)

  def f(x, w):
    return jnp.sum(jnp.sin(linear(x, w).astype(jnp.float32)))

  def g(x, w):
    y = jnp.tensordot(x.astype(jnp.float32), w.astype(jnp.float32), 1)
    return jnp.sum(jnp.sin(y.astype(x.dtype).astype(jnp.float32)))

  gradient = jax.grad(f, (0, 1))
  for a, b in zip(jax.jit(gradient)(x, kernel), jax.grad(g, (0, 1))(x, kernel)):
    assert a.shape == b.shape
    a, b = (np.asarray(y, np.float32) for y in (a, b))
    np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())
  products = [
    (
      re.search(r'\(tensor<(\d+x\d+)', line)[1],
      re.search(r'-> tensor<(\d+x\d+)', line)[1],
    )
    for line in fast_products(gradient, x, kernel)
  ]
  wide = {3: '600x3', 512: '600x544'}[columns]
  turned, gradient_of_x = ('544x600', f'544x{columns}'), (f'600x{columns}', '600x544')
  assert sorted(products) == sorted([turned, gradient_of_x, ('600x544', wide)])


@pytest.mark.parametrize('transpose', [False, True])
@pytest.mark.parametrize('sizes', [(5, 3, 4), (1, 2, 1), (4, 2, 16), (3, 16, 2)])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_batch_matmul(transpose, sizes, dtype):
  M, C, S = sizes
  rng = np.random.default_rng(0)
  shapes = (2, M, 3, C), (2, S, 3, C), (2, 3, M, S)
  # As attention has them: tokens before heads, and so are the gradients.
  x, y, weights = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
  x, y = x.astype(dtype), y.astype(dtype)

  def f(x, y):
    x, y = jnp.moveaxis(x, 1, 2), jnp.moveaxis(y, 1, 2)
    made = batch_matmul(x, y if transpose else y.swapaxes(2, 3), transpose)
    assert made.dtype == jnp.float32
    return jnp.sum(made * weights)

  def g(x, y):
    return jnp.sum(jnp.einsum('bmkc,bskc->bkms', x, y, precision='highest') * weights)

  gradient = jax.value_and_grad(f, (0, 1))
  got = jax.jit(gradient)(x, y)
  want = jax.value_and_grad(g, (0, 1))(x.astype('float32'), y.astype('float32'))
  tolerance = 0.02 if dtype == 'bfloat16' else 1e-5
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = (np.asarray(z, np.float32) for z in (a, b))
    np.testing.assert_allclose(a, b, atol=tolerance * max(np.abs(b).max(), 1))
  if dtype == 'bfloat16':
    assert len(fast_products(gradient, x, y)) == 3


@pytest.mark.parametrize('num_in', [1, 2])
@pytest.mark.parametrize('tokens', [1, 3])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('shape', [(), (4,)])
def test_reused_kernels_come_first_and_are_the_same_product(num_in, tokens, dtype, shape):
  rng = np.random.default_rng(0)
  inner = (5, 6)[-num_in:]
  shapes = (tokens, 1, *inner), (*inner, 4), shape
  x, kernel, scale = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
  x = x.astype(jnp.bfloat16)

  def f(x, kernel):
    return linear(x, kernel, num_in, dtype, scale)

  want = np.asarray(f(x, kernel), np.float32)
  with reused():
    got = jax.jit(f)(x, kernel)
    text = jax.jit(f).lower(x, kernel).as_text()
  assert got.shape == want.shape and got.dtype == dtype
  np.testing.assert_allclose(
    np.asarray(got, np.float32), want, atol=0.02 * abs(want).max()
  )
  (product,) = [line for line in text.splitlines() if 'dot_general' in line]
  assert '(tensor<4x' in product.split(':', 1)[1]
  assert 'contracting_dims = [1] x [1]' in product


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_products_of_one_x_are_one_where_kernels_are_reused(dtype):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 1, 5)), dtype)
  shapes = (5, 2, 3), (5, 4)
  kernels = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
  want = [np.asarray(linear(x, k), np.float32) for k in kernels]
  with reused():
    got = jax.jit(linears)(x, kernels)
    text = jax.jit(linears).lower(x, kernels).as_text()
  for a, b in zip(got, want, strict=True):
    assert a.dtype == dtype and a.shape == b.shape
    np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.02 * abs(b).max())
  assert text.count('dot_general') == (1 if dtype == 'bfloat16' else 2)


def test_kernel_gradient_contracts_one_dimension():
  x, kernel = example(1)
  text = jax.jit(jax.grad(lambda w: jnp.sum(linear(x, w) ** 2))).lower(kernel).as_text()
  assert 'contracting_dims = [0, 1]' not in text
  assert 'contracting_dims = [0] x [0]' in text
  # On one CPU it is a matrix, and so is what it is made of: else tokens are turned first.
  assert '-> tensor<6x6xf32>' in text


def test_kernels_keep_their_axes_where_there_are_several_devices():
  x, kernel = example(1)
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 4})
  with sharding.use(mesh, sharding.RULES['dp']):
    made = jax.make_jaxpr(linear)(x, kernel)
  (product,) = [e for e in made.eqns if e.primitive.name == 'dot_general']
  assert product.invars[1].aval.shape == kernel.shape


def test_a_split_stream_is_not_flattened():
  x, kernel = example(1)
  want = linear(x, kernel)
  mesh = sharding.make_mesh({'data': 2, 'context': 4})
  with sharding.use(mesh, sharding.RULES['dp']):

    @jax.jit
    def f(x, w):
      return sharding.constrain(linear(x, w), 'batch', 'seq', None, None)

    np.testing.assert_allclose(f(x, kernel), want, atol=1e-6)
    text = f.lower(x, kernel).compile().as_text()
  assert 'all-gather' not in text and 'all-to-all' not in text


@pytest.mark.parametrize('tokens', [2, 40])  # fewer and more than the kernel has rows
@pytest.mark.parametrize('shape', [(), (2,)])
def test_scale_is_a_factor_of_the_result(tokens, shape):
  rng = np.random.default_rng(0)
  shapes = (1, tokens, 5), (5, 3, 2), shape
  x, kernel, scale = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)

  def f(x, w, s):
    return jnp.sum(jnp.sin(linear(x, w, scale=s)))

  def g(x, w, s):
    return jnp.sum(jnp.sin(linear(x, w) * s.reshape((1,) * (4 - s.ndim) + s.shape)))

  got, want = (jax.value_and_grad(h, (0, 1, 2))(x, kernel, scale) for h in (f, g))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_scale_of_many_tokens_makes_no_pass_over_them():
  x, kernel = jnp.ones((1, 40, 5)), jnp.ones((5, 2))
  made = jax.make_jaxpr(lambda s: linear(x, kernel, scale=s))(jnp.float32(2))
  products = [e for e in made.eqns if e.primitive.name == 'mul']
  assert [e.outvars[0].aval.shape for e in products] == [(5, 2)]


def test_dtypes():
  x, kernel = example(1)
  x = jnp.asarray(x, jnp.bfloat16)
  assert linear(x, kernel).dtype == jnp.bfloat16
  assert linear(x, kernel, dtype=jnp.float32).dtype == jnp.float32


def test_refuses():
  x, kernel = example(1)
  with pytest.raises(ValueError, match=r'x ends in \(6,\), the kernel takes \(3,\)'):
    linear(x, kernel[0])


@pytest.mark.parametrize('out', [(5,), (4, 5)])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_plus_has_the_gradient_of_a_sum(monkeypatch, out, dtype, platform):
  monkeypatch.setattr(sharding, 'device', lambda: (platform, ''))
  y = jax.random.normal(jax.random.key(0), (2, 64, *out), dtype)
  bias = jax.random.normal(jax.random.key(1), out, dtype)
  g = jax.random.normal(jax.random.key(2), y.shape, dtype)
  made, pull = jax.vjp(jax.jit(plus), y, bias)
  np.testing.assert_array_equal(made, y + bias[(None,) * (y.ndim - bias.ndim)])
  dy, dbias = pull(g)
  np.testing.assert_array_equal(dy, g)
  want = np.sum(np.asarray(g, np.float64), (0, 1))
  assert dbias.dtype == dtype
  tolerance = 1e-5 if dtype == 'float32' else 2**-8
  np.testing.assert_allclose(np.asarray(dbias, np.float64), want, tolerance, 1e-5)
