import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documents import length, pack, random_document
from fusions import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from wide import float64, largest_error, widen

from mmjax import models
from mmjax.batch import PackedBatch
from mmjax.generate import Greedy, Sample, generate, make_generate
from mmjax.generate.decode import bucket, bucketed

MODEL = models.build(
  'unified', vocab_size=40, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2,
  head_dim=8, mlp_dim=24, media=[['image', 6]],
)  # fmt: skip
NEVER = -7  # an end_id that no logits can give


@functools.cache
def params(seed=0):
  batch = pack([[[('text', [1, 2], True)]]])
  made = jax.jit(MODEL.init)(jax.random.key(seed), batch)['params']
  return jax.tree.map(lambda x: 2 * x, made)  # far from uniform


@jax.jit
def full_logits(params, batch):
  hidden = MODEL.apply({'params': params}, batch)
  return MODEL.apply({'params': params}, hidden, method='logits')


@functools.cache
def extend(scan):
  model = MODEL if scan else MODEL.unscanned(params())[0]
  weights = params() if scan else MODEL.unscanned(params())[1]

  @jax.jit
  def step(batch, cache, slot):
    hidden, cache = model.apply({'params': weights}, batch, cache, slot, method='extend')
    return model.apply({'params': weights}, hidden, method='logits'), cache

  return model, step


@settings(max_examples=10, deadline=None)
@given(
  seed=st.integers(0, 10_000),
  spans=st.text('ti', min_size=1, max_size=5),
  scan=st.booleans(),
)
def test_cached_logits_equal_the_full_forward(seed, spans, scan):
  """Feeds random interleavings span by span, padded to one width, at growing slots."""
  rng = np.random.default_rng(seed)
  rows = [[random_document(rng, spans)] for _ in range(2)]
  batch = pack(rows)
  want = full_logits(params(), batch)
  model, step = extend(scan)
  width, cache = 12, model.empty_cache(2, 12 * 6)
  places = np.zeros(2, int)
  for i in range(len(spans)):
    piece = pack([[], []], T=width)
    sizes = [length([row[0][i]]) for row in rows]
    for b, n in enumerate(sizes):
      here = slice(places[b], places[b] + n)
      for name, x in vars(piece.stream).items():
        x[b, :n] = getattr(batch.stream, name)[b, here]
    piece = PackedBatch(piece.stream, batch.bank)
    got, cache = step(piece, cache, jnp.int32(i * width))
    for b, n in enumerate(sizes):
      here = slice(places[b], places[b] + n)
      assert_close(got[b, :n], want[b, here], 1e-5)
    places += sizes


def slowly(rows, max_new):
  """Greedy tokens by running the whole document again for every token."""
  rows = [[[*d]] for [d] in rows]
  out = np.zeros((len(rows), max_new), int)
  for i in range(max_new):
    logits = full_logits(params(), pack(rows))
    for b, [d] in enumerate(rows):
      out[b, i] = np.argmax(logits[b, length(d) - 1])
      d.append(('text', [out[b, i]], False))
  return out


def prompts(seed=0):
  """Ragged prompts; one ends in an image."""
  rng = np.random.default_rng(seed)
  return [[random_document(rng, spans)] for spans in ('tit', 't', 'titi')]


@functools.cache
def decoder(end_id, max_new=6):
  return make_generate(MODEL, max_new, end_id)


def test_greedy_equals_argmax_of_repeated_forwards():
  rows = prompts()
  got = decoder(NEVER)(params(), pack(rows, T=30))
  assert (got.shape, got.dtype) == ((3, 6), jnp.int32)
  want = slowly(rows, 6)
  np.testing.assert_array_equal(got, want)
  assert len(np.unique(want)) > 3  # not one token for ever


@pytest.mark.parametrize('count', [1, 3])  # one row's products are of two on a CPU
def test_narrow_text_is_the_likeliest_but_for_rounding(count):
  """In bfloat16 every token's logit, by full forwards in float32, is nearly the best."""
  rows = prompts()[:count]
  made = make_generate(MODEL.clone(dtype='bfloat16'), 6, NEVER)(
    params(), pack(rows, T=30)
  )
  assert len(np.unique(made)) > 2
  for i in range(6):
    logits = full_logits(params(), pack(rows))
    for b, [d] in enumerate(rows):
      last = np.asarray(logits[b, length(d) - 1])
      assert last[made[b, i]] > last.max() - 0.02 * np.ptp(last)
      d.append(('text', [made[b, i]], False))


