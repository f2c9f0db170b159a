import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import CROSS, SELF, tags

from mmjax.batch import KeyTags, QueryTags, visible
from mmjax.ops.kernels import tiles as lib
from mmjax.ops.kernels.tiles import FIRST, LAST, STATE, Tiles

meetings = jax.jit(lib.meetings, static_argnums=2)
table = jax.jit(lambda x: lib.table(x)[:2])
SIZE = Tiles(8, 16)


def seen(query, key, size=SIZE):
  """(anybody, everybody) sees in each tile pair, by looking at every slot."""
  mask = np.asarray(visible(query, key))
  B, T, S = mask.shape
  mask = mask.reshape(B, T // size.queries, size.queries, S // size.keys, size.keys)
  return mask.any((2, 4)), mask.all((2, 4))


@settings(max_examples=40)
@given(kind=st.sampled_from(SELF), seed=st.integers(0, 10_000))
def test_a_skipped_tile_is_seen_by_nobody_and_a_full_one_by_all(kind, seed):
  query, key = tags(kind, seed, 64, 64)
  some, every = seen(query, key)
  got = np.asarray(meetings(query, key, SIZE))
  assert not (some & (got == lib.SKIPPED)).any()
  assert not (~every & (got == lib.FULL)).any()


@pytest.mark.parametrize('kind', ['documents', 'blocks', 'items'])
@pytest.mark.parametrize('seed', range(5))
def test_of_packed_documents_exactly_those_that_meet_are_visited(kind, seed):
  query, key = tags(kind, seed, 64, 64)
  some, every = seen(query, key)
  got = np.asarray(meetings(query, key, SIZE))
  np.testing.assert_array_equal(got > lib.SKIPPED, some)
  np.testing.assert_array_equal(got == lib.FULL, every)


@pytest.mark.parametrize('kind', ['window', 'branches', 'latest'])
def test_few_tiles_are_visited_in_vain(kind):
  T, S = 512, 512 if kind in SELF else 160
  vain = total = 0
  for seed in range(5):
    query, key = tags(kind, seed, T, S)
    some, _ = seen(query, key)
    got = np.asarray(meetings(query, key, SIZE)) > lib.SKIPPED
    vain, total = vain + (got & ~some).sum(), total + some.sum()
  assert vain < 0.2 * total < 0.2 * some.size * 5


def test_tiles_that_nobody_has_filled_meet_nobody():
  query, key = tags('random', 0, 64, 64)
  query.segment_ids[:, 8:16] = -1
  key.segment_ids[:, :16] = -2
  got = np.asarray(meetings(query, key, SIZE))
  assert not got[:, 1].any() and not got[:, :, 0].any() and got.any()


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_a_table_lists_what_is_visited(seed, share):
  rng = np.random.default_rng(seed)
  states = rng.integers(1, 3, (3, 6, 5)).astype(np.int32) * (
    rng.random((3, 6, 5)) < share
  )
  states = states.astype(np.int32)
  entries, steps = map(np.asarray, table(states))
  made = lib.Table(entries, steps, 30, 3)
  longest = 0
  for b in range(3):
    want, idle = [], []
    for outer in range(6):
      tiles = [(outer, i, states[b, outer, i]) for i in range(5) if states[b, outer, i]]
      want += tiles or [(outer, want[-1][1] if want else 0, 0)]
    longest = max(longest, len(want))
    for n in range(30):
      outer, inner, bits = made.read(entries, b, n)
      if n >= len(want):
        idle.append((outer, inner, bits))
        continue
      assert (outer, inner, bits & STATE) == want[n]
      assert bool(bits & FIRST) == (n == 0 or want[n - 1][0] != outer)
      assert bool(bits & LAST) == (n + 1 == len(want) or want[n + 1][0] != outer)
    assert set(idle) <= {(*want[-1][:2], 0)}  # stay where they are, do nothing
  assert steps == longest


@pytest.mark.parametrize('T', [1, 127, 128, 640, 729, 1100, 4096])
@pytest.mark.parametrize('kind', [*lib.SIZES, 'some other'])
def test_sizes_are_even_and_of_whole_registers(kind, T):
  G, H = 8, 256
  made = lib.tiles_for(kind, T, 2 * T, G, H, 4)
  for size, length in zip(made, (T, 2 * T)):
    count = -(-length // size)
    assert size % lib.LANES == 0 and count * size - length < count * lib.LANES
  assert made.queries * G * H * 4 <= lib._QUERY_BYTES or made.queries == lib.LANES


def test_cross_attention_patterns_are_there():  # of this test's own generator
  for kind in CROSS:
    query, key = tags(kind, 1, 64, 40)
    assert isinstance(query, QueryTags) and isinstance(key, KeyTags)
    assert 0 < np.asarray(visible(query, key)).mean() < 0.5
