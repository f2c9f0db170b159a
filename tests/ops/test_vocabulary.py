"""Blocks of words, on one device or many, give what all logits at once would give."""

import functools
import os
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import sharding
from mmjax.ops import vocabulary
from mmjax.ops.vocabulary import Head, log_probs

B, K, D = 8, 3, 6
# 24 places: blocks of 5 words, of 128, or all words at once.
LIMITS = [5 * 24 * 4, 128 * 24 * 4, 2**28]


def example(words=(320,), axes=(('vocab', 'embed'),), soft_cap=None, dtype=np.float32):
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(B, K, D)).astype(dtype)
  kernels = [rng.normal(size=(D, V)) for V in words]
  kernels = [k if a[0] == 'embed' else k.T for k, a in zip(kernels, axes)]
  kernels = tuple(k.astype(dtype) for k in kernels)
  tokens = rng.integers(0, sum(words), (B, K)).astype(np.int32)
  tokens[0] = [0, sum(words) - 1, words[0] - 1]
  cotangents = rng.normal(size=(2, B, K)).astype(np.float32)
  return hidden, Head(kernels, axes, soft_cap), tokens, cotangents


def plain(hidden, head, tokens):
  """All logits at once: log_z and the right logit."""
  kernels = [k if a[0] == 'embed' else k.T for k, a in zip(head.kernels, head.axes)]
  logits = hidden @ jnp.concatenate(kernels, 1)
  if head.soft_cap:
    logits = head.soft_cap * jnp.tanh(logits / head.soft_cap)
  right = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
  return jax.nn.logsumexp(logits, -1), right, jnp.argmax(logits, -1)


def with_gradients(f, hidden, head, tokens, cotangents):
  def both(hidden, head):
    made = f(hidden, head, tokens)
    return made[:2], made[2]

  value, pull, best = jax.vjp(both, hidden, head, has_aux=True)
  return value, pull(tuple(cotangents)), best


def in_blocks(limit):
  return functools.partial(log_probs, limit=limit)


def assert_close(got, want, rtol=1e-6):
  """Relative to the largest entry of each leaf."""
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=0, atol=rtol * np.abs(w).max())


TIED, UNTIED = (('vocab', 'embed'),), (('embed', 'vocab'),)
MORE = (('vocab', 'embed'), (None, 'embed'))
HEADS = [
  dict(axes=TIED),
  dict(axes=UNTIED, words=(331,), soft_cap=2.0),  # no block size divides 331
  dict(axes=MORE, words=(312, 7)),
  dict(axes=(('embed', 'vocab'), ('embed', None)), words=(312, 1), soft_cap=1.5),
]


@pytest.mark.parametrize(
  ('form', 'limit'), [(0, 0), (0, 1), (1, 0), (1, 2), (2, 0), (3, 1)]
)
def test_equals_all_logits_at_once(form, limit):
  args, limit = example(**HEADS[form]), LIMITS[limit]
  want = jax.jit(functools.partial(with_gradients, plain))(*args)
  got = jax.jit(functools.partial(with_gradients, in_blocks(limit)))(*args)
  assert_close(got[:2], want[:2])
  np.testing.assert_array_equal(got[2], want[2])
  logits = jax.jit(Head.logits)(args[1], args[0])
  np.testing.assert_allclose(jax.nn.logsumexp(logits, -1), want[0][0], rtol=1e-6)


def some_used(share):
  """bool[B, K], rows of unlike numbers."""
  rng = np.random.default_rng(1)
  used = np.arange(K)[None] < rng.integers(0, K + 1, (B, 1))
  return {'none': used & False, 'some': used, 'all': used | True}[share]


def assert_equal_where_used(got, want, used):
  """Of (statistics, gradients, best); the gradients are of masked cotangents."""
  assert_close(got[0], [np.where(used, w, 0) for w in want[0]])
  assert_close(got[1], want[1])
  np.testing.assert_array_equal(got[2], np.where(used, want[2], -1))


