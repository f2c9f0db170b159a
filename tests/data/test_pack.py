"""Packed batches: taken apart again by their tags they give the documents back."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.batch import PLACEHOLDER, BankBudget, Budget
from mmjax.data.example import Example, MediaArrays
from mmjax.data.pack import fit_budget, needs_of, pack
from mmjax.data.plan import Lengths

CHANNELS = {'image': 3, 'audio': 2}
BUDGET = Budget(
  96, 80, {'image': BankBudget(64, 24, 3), 'audio': BankBudget(60, 20, 2, 'float32')}
)


def random_example(rng, parts):
  """An example of arbitrary tags; `parts` is a string of t(ext), i(mage), a(udio).

  Items have 1-3 patches and, unlike those, 0-2 slots, as encoders may.
  """
  tokens, source, num_slots, media = [], [], {}, {}
  for part in parts:
    n = int(rng.integers(1, 4))
    if part == 't':
      tokens += rng.integers(0, 100, n).tolist()
      source += [-1] * n
      continue
    kind = {'i': 'image', 'a': 'audio'}[part]
    slots = int(rng.integers(0, 3))
    seen = num_slots.get(kind, 0)
    tokens += [PLACEHOLDER[kind]] * slots
    source += range(seen, seen + slots)
    num_slots[kind] = seen + slots
    media.setdefault(kind, []).append(n)
  n = len(tokens)

  def of_kind(kind, sizes):
    P, C = sum(sizes), CHANNELS[kind]
    dtype = BUDGET.bank[kind].dtype
    return MediaArrays(
      values=rng.integers(0, 256, (P, C)).astype(dtype),
      positions=rng.integers(0, 9, (P, 3)).astype(np.int32),
      items=np.repeat(np.arange(1, len(sizes) + 1), sizes).astype(np.int32),
      item_order=rng.integers(0, 9, len(sizes)).astype(np.int32),
    )

  return Example(
    tokens=np.array(tokens, np.int32),
    order=rng.integers(0, 50, n).astype(np.int32),
    first=rng.integers(0, 50, n).astype(np.int32),
    last=rng.integers(0, 50, n).astype(np.int32),
    until=rng.integers(0, 50, n).astype(np.int32),
    positions=rng.integers(0, 50, (n, 3)).astype(np.int32),
    weights=rng.integers(0, 2, n).astype(np.float32),
    source=np.array(source, np.int32),
    media={kind: of_kind(kind, sizes) for kind, sizes in media.items()},
  )


def unpack(batch):
  """The examples of each row, found by their tags alone."""
  s, rows = batch.stream, []
  for b in range(len(s.tokens)):
    row = []
    for segment in range(1, s.segment_ids[b].max(initial=0) + 1):
      here = s.segment_ids[b] == segment
      before = (s.segment_ids[b] > 0) & (s.segment_ids[b] < segment)
      source, media = s.source[b, here].copy(), {}
      for kind, bank in batch.bank.items():
        of_kind = s.tokens[b, here] == PLACEHOLDER[kind]
        source[of_kind] -= (s.tokens[b, before] == PLACEHOLDER[kind]).sum()
        items = np.flatnonzero(bank.item_segments[b] == segment)
        patches = np.isin(bank.items[b], items + 1)
        if len(items):
          media[kind] = MediaArrays(
            bank.values[b, patches],
            bank.positions[b, patches],
            bank.items[b, patches] - np.int32(items[0]),
            bank.item_order[b, items],
          )
      names = ('tokens', 'order', 'first', 'last', 'until', 'positions', 'weights')
      arrays = {name: getattr(s, name)[b, here] for name in names}
      row.append(Example(**arrays, source=source, media=media))
    rows.append(row)
  return rows


def same(a, b):
  for field in dataclasses.fields(Example)[:-1]:
    np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))
  assert a.media.keys() == b.media.keys()
  for kind in a.media:
    for field in dataclasses.fields(MediaArrays):
      x, y = (getattr(e.media[kind], field.name) for e in (a, b))
      np.testing.assert_array_equal(x, y)
      assert x.dtype == y.dtype


documents = st.tuples(
  st.integers(0, 2**32 - 1),
  st.lists(
    st.lists(st.text('tia', max_size=5).map(lambda s: s + 't'), max_size=4), max_size=3
  ),
)


def make(documents):
  seed, rows = documents
  rng = np.random.default_rng(seed)
  return [[random_example(rng, parts) for parts in row] for row in rows]


@settings(max_examples=40)
@given(documents)
def test_round_trip_through_a_batch(documents):
  rows = make(documents)
  batch = pack(rows, BUDGET)
  back = unpack(batch)
  assert [len(row) for row in back] == [len(row) for row in rows]
  for row, again in zip(rows, back):
    for example, other in zip(row, again):
      same(example, other)


@settings(max_examples=30)
@given(documents)
def test_documents_stand_end_to_end_and_the_rest_is_padding(documents):
  rows = make(documents)
  batch = pack(rows, BUDGET)
  empty = BUDGET.empty(len(rows))
  for b, row in enumerate(rows):
    n = sum(len(e.tokens) for e in row)
    want = np.repeat(np.arange(1, len(row) + 1), [len(e.tokens) for e in row])
    assert batch.stream.segment_ids[b, :n].tolist() == want.tolist()
    assert (batch.stream.segment_ids[b, n:] == 0).all()
    assert (batch.stream.first[b, n:] == 0).all()
    assert (batch.stream.last[b, n:] == -1).all()
    assert (batch.stream.weights[b, n:] == 0).all()
    assert (batch.stream.source[b, n:] == -1).all()
    for kind, bank in batch.bank.items():
      p = sum(len(e.media[kind].values) for e in row if kind in e.media)
      assert (bank.items[b, :p] > 0).all()
      assert (bank.items[b, p:] == 0).all()
      assert (bank.values[b, p:] == 0).all()
  for leaf, other in zip(jax.tree.leaves(batch), jax.tree.leaves(empty), strict=True):
    assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype)


def test_nothing_is_left_of_what_the_memory_held():
  rows = make((0, [['ti', 'iat', 'a', 't'], [], ['it']]))
  used = jax.tree.map(lambda x: np.full_like(x, 77), BUDGET.empty(3))
  assert pack(iter(rows), BUDGET, used) is used
  jax.tree.map(np.testing.assert_array_equal, used, pack(rows, BUDGET))


def test_no_documents_is_the_empty_batch():
  for leaf, other in zip(
    jax.tree.leaves(pack([[], []], BUDGET)), jax.tree.leaves(BUDGET.empty(2)), strict=True
  ):
    np.testing.assert_array_equal(leaf, other)


def test_source_counts_the_slots_of_its_kind_in_the_row():
  rng = np.random.default_rng(0)
  batch = pack([[random_example(rng, 'iatiat') for _ in range(3)]], BUDGET)
  for placeholder in (PLACEHOLDER['image'], PLACEHOLDER['audio']):
    source = batch.stream.source[0, batch.stream.tokens[0] == placeholder]
    assert source.tolist() == list(range(len(source)))
  assert (batch.stream.source[0, batch.stream.tokens[0] >= 0] == -1).all()


def example():
  return random_example(np.random.default_rng(1), 'titat')


@pytest.mark.parametrize(
  'name', ['stream', 'targets', 'image/patches', 'image/items', 'audio/patches']
)
def test_overflow_names_row_document_need_and_budget(name):
  one = example()
  need = needs_of(one)[name]
  assert need > 0
  full = Budget(
    **{n: 2 * need - (name == n) if name == n else 999 for n in ('stream', 'targets')},
    bank={
      kind: dataclasses.replace(
        b,
        **{
          n: 2 * need - 1 if name == f'{kind}/{n}' else 999 for n in ('patches', 'items')
        },
      )
      for kind, b in BUDGET.bank.items()
    },
  )
  pack([[one], [one]], full)
  with pytest.raises(
    ValueError,
    match=f'row 1: document 2 needs {need} of {name}, {need - 1} of {2 * need - 1} are',
  ):
    pack([[one], [one, one]], full)


def test_media_that_the_bank_does_not_hold():
  one = example()
  only_image = Budget(96, 40, {'image': BUDGET.bank['image']})
  with pytest.raises(ValueError, match="row 0: document 1: .*no bank for 'audio'"):
    pack([[one]], only_image)
  wider = dataclasses.replace(BUDGET.bank['image'], channels=4)
  with pytest.raises(
    ValueError, match=r'row 0: document 1 has image patches uint8\[3\].*uint8\[4\]'
  ):
    pack([[one]], Budget(96, 40, {**BUDGET.bank, 'image': wider}))
  floats = dataclasses.replace(BUDGET.bank['image'], dtype='float32')
  with pytest.raises(ValueError, match=r'holds float32\[3\]'):
    pack([[one]], Budget(96, 40, {**BUDGET.bank, 'image': floats}))


@settings(max_examples=20)
@given(st.integers(0, 99), st.lists(st.text('tia', max_size=5), min_size=1, max_size=6))
def test_fit_budget_is_the_smallest_that_holds_each(seed, parts):
  rng = np.random.default_rng(seed)
  examples = [random_example(rng, p + 't') for p in parts]
  budget = fit_budget(examples, BUDGET, multiple=8)
  pack([[e] for e in examples], budget)
  assert budget.stream % 8 == 0
  assert budget.stream - 8 < max(len(e.tokens) for e in examples)
  most = max(int((e.weights > 0).sum()) for e in examples)
  assert budget.targets == max(most, 1)
  for kind, bank in budget.bank.items():
    most = max(needs_of(e).get(f'{kind}/patches', 0) for e in examples)
    assert bank.patches % 8 == 0
    assert bank.patches - 8 < max(most, 1)
    assert bank.channels == CHANNELS[kind]
    assert bank.dtype == BUDGET.bank[kind].dtype
  names = ('stream', 'targets', 'image/patches', 'image/items', 'audio/patches')
  names = (*names, 'audio/items')
  needs = np.array([[needs_of(e).get(name, 0) for name in names] for e in examples])
  assert fit_budget(Lengths(names, needs), BUDGET, multiple=8) == budget


def test_fit_budget_refuses_nothing_and_unknown_kinds():
  with pytest.raises(ValueError, match='no documents'):
    fit_budget([], BUDGET)
  with pytest.raises(ValueError, match="no bank for 'audio'"):
    fit_budget([example()], Budget(96, 40, {'image': BUDGET.bank['image']}))
