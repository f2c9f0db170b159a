import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import sharding
from mmjax.batch import Budget
from mmjax.ops.across import lookup, rows, take
from mmjax.ops.losses import next_token_loss
from mmjax.ops.vocabulary import Head

MIXED = {'fsdp': 2, 'tensor': 2, 'context': 2}


def on_mesh(sizes, f, *args):
  """f(*args) and its gradient by the first, of a sum that weighs entries apart."""
  n = int(np.prod(list(sizes.values())))
  mesh = sharding.make_mesh(sizes, jax.devices()[:n])

  def loss(*args):
    out = f(*args)
    weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    return jnp.sum(weights * out), out

  with sharding.use(mesh, sharding.rules_for('fsdp+tensor')):
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    compiled = run.lower(*args).compile()
    return compiled(*args), compiled.as_text()


@pytest.mark.parametrize(('S', 'T'), [(8, 16), (16, 8)])
def test_take_equals_plain_indexing_and_gathers_nothing(S, T):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, S, 4)).astype(np.float32)
  index = rng.integers(0, S, (2, T)).astype(np.int32)
  want, _ = on_mesh({'data': 1}, take, x, index)
  ((_, out), grad), text = on_mesh({'fsdp': 2, 'context': 4}, take, x, index)
  np.testing.assert_array_equal(out, np.take_along_axis(x, index[..., None], 1))
  np.testing.assert_array_equal(out, want[0][1])
  np.testing.assert_allclose(grad, want[1], rtol=1e-6, atol=1e-6)
  assert 'collective-permute' in text
  assert not re.search(r'f32.* all-(gather|reduce)\(.*shard_map', text)


@pytest.mark.parametrize('sizes', [{'data': 2, 'fsdp': 2, 'tensor': 2}, MIXED])
def test_lookup_equals_plain_indexing_and_gathers_no_table(sizes):
  rng = np.random.default_rng(0)
  table = rng.normal(size=(12, 8)).astype(np.float32)
  index = rng.integers(0, 12, (4, 6)).astype(np.int32)
  index[1, 2] = 12
  want, _ = on_mesh({'data': 1}, lookup, table, index)
  ((_, out), grad), text = on_mesh(sizes, lookup, table, index)
  known = index < 12
  np.testing.assert_array_equal(out[known], table[index[known]])
  assert np.isnan(out[~known]).all() and not known.all()
  np.testing.assert_allclose(grad, want[1], rtol=1e-6, atol=1e-6)
  assert 'all-to-all' in text
  assert not re.search(r'f32\[[^=]* all-gather\(.*shard_map', text)


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_rows_are_those_of_the_table_to_the_bit_and_nan_beyond(
  monkeypatch, dtype, platform
):
  monkeypatch.setattr(sharding, 'device', lambda: (platform, ''))
  table = jax.random.normal(jax.random.key(0), (5, 4), dtype).at[3, 1].set(-0.0)
  got = jax.jit(rows)(table, jnp.array([[4, 3], [0, 5]]))
  assert got.dtype == dtype
  want = np.asarray(table)[[4, 3, 0]]
  assert np.asarray(got).reshape(4, 4)[:3].tobytes() == want.tobytes()
  assert np.isnan(np.asarray(got, np.float32)[1, 1]).all()


def test_a_loop_that_looks_rows_up_writes_no_table():
  table = jnp.ones((1000, 64), jnp.bfloat16)

  def loop(table, index):
    def body(i, at):
      return at + jnp.sum(rows(table, at)).astype(jnp.int32)

    return jax.lax.fori_loop(0, index, body, index)

  compiled = jax.jit(loop).lower(table, jnp.int32(3)).compile()
  assert int(compiled(table, jnp.int32(3))) == 3 + 3 * 64
  assert compiled.memory_analysis().temp_size_in_bytes < table.nbytes / 2


def test_lookup_gives_its_type_and_refuses_what_does_not_divide():
  table, index = np.zeros((12, 8), np.float32), np.zeros((4, 6), np.int32)
  assert lookup(table, index, jnp.bfloat16).dtype == jnp.bfloat16
  with pytest.raises(ValueError, match="slots .4, 3.: axis 'seq' of size 3 does not"):
    on_mesh(MIXED, lookup, table, index[:, :3])


@pytest.mark.parametrize('targets', [5, pytest.param(13, marks=pytest.mark.slow)])
def test_loss_of_a_split_stream_equals_one_device(targets):
  """Also where targets don't divide over devices, or are more than there is room for."""
  B, T, D, V = 2, 16, 4, 6
  rng = np.random.default_rng(0)
  s = Budget(T, T).empty(B).stream
  s.segment_ids[:] = np.repeat([1, 2], [9, 7])
  s.order[:] = s.last[:] = np.arange(T)
  s.tokens[:] = rng.integers(0, V, (B, T))
  s.weights[:, 2:11] = rng.random((B, 9))
  hidden, head = (
    rng.normal(size=shape).astype(np.float32) for shape in ((B, T, D), (D, V))
  )

  def loss(hidden, stream):
    words = Head((jnp.asarray(head),), (('embed', 'vocab'),))
    total, weight, sums = next_token_loss(hidden, words, stream, targets, limit=3 * 4)
    return jnp.stack([total, weight, *sums.values()])

  want, _ = on_mesh({'data': 1}, loss, hidden, s)
  got, text = on_mesh({'fsdp': 2, 'context': 4}, loss, hidden, s)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)
  assert not re.search(rf'f32\[\d,{T},{D}\][^=]* all-gather', text)