@pytest.mark.parametrize('share', ['none', 'some', 'all'])
@pytest.mark.parametrize(('form', 'limit'), [(0, 0), (1, 1), (3, 0), (0, 2)])
def test_places_that_are_not_used_have_nothing(form, limit, share):
  *args, cotangents = example(**HEADS[form])
  used = some_used(share)
  want = jax.jit(functools.partial(with_gradients, plain))(*args, cotangents * used)
  f = functools.partial(log_probs, used=used, limit=LIMITS[limit])
  got = jax.jit(functools.partial(with_gradients, f))(*args, cotangents)
  assert_equal_where_used(got, want, used)


@pytest.mark.parametrize('places', range(2, 25, 2))
def test_places_that_are_not_used_are_not_computed(places):
  """Those beyond the next eighth, of which five are the least: they may hold NaN."""
  hidden, head, tokens, cotangents = example()
  order = np.random.default_rng(places).permutation(B * K)
  used = np.zeros(B * K, bool)
  used[order[:places]] = True
  computed = max(-(-places // 3) * 3, 15)
  beyond = np.flatnonzero(~used)[computed - places :]  # those stay in their order
  hidden.reshape(B * K, D)[beyond] = np.nan
  f = functools.partial(log_probs, used=used.reshape(B, K), limit=LIMITS[0])
  got = jax.jit(functools.partial(with_gradients, f))(hidden, head, tokens, cotangents)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
  if len(beyond):  # but the one before them is computed
    hidden.reshape(B * K, D)[np.flatnonzero(~used)[: computed - places]] = np.nan
    got = jax.jit(functools.partial(with_gradients, f))(hidden, head, tokens, cotangents)
    finite = np.isfinite(got[1][1].kernels[0]).all()
    assert finite == (computed == places)


@pytest.mark.parametrize('limit', LIMITS)
def test_of_equal_logits_the_first_counts_and_nan_none(limit):
  kernel = jnp.zeros((D, 320)).at[0, 200].set(1.0).at[0, 300].set(1.0)
  hidden = jnp.zeros((1, 24, D)).at[0, 1, 0].set(1.0).at[0, 2].set(jnp.nan)
  tokens = jnp.zeros((1, 24), jnp.int32)
  best = in_blocks(limit)(hidden, Head((kernel,), UNTIED), tokens).best
  assert best[0, :2].tolist() == [0, 200]
  assert best[0, 2] not in range(320)


# Mesh, rules beside 'fsdp+tensor', and kernels.
MESHES = [
  (dict(fsdp=4, tensor=2), {}, dict(axes=MORE, words=(320, 7))),
  (dict(data=2, fsdp=2, tensor=2), {}, dict(axes=UNTIED, soft_cap=2.0)),
  (dict(fsdp=2, context=2, tensor=2), {}, dict(axes=TIED)),
  (dict(fsdp=2, tensor=4), dict(vocab=None), dict(axes=TIED)),
]


def on_mesh(sizes, overrides, args, limit, used=None):
  """The compiled gradients on a mesh, and their arguments in place."""
  mesh = sharding.make_mesh(sizes)
  rules = sharding.rules_for('fsdp+tensor', {'embed': 'fsdp', **overrides})
  hidden, head, tokens, cotangents = args
  with sharding.use(mesh, rules):

    def put(x, *names):
      spec = sharding.to_spec(names, rules, '', x.shape, mesh)
      return jax.device_put(x, jax.NamedSharding(mesh, spec))

    kernels = tuple(put(k, *a) for k, a in zip(head.kernels, head.axes))
    head = Head(kernels, head.axes, head.soft_cap)
    args = put(hidden, 'batch', None, None), head, put(tokens, 'batch', None)
    args = (*args, put(cotangents, None, 'batch', None))
    f = functools.partial(log_probs, used=used, limit=limit)
    f = jax.jit(functools.partial(with_gradients, f))
    return f.lower(*args).compile(), args


@pytest.mark.parametrize(
  ('limit', 'share'), [(5 * 6 * 4, None), (2**28, None), (5 * 6 * 4, 'some')]
)
@pytest.mark.parametrize('case', MESHES)
def test_many_devices_equal_one(case, limit, share):
  sizes, overrides, form = case
  used = None if share is None else some_used(share)
  hidden, head, tokens, cotangents = example(**form)
  # fsdp of 4 splits a width of 8.
  wide = jax.tree.map(lambda x: x, (hidden, head))
  hidden = np.pad(wide[0], ((0, 0), (0, 0), (0, 2)))
  kernels = tuple(
    np.pad(k, [(0, 2 * (name == 'embed')) for name in a])
    for k, a in zip(head.kernels, head.axes)
  )
  args = hidden, Head(kernels, head.axes, head.soft_cap), tokens, cotangents
  all_used = np.ones((B, K), bool) if used is None else used
  want = jax.jit(functools.partial(with_gradients, plain))(*args[:3], args[3] * all_used)
  compiled, placed = on_mesh(sizes, overrides, args, limit, used)
  got = compiled(*placed)
  assert_equal_where_used(got, want, all_used)
  for g, k in zip(got[1][1].kernels, placed[1].kernels):
    assert g.sharding.is_equivalent_to(k.sharding, g.ndim)


def test_devices_send_statistics_and_kernels_but_no_logits():
  """With 320 words over tensor=2 in blocks of 5 (x 2 devices), whole in D = 8."""
  args = example()
  hidden = np.pad(args[0], ((0, 0), (0, 0), (0, 2)))
  head = Head((np.pad(args[1].kernels[0], ((0, 0), (0, 2))),), TIED)
  compiled, _ = on_mesh(dict(fsdp=4, tensor=2), {}, (hidden, head, *args[2:]), 5 * 6 * 4)
  text = compiled.as_text()
  moved = re.findall(r'= \(?\w+\[([\d,]*)\]\S* (all-\w+|reduce-scatter|coll\S+)\(', text)
  assert moved
  sizes = {tuple(map(int, filter(None, s.split(',')))) for s, _ in moved}
  # A block of the kernel, or of its gradient; a place's statistics; hidden's gradient.
  largest = max(int(np.prod(s)) for s in sizes)
  assert largest <= 24 * 8
  rest = sizes - {(8, 1, 5)}  # a block [D, Q, V]; logits have 6 or 24 places, not 8
  assert not any(s[-1:] == (5,) or 320 in s or 160 in s for s in rest if len(s) > 1), (
    sizes
  )


def test_of_few_places_it_is_they_that_move():
  """24 places and 320 words on 8 devices: no device has the whole kernel, [320, 8]."""
  hidden, head, *rest = example()
  hidden = np.pad(hidden, ((0, 0), (0, 0), (0, 2)))
  head = Head((np.pad(head.kernels[0], ((0, 0), (0, 2))),), TIED)
  largest = {}
  for limit in (24 * 8 * 4 - 1, 24 * 8 * 4):  # bytes of the places' gradient
    compiled, _ = on_mesh(dict(fsdp=8), {}, (hidden, head, *rest), limit)
    arrays = re.findall(
      r'= \(?\w+\[([\d,]*)\]\S* all-(?:gather|reduce)\(', compiled.as_text()
    )
    sizes = [int(np.prod([int(n) for n in a.split(',') if n])) for a in arrays]
    largest[limit] = max(sizes)
  few, many = largest.values()
  assert few > 24 * 8 >= many


def test_memory_does_not_grow_with_the_vocabulary():
  hidden, _, tokens, _ = example()
  hidden, tokens = np.tile(hidden, (8, 8, 1)), np.tile(tokens, (8, 8))
  limit = 2**16

  def held(V):
    def f(hidden, kernel):
      made = log_probs(hidden, Head((kernel,), UNTIED), tokens, limit=limit)
      return jnp.sum(made.log_z - made.right)

    kernel = jax.ShapeDtypeStruct((D, V), jnp.float32)
    compiled = jax.jit(jax.grad(f, (0, 1))).lower(hidden, kernel).compile()
    # The gradient of the kernel must exist, also while it's carried.
    return compiled.memory_analysis().temp_size_in_bytes - 2 * 4 * D * V

  assert held(40_000) < held(4_000) + 2**16
  assert held(40_000) < 8 * limit < 64 * 24 * 40_000 * 4 / 100


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(limit=0), 'limit must be at least 1 byte, got 0'),
    (dict(axes=(('vocab', 'heads'),)), 'a kernel .* for width 6'),
    (dict(axes=(('embed', 'vocab'),)), 'a kernel .* for width 6'),
  ],
)
def test_refuses(change, message):
  hidden, head, tokens, _ = example()
  limit = change.pop('limit', 2**28)
  head = Head(head.kernels, **{'axes': head.axes, **change})
  with pytest.raises(ValueError, match=message):
    log_probs(hidden, head, tokens, limit=limit)