def test_what_is_written_goes_on_from_the_trunk():
  rng = np.random.default_rng(4)
  trunk = random_document(rng, 'tit')
  branches = [('text', rng.integers(1, 40, n), False, n) for n in (2, 3)]
  got = decoder(NEVER)(params(), pack([[trunk], [trunk + branches], [[*trunk]]], T=30))
  np.testing.assert_array_equal(got[0], got[1])
  assert len(np.unique(got[0])) > 1


def test_padding_and_neighbours_change_no_token():
  rows = prompts()
  together = decoder(NEVER)(params(), pack(rows, T=30))
  wide = decoder(NEVER)(params(), pack(rows[::-1], T=37))
  np.testing.assert_array_equal(together, wide[::-1])


def test_rows_stop_at_the_end_token_each_on_its_own():
  rows = prompts()
  batch = pack(rows, T=30)
  free = np.asarray(decoder(NEVER)(params(), batch))
  end = int(free[0, 2])
  got = decoder(end)(params(), batch)
  for b in range(3):
    stop = np.flatnonzero(free[b] == end)
    n = stop[0] if len(stop) else 6
    np.testing.assert_array_equal(got[b, :n], free[b, :n])
    np.testing.assert_array_equal(got[b, n:], end)
  assert (np.asarray(got) != end).any()


def test_the_loop_ends_when_all_rows_have():
  rows = prompts()
  batch = pack(rows, T=30)
  steps = []

  def sampler(logits, rng):  # says 5, which ends, at once
    jax.debug.callback(lambda: steps.append(1))
    return jnp.full(len(logits), 5, jnp.int32)

  got = make_generate(MODEL, 6, 5, sampler)(params(), batch, jax.random.key(0))
  jax.effects_barrier()
  np.testing.assert_array_equal(got, 5)
  assert len(steps) == 1


def test_an_empty_row_is_all_end():
  batch = pack(prompts(), T=30)
  stream = jax.tree.map(np.copy, batch.stream)
  stream.segment_ids[1], stream.last[1] = 0, -1
  got = decoder(3)(params(), PackedBatch(stream, batch.bank))
  np.testing.assert_array_equal(got[1], 3)


def test_compiles_once_for_all_contents_and_parameters():
  f = decoder(NEVER)
  f(params(), pack(prompts(0), T=30))
  compiled = programs(f)
  f(jax.tree.map(jnp.zeros_like, params()), pack(prompts(1), T=30))
  assert programs(f) == compiled


def programs(f):
  """How many programs there are of prefix, prefill and loop."""
  made = f.read_program, f.prefill_program, f.loop_program
  return tuple(program._cache_size() for program in made)


def test_one_prefill_for_a_bucket_and_one_loop_for_all():
  f = make_generate(MODEL, 6, NEVER, slots=60)
  for T, P, I in ((33, 35, 5), (40, 48, 8), (48, 33, 6)):
    rows = [[[*d, ('text', [T % 40], False)]] for [d] in prompts()]
    got = f(params(), pack(rows, T=T, P=P, I=I))
    # As it is, on a device, is not padded.
    want = decoder(NEVER)(params(), jax.device_put(pack(rows, T=35)))
    np.testing.assert_array_equal(got, want)
  assert programs(f) == (0, 2, 1)  # items are 6 or 8
  short = [[[('text', [3, 4], False)]] for _ in range(3)]
  f(params(), pack(short, T=9, I=8))
  assert programs(f) == (0, 3, 1)
  with pytest.raises(ValueError, match='need 69 slots of the cache, it has 60'):
    f(params(), pack(prompts(), T=60))


def test_buckets():
  sizes = [bucket(n) for n in range(1, 200)]
  assert sizes[:13] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
  assert all(n <= size < 1.5 * n for n, size in enumerate(sizes, 1))
  assert len(set(sizes)) == 16
  assert bucket(5, 16) == 16


@pytest.mark.parametrize('rows', [1, 3])
def test_the_loop_writes_where_the_given_cache_stands(rows):
  f = decoder(NEVER)
  state = f.prefill_program(
    params(), bucketed(pack(prompts()[:rows])), jax.random.key(0), None, slots=500
  )
  lowered = f.loop_program.lower(params(), state, jax.random.key(0))
  held = sum(x.nbytes for x in jax.tree.leaves(state.cache))
  memory = lowered.compile().memory_analysis()
  assert held <= memory.alias_size_in_bytes
  # No second one, not even for a while.
  weights = sum(x.nbytes for x in jax.tree.leaves(params()))
  assert memory.temp_size_in_bytes < weights + held / 2
  f.loop_program(params(), state, jax.random.key(0))
  assert all(x.is_deleted() for x in jax.tree.leaves(state.cache))


