import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.batch import KeyTags, QueryTags, visible
from mmjax.ops.attention import attend as plain_attend

attend = jax.jit(
  plain_attend, static_argnames=('scale', 'logits_soft_cap', 'chunk', 'reach')
)


def reference(q, k, v, query_tags, key_tags, cap=None):
  """Loops over everything, float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  out = np.zeros((B, T, N, H))
  for b, t, n in np.ndindex(B, T, N):
    seen = [
      s
      for s in range(S)
      if query_tags.segment_ids[b, t] == key_tags.segment_ids[b, s]
      and query_tags.first[b, t] <= key_tags.order[b, s] <= query_tags.last[b, t]
      and query_tags.order[b, t] <= key_tags.until[b, s]
    ]
    if seen:
      g = n // (N // K)
      logits = k[b, seen, g] @ q[b, t, n] / np.sqrt(H)
      logits = logits if cap is None else cap * np.tanh(logits / cap)
      p = np.exp(logits - logits.max())
      out[b, t, n] = p @ v[b, seen, g] / p.sum()
  return out


def dense(q, k, v, query_tags, key_tags):
  """The same in a few lines of jnp, to differentiate."""
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
  order = key_tags.order[:, None, None]
  mask = (
    (query_tags.segment_ids[:, None, :, None] == key_tags.segment_ids[:, None, None])
    & (query_tags.first[:, None, :, None] <= order)
    & (order <= query_tags.last[:, None, :, None])
    & (query_tags.order[:, None, :, None] <= key_tags.until[:, None, None])
  )
  logits = jnp.einsum('btnh,bsnh->bnts', q, k) / np.float32(np.sqrt(q.shape[-1]))
  probs = jax.nn.softmax(jnp.where(mask, logits, -1e9), -1)
  return jnp.einsum('bnts,bsnh->btnh', jnp.where(mask, probs, 0.0), v)


def example(seed, B=2, T=7, S=9, N=4, K=2, H=4):
  rng = np.random.default_rng(seed)
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
  q, k, v = (rng.normal(size=s).astype(np.float32) for s in shapes)

  def tags(length, low, high):
    return rng.integers(low, high, (B, length)).astype(np.int32)

  query_tags = QueryTags(tags(T, 0, 3), tags(T, 0, 4), tags(T, -1, 5), tags(T, 0, 5))
  return q, k, v, query_tags, KeyTags(tags(S, 0, 3), tags(S, 0, 5), tags(S, 1, 9))


def packed(seed, T, longest, B=2, N=2, K=1, H=4):
  """Causal documents of at most `longest` slots, then padding."""
  rng = np.random.default_rng(seed)
  segments, order = np.zeros((2, B, T), np.int32)
  for b in range(B):
    t, n = 0, 0
    while t < T - longest // 2:
      size = min(int(rng.integers(1, longest + 1)), T - t)
      n += 1
      segments[b, t : t + size], order[b, t : t + size] = n, np.arange(size)
      t += size
  shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H)
  q, k, v = (rng.normal(size=s).astype(np.float32) for s in shapes)
  first = np.zeros_like(order)
  last = np.where(segments > 0, order, -1)
  return q, k, v, QueryTags(segments, first, last), KeyTags(segments, order)


@settings(max_examples=12, deadline=None)
@given(
  seed=st.integers(0, 1000),
  form=st.sampled_from(
    [((4, 4), 100, None), ((4, 2), 3, 2.0), ((3, 1), 4, None), ((4, 1), 1, None)]
  ),
)
def test_equals_reference(seed, form):
  heads, chunk, cap = form
  x = example(seed, N=heads[0], K=heads[1])
  got = attend(*x, chunk=chunk, logits_soft_cap=cap)
  np.testing.assert_allclose(got, reference(*x, cap=cap), atol=2e-6)


@pytest.mark.parametrize('chunk', [3, 100])
def test_gradients_equal_plain(chunk):
  q, k, v, *tags = example(0)
  out = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

  def loss(f, **kwargs):
    return lambda q, k, v: jnp.sum(f(q, k, v, *tags, **kwargs) * out)

  got = jax.jit(jax.grad(loss(attend, chunk=chunk), (0, 1, 2)))(q, k, v)
  want = jax.jit(jax.grad(loss(dense), (0, 1, 2)))(q, k, v)
  for g, w in zip(got, want):
    np.testing.assert_allclose(g, w, atol=2e-6)


@pytest.mark.parametrize('chunk', [2, 100])
def test_a_query_that_sees_nothing_is_zero_with_finite_gradients(chunk):
  q, k, v, query_tags, key_tags = example(0)
  last = np.where(np.arange(7)[None] == 3, -1, query_tags.last)
  query_tags = dataclasses.replace(query_tags, last=last)

  def loss(q, k, v):
    out = attend(q, k, v, query_tags, key_tags, chunk=chunk)
    return jnp.sum(out**2), out

  grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, 100 * k, v)
  np.testing.assert_array_equal(out[:, 3], 0)
  np.testing.assert_array_equal(grads[0][:, 3], 0)
  assert all(np.isfinite(g).all() for g in grads)
  assert np.any(out[:, :3])


def blocks(x):
  """The same, but every three slots of a document share a rank, as in an image."""
  q, k, v, query, key = x
  rank = key.order // 3
  return (
    q, k, v,
    QueryTags(query.segment_ids, 0 * rank, rank),
    KeyTags(key.segment_ids, rank),
  )  # fmt: skip


@pytest.mark.parametrize('T', [40, 37])
def test_reach_changes_nothing_where_the_promise_holds(T):
  q, k, v, *tags = blocks(packed(0, T, longest=9))

  def run(**kwargs):
    def f(q, k, v):
      out = attend(q, k, v, *tags, **kwargs)
      return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(q, k, v)

  _, query, key = np.nonzero(visible(*tags))
  exact = int((query - key).max()), int((key - query).max())
  assert exact[0] > exact[1] > 0
  want = run(chunk=100)
  for reach in (8, exact):
    got = run(chunk=6, reach=reach)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      np.testing.assert_allclose(g, w, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize('reach', [3, (3, 20), (20, 0)])
def test_reach_really_hides_far_keys(reach):
  x = blocks(packed(0, 40, longest=20))
  assert not np.allclose(attend(*x, chunk=5, reach=reach), attend(*x), atol=1e-3)


@pytest.mark.parametrize('reach', [None, 100])
def test_no_array_of_queries_times_keys_is_held(reach):
  T, N, H, chunk = 4096, 2, 4, 64
  q, k, v, *tags = packed(0, T, 100, B=1, N=N, K=N, H=H)

  def f(q, k, v):
    return jnp.sum(attend(q, k, v, *tags, chunk=chunk, reach=reach))

  both = jax.jit(jax.value_and_grad(f, (0, 1, 2)))
  bound = N * chunk * (T if reach is None else chunk + 2 * reach)
  assert _largest(jax.make_jaxpr(both)(q, k, v).jaxpr) <= max(bound, T * N * H)
  memory = both.lower(q, k, v).compile().memory_analysis()
  # A handful of chunk-sized arrays and copies of q, k, v; one [T, S] alone is 64 MiB.
  assert memory.temp_size_in_bytes < 4 * (6 * bound + 20 * T * N * H) < T * T * 4


def test_gqa_does_not_repeat_keys():
  T, S, N, H = 4, 64, 8, 16
  q, k, v, query_tags, key_tags = packed(0, S, 9, B=1, N=N, K=1, H=H)
  q, query_tags = jax.tree.map(lambda x: x[:, :T], (q, query_tags))
  jaxpr = jax.make_jaxpr(attend)(q, k, v, query_tags, key_tags).jaxpr
  assert _largest(jaxpr) == N * T * S < N * S * H  # logits, not repeated keys


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(chunk=0), 'chunk must be at least 1'),
    (dict(reach=2), r'reach \(2, 2\) needs T == S'),
    (dict(K=3), '4 query heads do not divide over 3'),
    (dict(S=9, cut=True), 'axis S is 9 and 8'),
  ],
)
def test_refuses(change, message):
  change = dict(change)
  cut = change.pop('cut', False)
  sizes = {k: change.pop(k) for k in 'SK' if k in change}
  q, k, v, *tags = example(0, **sizes)
  v = v[:, :8] if cut else v
  with pytest.raises(ValueError, match=message):
    attend(q, k, v, *tags, **change)


def _largest(jaxpr):
  """Elements of the largest array anywhere in a jaxpr."""
  sizes = [
    int(np.prod(v.aval.shape))
    for eqn in jaxpr.eqns
    for v in eqn.outvars
    if hasattr(v.aval, 'shape')
  ]
  for eqn in jaxpr.eqns:
    for value in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        sizes.append(_largest(inner))
  return max(sizes, default=0)