def test_refuses_words_that_do_not_divide():
  hidden, head, tokens, _ = example(words=(321,))
  mesh = sharding.make_mesh(dict(fsdp=4, tensor=2))
  with (
    sharding.use(mesh, sharding.RULES['fsdp+tensor']),
    pytest.raises(ValueError, match='321 words do not divide over 2 devices'),
  ):
    log_probs(hidden, head, tokens)


def test_narrow_places_and_wide_kernels_on_older_cpus():
  """XLA lacks some products of bfloat16 for CPUs that have no instructions for them."""
  program = """
    import jax, jax.numpy as jnp
    from mmjax.ops.linear import linear
    from mmjax.ops.vocabulary import Head, log_probs

    def loss(hidden, kernel):
      hidden = linear(hidden, jnp.eye(6))
      head = Head((kernel,), (('embed', 'vocab'),), None)
      made = log_probs(hidden, head, jnp.zeros((8, 3), jnp.int32), limit=4 * 24 * 16)
      return jnp.mean(made.log_z - made.right)

    made = {}
    for dtype in (jnp.bfloat16, jnp.float32):
      hidden, kernel = jnp.ones((8, 3, 6), dtype), jnp.ones((6, 40), jnp.float32)
      made[dtype] = jax.device_get(jax.jit(jax.grad(loss, (0, 1)))(hidden, kernel))
    narrow, wide = made.values()
    assert narrow[1].dtype == jnp.float32 and abs(wide[1]).max() > 0.01
    assert abs(narrow[1] - wide[1]).max() < 0.01 * abs(wide[1]).max()
  """
  flags = '--xla_cpu_max_isa=AVX2'
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(program)],
    env={**os.environ, 'XLA_FLAGS': flags},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-500:]


def test_the_limit_is_stated():
  assert vocabulary.LIMIT == 256 * 2**20


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
@pytest.mark.parametrize('V', [384, 250, 77])
def test_largest_is_the_first_of_equals(monkeypatch, platform, V):
  """In blocks of words and in one."""
  monkeypatch.setattr(sharding, 'device', lambda: (platform, ''))
  logits = np.random.default_rng(0).integers(0, 9, (3, 5, V)).astype(np.float32)
  logits[0, 0] = -np.inf
  logits[0, 1, [3, V - 1]] = np.inf
  made = jax.jit(lambda x: vocabulary.largest(x))  # of this platform alone
  high, place = made(logits)
  np.testing.assert_array_equal(high, logits.max(-1))
  np.testing.assert_array_equal(place, logits.argmax(-1))
  logits[:, :, V - 2] = np.nan
  _, place = made(logits)
  assert ((np.asarray(place) >= 0) & (np.asarray(place) <= V)).all()
