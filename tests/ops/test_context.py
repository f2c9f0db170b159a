import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import sharding
from mmjax.batch import KeyTags, QueryTags, visible
from mmjax.ops import context
from mmjax.ops.attention import attend

RING, SWAP, GATHER = {}, {'attend_heads': 'context'}, {'kv_seq': None}
WIDE = {'act_kv_heads': None}  # fewer keys' heads than devices
MIXED, LONG = {'fsdp': 2, 'tensor': 2, 'context': 2}, {'context': 8}
PAIR = {'tensor': 2, 'context': 2}


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
    lowered = f.lower(*args)
    return lowered.compile()(*args), lowered


def assert_same(x, sizes, rules, **kwargs):
  f, args = value_and_grads(x)
  want = f(*args)
  got, lowered = on_mesh(sizes, rules, x, **kwargs)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=3e-6)
  return lowered.as_text()


@pytest.mark.parametrize(
  ('sizes', 'rules', 'heads', 'moves'),
  [
    (MIXED, RING, (4, 2), 'collective_permute'),
    pytest.param(LONG, RING, (3, 3), 'collective_permute', marks=pytest.mark.slow),
    (PAIR, SWAP | WIDE, (12, 3), 'all_to_all'),
    pytest.param(PAIR, RING | WIDE, (6, 3), 'collective_permute', marks=pytest.mark.slow),
    (PAIR, GATHER | WIDE, (4, 1), None),
    pytest.param(PAIR, SWAP | GATHER, (4, 4), 'all_to_all', marks=pytest.mark.slow),
    ({'context': 4}, {'seq': None}, (4, 2), 'all_reduce'),
  ],
)
def test_equals_one_device(sizes, rules, heads, moves):
  text = assert_same(stream(0, N=heads[0], K=heads[1]), sizes, rules, chunk=3)
  for name in ('collective_permute', 'all_to_all'):
    assert (name in text) == (name == moves)
  assert moves is None or moves in text


@pytest.mark.parametrize('rules', [RING, pytest.param(GATHER, marks=pytest.mark.slow)])
def test_looking_at_another_stream_equals_one_device(rules):
  assert_same(items(0), {'fsdp': 2, 'context': 4}, rules)


@pytest.mark.slow
def test_reach_and_chunks_change_no_number():
  x = stream(1, longest=6)
  for rules in (RING, SWAP, GATHER):
    assert_same(x, {'context': 2}, rules, reach=5, chunk=4)


def test_no_device_holds_the_keys_of_all_in_either_direction():
  x = stream(0, T=16, N=2, K=1, B=1, H=64)
  whole = x[1].size
  with sharding.use(sharding.make_mesh(LONG), sharding.rules_for('dp')):
    f, args = value_and_grads(x)
    sizes = [size for j in shard_maps(jax.make_jaxpr(f)(*args).jaxpr) for size in of(j)]
  assert 2 * max(sizes) <= whole  # queries of two heads, accumulated


def shard_maps(jaxpr):
  for eqn in jaxpr.eqns:
    for inner in within(eqn):
      yield from [inner] if eqn.primitive.name == 'shard_map' else shard_maps(inner)


def of(jaxpr):
  """Elements of every array that a jaxpr makes."""
  for eqn in jaxpr.eqns:
    yield from (v.aval.size for v in eqn.outvars)
    for inner in within(eqn):
      yield from of(inner)


def within(eqn):
  leaves = jax.tree.leaves(
    list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
  )
  return [j for j in (getattr(x, 'jaxpr', x) for x in leaves) if hasattr(j, 'eqns')]


@pytest.mark.parametrize('seed', range(20))
def test_rounds_are_left_out_only_where_nothing_is_seen(seed):
  rng = np.random.default_rng(seed)
  *_, q, k = stream(seed, T=24, longest=10)
  here, there = (slice(4 * i, 4 * i + 4) for i in rng.integers(0, 6, 2))
  q, k = jax.tree.map(lambda x: x[:, here], q), jax.tree.map(lambda x: x[:, there], k)
  may = bool(context._may_meet(q, k))
  assert may or not visible(q, k).any()
  if rng.integers(2):  # padding sees padding in encoders, and nothing else
    q = dataclasses.replace(q, segment_ids=0 * q.segment_ids, last=q.first)
    assert bool(context._may_meet(q, k)) or not visible(q, k).any()


def test_rounds_of_other_documents_and_of_later_slots_are_left_out():
  order = np.arange(4, dtype=np.int32)[None]
  ones = np.ones_like(order)
  queries = QueryTags(ones, 0 * order, order)
  assert context._may_meet(queries, KeyTags(ones, order))
  assert not context._may_meet(queries, KeyTags(ones, order + 4))
  assert not context._may_meet(
    queries, KeyTags(np.array([[2, 2, 2, 0]], np.int32), order)
  )


@pytest.mark.parametrize(
  ('sizes', 'rules', 'change', 'message'),
  [
    ({'context': 4}, RING, dict(T=18), r"'seq' of size 18 does not divide.*16 or 20 wo"),
    (PAIR, RING, dict(N=4, K=1), "'act_kv_heads' of size 1 does not.* = 2; 2 would"),
    (PAIR, SWAP, dict(N=2, K=2), "1 heads a device don't divide over 'attend_heads'"),
    (PAIR, {'kv_seq': 'tensor'}, {}, "split 'seq' over .'context',. but 'kv_seq' over"),
    (PAIR, {'attend_heads': 'tensor'}, {}, "'attend_heads' over .'tensor',.; it must be"),
    (PAIR, {'act_heads': None}, {}, "split 'act_kv_heads' over .'tensor',. but"),
  ],
)
def test_refuses(sizes, rules, change, message):
  with pytest.raises(ValueError, match=message) as error:
    on_mesh(sizes, rules, stream(0, **change))
  assert '\n' not in str(error.value)
