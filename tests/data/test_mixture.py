"""Mixtures: shares exact, balanced all along, each source in its own epochs."""

import collections
import json
import types
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.batch import BankBudget, Budget
from mmjax.data.document import Document, Text
from mmjax.data.mixture import Mixture, Shares
from mmjax.data.pipeline import Pipeline
from mmjax.data.plan import Lengths, PackPlan, limits
from mmjax.data.store import Dataset, Index
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.data.writer import Writer

BUDGET = Budget(64, 40, {'image': BankBudget(24, 8, 12)})
NAMES = ('stream', 'targets', 'image/patches', 'image/items')


def plan_of(sizes, weights, seed=0, rows=1, longest=30):
  rng = np.random.default_rng(seed)
  n = sum(sizes)
  # Each source has lengths of its own.
  text = np.concatenate(
    [
      rng.integers(1, 3 + (longest * (i + 1)) // len(sizes), m)
      for i, m in enumerate(sizes)
    ]
  )
  items = rng.integers(0, 3, n)
  needs = np.stack([text + items, text, 4 * items, items], axis=1)
  names = 'abcdefg'[: len(sizes)]
  shares = Shares.of(dict(zip(names, sizes)), dict(zip(names, weights)))
  return PackPlan(Lengths(NAMES, needs), BUDGET, seed, shares, rows)


def dealt(plan, start, stop):
  return [pair for r in range(start, stop) for pair in plan.dealt(r)]


weight = st.floats(0.05, 5).map(lambda x: round(x, 2))


@settings(max_examples=15, deadline=None)
@given(
  st.lists(st.tuples(st.integers(1, 70), weight), min_size=1, max_size=3),
  st.integers(0, 99),
)
def test_each_document_once_in_each_epoch_of_its_source(sources, seed):
  sizes, weights = zip(*sources)
  plan = plan_of(sizes, weights, seed)
  rows = plan._decks[0].num_rows * 3
  pairs = dealt(plan, 0, rows)
  assert len(set(pairs)) == len(pairs)
  times = collections.Counter(document for document, _ in pairs)
  # What came is epoch 0, 1, 2, ... of each document, and none is ahead of its source.
  for document, epoch in pairs:
    assert epoch < times[document]
  for i, end in enumerate(plan.shares.ends):
    counts = [times[d] for d in range(end - sizes[i], end)]
    assert max(counts) - min(counts) <= 1
  for r in range(rows):
    used = plan.lengths.needs[list(plan.row(r))].sum(axis=0)
    assert (used <= limits(NAMES, BUDGET)).all()


def shares_in(plan, documents):
  source = plan.shares.source(np.array(documents))
  return np.bincount(source, minlength=len(plan.shares.names)) / len(documents)


@pytest.mark.parametrize(
  'sizes,weights',
  [((4000, 900, 70), (0.7, 0.2, 0.1)), ((60, 5000), (1, 1)), ((3000, 2000), (1, 9))],
)
def test_shares_hold_in_every_1000_documents_and_in_the_long_run(sizes, weights):
  plan = plan_of(sizes, weights)
  want = np.array(weights) / sum(weights)
  rows = 4 * plan._decks[0].num_rows
  documents = [d for d, _ in dealt(plan, 0, rows)]
  for start in range(0, len(documents) - 1000, 37):
    got = shares_in(plan, documents[start : start + 1000])
    assert np.abs(got - want).max() <= 0.02
  assert plan.off_balance <= 0.02
  # Per window the counts are off by one document at most, ever.
  long = plan.before(10**6 * plan._decks[0].num_rows)
  total = sum(long.values())
  assert np.abs(np.array(list(long.values())) / total - want).max() < 1e-4
  assert all(len(set(plan.shares.source(np.array(plan.row(r))))) > 1 for r in range(9)
             if len(plan.row(r)) > 7)  # fmt: skip


def test_weights_change_at_their_step_and_no_document_loses_its_turn():
  rows = 8
  weights = (((0, 1.0), (11, 3.0), (40, 1.0)), ((0, 1.0), (40, 0.0)))
  plan = plan_of((700, 500), weights, rows=rows)
  for start, stop, want in ((0, 11, 0.5), (11, 40, 0.75), (40, 60, 1.0)):
    documents = [d for d, _ in dealt(plan, start * rows, stop * rows)]
    assert shares_in(plan, documents)[0] == pytest.approx(want, abs=0.02)
  pairs = dealt(plan, 0, 600 * rows)
  assert len(set(pairs)) == len(pairs)
  times = collections.Counter(d for d, _ in pairs)
  assert all(epoch < times[d] for d, epoch in pairs)
  counts = [times[d] for d in range(700)]
  # One window's part per change is how far alike documents are apart from others.
  assert min(counts) > 5 and max(counts) - min(counts) <= 3
  fresh = plan_of((700, 500), weights, rows=rows)
  assert fresh.dealt(50 * rows) == plan.dealt(50 * rows)


def test_counts_before_a_row_are_those_of_the_rows():
  plan = plan_of((300, 80), (((0, 1), (5, 4)), 2), rows=4)
  seen = np.zeros(2, int)
  for r in range(150):
    assert list(plan.before(r).values()) == seen.tolist()
    seen += np.bincount(plan.shares.source(np.array(plan.row(r))), minlength=2)


def test_shares_are_as_written():
  shares = Shares.of({'a': 5, 'b': 7}, {'a': 0.1, 'b': [[0, 0.2], [10, 0.1], [20, 0.1]]})
  half = Fraction(1, 2)
  assert shares.phases == ((0, (Fraction(1, 3), Fraction(2, 3))), (10, (half, half)))
  assert shares.ends == (5, 12)
  assert shares.source(np.array([0, 4, 5, 11])).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
  'bad', ['much', -1.0, (), ((5, 1.0),), ((0, 1.0), (0, 2.0)), ((0, 'x'),), None]
)
def test_weights_that_make_no_sense(bad):
  with pytest.raises(ValueError, match="weight .* of 'a'"):
    Shares.of({'a': 1}, {'a': bad})
  with pytest.raises(ValueError, match='all weights are 0 from step 3'):
    Shares.of({'a': 1}, {'a': ((0, 1), (3, 0))})