def continued(prefix, rows, own, **kwargs):
  """(tokens, logits) of rows that go on from a prefix, or begin with it themselves."""
  seen = []

  def sampler(logits, rng):
    jax.debug.callback(lambda x: seen.append(np.asarray(x)), logits, ordered=True)
    return Greedy()(logits, rng)

  f = make_generate(MODEL, 6, NEVER, sampler, **kwargs)
  if own:
    rows, prefix = [[[*prefix, *d]] for [d] in rows], None
  else:
    prefix = pack([[prefix]])
    prefix = f.read(params(), prefix) if kwargs else prefix
  got = f(params(), pack(rows, T=80 if own else 40, P=80), jax.random.key(0), prefix)
  jax.effects_barrier()
  return np.asarray(got), np.stack(seen)


@pytest.mark.parametrize('kwargs', [{}, dict(slots=110)])
def test_a_prefix_read_once_is_as_each_row_s_own(kwargs):
  prefix = random_document(np.random.default_rng(8), 'titit')
  tokens, logits = continued(prefix, prompts(), False, **kwargs)
  want_tokens, want = continued(prefix, prompts(), True)
  np.testing.assert_array_equal(tokens, want_tokens)
  np.testing.assert_allclose(logits, want, atol=1e-5 * np.abs(want).max())
  other = random_document(np.random.default_rng(9), 'titit')
  assert (continued(other, prompts(), False)[0] != tokens).any()


def test_a_prefix_is_one_row_and_fits():
  f = make_generate(MODEL, 6, NEVER)
  two = pack(prompts()[:2], T=30)
  with pytest.raises(ValueError, match='a prefix has one row, got 2'):
    f(params(), two, prefix=two)
  with pytest.raises(ValueError, match='for many batches needs slots, got none'):
    f.read(params(), two)
  f = make_generate(MODEL, 6, NEVER, slots=40)
  with pytest.raises(ValueError, match='need 69 slots of the cache, it has 40'):
    f(params(), two, prefix=pack([[]], T=30))


def test_a_key_draws_the_same_in_every_bucket():
  f = make_generate(MODEL, 6, NEVER, Sample(2.0), slots=60)
  a, b = (f(params(), pack(prompts(), T=T), jax.random.key(3)) for T in (30, 45))
  np.testing.assert_array_equal(a, b)
  c = f(params(), pack(prompts(), T=30), jax.random.key(4))
  assert (a != c).any()


def test_sampling_needs_and_follows_its_key():
  batch = pack(prompts(), T=30)
  run = functools.partial(
    generate, MODEL, params(), batch, max_new=6, end_id=NEVER, sampler=Sample(2.0)
  )
  a, b, c = (np.asarray(run(rng=jax.random.key(s))) for s in (0, 0, 1))
  np.testing.assert_array_equal(a, b)
  assert (a != c).any()
  likeliest = generate(
    MODEL, params(), batch, max_new=6, end_id=NEVER, sampler=Sample(1.0, top_k=1)
    , rng=jax.random.key(0)
  )  # fmt: skip
  np.testing.assert_array_equal(likeliest, decoder(NEVER)(params(), batch))
  with pytest.raises(ValueError, match='a sampler that draws needs rng'):
    run()


def test_refuses_to_write_nothing():
  with pytest.raises(ValueError, match='max_new must be at least 1, got 0'):
    make_generate(MODEL, 0, 1, Greedy())


def test_cached_logits_differ_by_rounding_alone():
  """In float64 cached logits are the full forward's to 1e-12 of the largest logit."""
  model = MODEL.clone(dtype='float64', param_dtype='float64')
  variables = {'params': widen(params())}

  def logits(hidden):
    return model.apply(variables, hidden, method='logits')

  @jax.jit
  def full(batch):
    return logits(model.apply(variables, batch))

  @jax.jit
  def step(batch, cache, slot):
    hidden, cache = model.apply(variables, batch, cache, slot, method='extend')
    return logits(hidden), cache

  rng, width = np.random.default_rng(0), 12
  with float64():
    for spans in ('i', 'tt', 'titi', 'iittt', 'tiiti'):
      document = random_document(rng, spans)
      batch = widen(pack([[document]], T=60))
      want = np.asarray(full(batch))[0, : length(document)]
      cache, start, got = model.empty_cache(1, width * 5), 0, []
      for i, span in enumerate(document):
        piece, n = widen(pack([[]], T=width)), length([span])
        for name, x in vars(piece.stream).items():
          x[0, :n] = getattr(batch.stream, name)[0, start : start + n]
        piece = PackedBatch(piece.stream, batch.bank)
        new, cache = step(piece, cache, jnp.int32(i * width))
        got.append(np.asarray(new)[0, :n])
        start += n
      assert largest_error(np.concatenate(got), want) < 1e-12
