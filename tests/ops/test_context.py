import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import sharding
from mmjax.batch import KeyTags, QueryTags
from mmjax.ops.attention import attend

RING, SWAP, GATHER = {}, {'attend_heads': 'context'}, {'kv_seq': None}
WIDE = {'act_kv_heads': None}  # fewer keys' heads than devices
MIXED, LONG = {'fsdp': 2, 'tensor': 2, 'context': 2}, {'context': 8}


def stream(seed, T=16, N=4, K=2, B=2, H=4, longest=12):
  """Documents that span shards, with ends, blocks of one rank and a row of padding."""
  rng = np.random.default_rng(seed)
  segments, order, until = np.zeros((3, B, T), np.int32)
  until += 1000
  for b in range(B - 1):
    t = 0
    while t < T - 3:
      size = min(int(rng.integers(3, longest + 1)), T - t)
      here = slice(t, t + size)
      segments[b, here] = segments[b].max() + 1
      order[b, here] = np.arange(size) // 2
      until[b, t + 1] = 3  # a slot that the rest of the document can't see
      t += size
  last = np.where(segments > 0, order, -1)
  q, k, v = (rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K))
  query_tags = QueryTags(segments, np.maximum(order - 5, 0), last, order)
  return q, k, v, query_tags, KeyTags(segments, order, until)


def items(seed, T=8, S=16, N=4, B=2, H=4):
  """Queries that look at another stream, as at an image's patches."""
  rng = np.random.default_rng(seed)
  q, k, v = (rng.normal(size=(B, n, N, H)).astype(np.float32) for n in (T, S, S))
  queries, keys = (rng.integers(0, 4, (B, n)).astype(np.int32) for n in (T, S))
  query_tags = QueryTags(queries, 0 * queries, np.where(queries == 3, -1, 0))
  return q, k, v, query_tags, KeyTags(keys, 0 * keys)


def value_and_grads(x, **kwargs):
  """Of a function that weighs every entry of attention's result differently."""
  q, k, v, *tags = x

  def f(q, k, v, *tags):
    out = attend(q, k, v, *tags, **kwargs)
    weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    return jnp.sum(weights * jnp.sin(out)), out

  both = jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))
  return both, (q, k, v, *tags)


def on_mesh(sizes, rules, x, **kwargs):
  n = int(np.prod(list(sizes.values())))
  mesh = sharding.make_mesh(sizes, jax.devices()[:n])
  with sharding.use(mesh, sharding.rules_for('fsdp+tensor', rules)):
    f, args = value_and_grads(x, **kwargs)
    return f(*args), f.lower(*args)


def assert_same(x, sizes, rules, **kwargs):
  f, args = value_and_grads(x)
  want = f(*args)
  got, lowered = on_mesh(sizes, rules, x, **kwargs)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=3e-6)
  return lowered.as_text()


@pytest.mark.parametrize(
  ('sizes', 'rules', 'heads'),
  [
    (MIXED, RING, (4, 2)),
    (LONG, RING, (3, 3)),
    ({'context': 4}, SWAP, (8, 2)),
    ({'tensor': 2, 'context': 2}, SWAP | WIDE, (12, 3)),
    ({'tensor': 2, 'context': 2}, RING | WIDE, (6, 3)),
    ({'tensor': 2, 'context': 2}, GATHER | WIDE, (4, 1)),
    ({'tensor': 2, 'context': 2}, SWAP | GATHER, (4, 4)),
    ({'context': 4}, {'seq': None}, (4, 2)),
  ],
)
def test_equals_one_device(sizes, rules, heads):
  x = stream(0, N=heads[0], K=heads[1])
  text = assert_same(x, sizes, rules, chunk=3)
  moved = {'ring': 'collective_permute', 'swap': 'all_to_all', 'gather': 'all_reduce'}
  ring = rules in (RING, WIDE)
  assert (moved['ring'] in text) == ring
  assert (moved['swap'] in text) == ('attend_heads' in rules)


@pytest.mark.parametrize('rules', [RING, GATHER, {'seq': None}])
def test_looking_at_another_stream_equals_one_device(rules):
  assert_same(items(0), {'fsdp': 2, 'context': 4}, rules)


def test_reach_and_soft_cap_change_no_number():
  x = stream(1, longest=6)
  for rules in (RING, SWAP, GATHER):
    assert_same(x, {'context': 2}, rules, reach=5, chunk=4)