def test_a_source_of_which_nothing_fits_is_told():
  lengths = Lengths(NAMES, np.array([[9, 2, 0, 0], [99, 2, 0, 0]]))
  shares = Shares.of({'a': 1, 'b': 1}, {'a': 1, 'b': 1})
  with pytest.raises(ValueError, match="none of the 1 documents of 'b'"):
    PackPlan(lengths, BUDGET, 0, shares)


def fake(size, tokenizer='same'):
  index = Index(
    np.full(size, 4, np.int32), np.full(size, 2, np.int32),
    np.arange(size + 1, dtype=np.int64), np.zeros(size, np.uint8),
    np.full((size, 3), size, np.int32),
  )  # fmt: skip
  return types.SimpleNamespace(
    index=index, tokenizer=types.SimpleNamespace(hash=tokenizer * 3)
  )


def test_indexes_are_joined():
  made = Mixture({'a': fake(2), 'b': fake(3)}, {'a': 1, 'b': 1})
  assert made.index.item_offsets.tolist() == [0, 1, 2, 3, 4, 5]
  assert made.index.item_size[:, 0].tolist() == [2, 2, 3, 3, 3]
  assert len(made) == len(made.index) == 5
  for i in (-1, 5):
    with pytest.raises(IndexError, match='of 5'):
      made[i]


def test_mixtures_that_cannot_be():
  with pytest.raises(ValueError, match='no datasets'):
    Mixture({}, {})
  for name in ('', 'a/b', 'bad'):
    with pytest.raises(ValueError, match='is no name'):
      Mixture({name: fake(1)}, {name: 1})
  with pytest.raises(ValueError, match="'b' has tokenizer otherother.*prepare them"):
    Mixture({'a': fake(1), 'b': fake(1, 'other')}, {'a': 1, 'b': 1})


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
  folder = tmp_path_factory.mktemp('mixture')
  for name, size, length in (('long', 40, 30), ('short', 25, 5)):
    with Writer(folder / name, ByteTokenizer(), {'source': 'test'}) as writer:
      for i in range(size):
        text = f'{name[0]}{i:02}' + '.' * (i % length)
        writer.add('train', Document((Text(text, trained=True),)))
  return {name: folder / name for name in ('long', 'short')}


def test_sources_are_counted_and_documents_are_theirs(paths):
  data = Mixture({n: Dataset(p, 'train') for n, p in paths.items()},
                 {'long': 1.0, 'short': 2.0})  # fmt: skip
  made = Pipeline(
    data, budget=Budget(64, 64, {}), rows=4, rules={}, slots=lambda item: item.grid
  )
  assert 'long: 33.3% of the documents from step 0 on' in made.summary()
  it = made.iterate()
  total = collections.Counter()
  for step in range(30):
    loaded = next(it)
    stream = loaded.batch.stream
    counts = collections.Counter()
    for tokens, segments in zip(stream.tokens, stream.segment_ids):
      for segment in range(1, segments.max() + 1):
        here = tokens[segments == segment]
        name = {'l': 'long', 's': 'short'}[chr(here[0])]
        counts[f'{name}/documents'] += 1
        counts[f'{name}/tokens'] += len(here)
    for name in paths:
      for what in ('documents', 'tokens'):
        assert loaded.stats[f'{name}/{what}'] == counts[f'{name}/{what}']
    total.update(counts)
    # The place in the data is the step, and so are the counts.
    before = made.plan.before((step + 1) * 4)
    assert before == {name: total[f'{name}/documents'] for name in paths}
  it.close()
  assert json.loads(json.dumps(before)) == before
