"""Plans: every document once an epoch, open at any row, the same on every host."""

import hashlib
import pickle
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.batch import BankBudget, Budget
from mmjax.data.document import BadDocument
from mmjax.data.media import ImageRule
from mmjax.data.plan import Lengths, PackPlan, limits
from mmjax.data.shuffle import hashed

BUDGET = Budget(64, 20, {'image': BankBudget(24, 5, 12)})
NAMES = ('stream', 'targets', 'image/patches', 'image/items')


def lengths_of(*needs, refused=None):
  return Lengths(NAMES, np.array(needs, np.int64).reshape(-1, 4), refused or {})


def random_lengths(seed, n):
  rng = np.random.default_rng(seed)
  items = rng.integers(0, 3, n)
  patches = items * rng.integers(1, 8, n)
  targets = rng.integers(1, 8, n)
  return lengths_of(
    *np.stack([patches + targets + rng.integers(0, 9, n), targets, patches, items], 1)
  )


def epoch_of(plan, epoch):
  return [plan.row(epoch * plan.num_rows + r) for r in range(plan.num_rows)]


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 80), st.integers(0, 5))
def test_every_document_exactly_once_per_epoch_within_all_budgets(seed, n, epoch):
  lengths = random_lengths(seed, n)
  plan = PackPlan(lengths, BUDGET, seed)
  rows = epoch_of(plan, epoch)
  assert sorted(d for row in rows for d in row) == list(range(n))
  for row in rows:
    needs = lengths.needs[list(row)].sum(axis=0)
    assert (needs <= limits(NAMES, BUDGET)).all()


def test_any_row_opens_at_once_in_any_order():
  plan = PackPlan(random_lengths(0, 50), BUDGET, seed=3)
  forward = [plan.row(r) for r in range(5 * plan.num_rows)]
  again = PackPlan(random_lengths(0, 50), BUDGET, seed=3)
  order = np.random.default_rng(0).permutation(len(forward))
  assert all(again.row(r) == forward[r] for r in order.tolist())
  sent = pickle.loads(pickle.dumps(plan))
  assert [sent.row(r) for r in range(len(forward))] == forward
  assert len(again._windows) <= 2


def test_epochs_deal_other_companions_and_another_order():
  lengths = random_lengths(1, 4000)
  plan = PackPlan(lengths, BUDGET)
  first, second = epoch_of(plan, 0), epoch_of(plan, 1)

  def pairs(rows):
    return {tuple(sorted(p)) for row in rows for p in zip(row, row[1:])}

  one, two = pairs(first), pairs(second)
  assert len(one & two) < 0.05 * len(one)
  assert [sorted(row) for row in first] != [sorted(row) for row in second]


def test_seeds_differ_and_leave_the_number_of_rows():
  plans = [PackPlan(random_lengths(2, 100), BUDGET, seed) for seed in (0, 1)]
  assert plans[0].num_rows == plans[1].num_rows
  assert epoch_of(plans[0], 0) != epoch_of(plans[1], 0)


def test_place_in_a_row_tells_nothing_about_length():
  lengths = random_lengths(3, 2000)
  plan = PackPlan(lengths, BUDGET)
  rows = [lengths.needs[list(row), 0] for row in epoch_of(plan, 0) if len(row) > 1]
  longest_first = np.mean([needs[0] == needs.max() for needs in rows])
  # By chance, one over the number of those that share the greatest length.
  chance = np.mean([(needs == needs.max()).mean() for needs in rows])
  assert abs(longest_first - chance) < 0.06


def test_rows_mean_the_same_forever():
  """A run that is resumed with a newer version must find its rows again."""
  plan = PackPlan(random_lengths(4, 300), BUDGET, seed=7)
  text = repr([plan.row(r) for r in range(2 * plan.num_rows)])
  digest = hashlib.sha256(text.encode()).hexdigest()
  assert digest[:16] == 'd5029e8d8100131d'


def test_the_hash_is_splitmix64():
  """The first outputs of the generator seeded with 0, as published."""
  out, state = [], 0
  for _ in range(3):
    out.append(int(hashed(np.array([state]))[0]))
    state = (state + 0x9E3779B97F4A7C15) % 2**64
  assert out == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_fill_is_what_the_rows_really_hold():
  lengths = random_lengths(5, 200)
  plan = PackPlan(lengths, BUDGET)
  total = lengths.needs.sum(axis=0)
  assert plan.fill == {
    'stream': pytest.approx(total[0] / (plan.num_rows * 64)),
    'targets': pytest.approx(total[1] / (plan.num_rows * 20)),
    'image': pytest.approx(total[2] / (plan.num_rows * 24)),
  }


def test_documents_over_a_budget_are_dropped_and_counted():
  lengths = lengths_of(
    [10, 2, 4, 1],
    [65, 2, 4, 1],
    [64, 20, 24, 5],
    [50, 21, 4, 1],
    [50, 2, 25, 1],
    [99, 2, 25, 1],
    [50, 2, 4, 6],
    [9, 1, 0, 0],
    refused={'empty': np.array([7])},
  )
  plan = PackPlan(lengths, BUDGET)
  assert plan.dropped == {
    'empty': 1,
    'too_long_stream': 2,
    'too_many_targets': 1,
    'too_many_patches:image': 1,
    'too_many_items:image': 1,
  }
  assert plan.num_documents == 2
  assert sorted(d for row in epoch_of(plan, 0) for d in row) == [0, 2]


def test_nothing_usable_is_one_clear_line():
  lengths = lengths_of([70, 2, 4, 1], [90, 2, 30, 1])
  with pytest.raises(ValueError, match=r'none of 2 .*too_long_stream 2.*stream 90 of 64'):
    PackPlan(lengths, BUDGET)
  with pytest.raises(ValueError, match='none of 0 documents'):
    PackPlan(lengths_of(), BUDGET)


def test_rows_count_from_zero():
  with pytest.raises(ValueError, match='row -1'):
    PackPlan(random_lengths(0, 5), BUDGET).row(-1)


def test_a_kind_without_a_bank():
  with pytest.raises(ValueError, match="no bank for 'audio'; banks: image"):
    limits(('audio/patches',), BUDGET)


def index_of(text, targets, items):
  """items: per document a list of (kind code, frames, height, width)."""
  flat = [item for one in items for item in one]
  return types.SimpleNamespace(
    text_tokens=np.array(text, np.int32),
    targets=np.array(targets, np.int32),
    item_offsets=np.cumsum([0, *map(len, items)]),
    item_kind=np.array([i[0] for i in flat], np.uint8),
    item_size=np.array([i[1:] for i in flat], np.int32).reshape(-1, 3),
  )


class Refusing:
  """A rule that takes no item lower than two pixels."""

  max_pixels = 10_000

  def grid(self, height, width):
    if height < 2:
      raise BadDocument('too_flat')
    return (1, height, width)


def test_lengths_against_a_plain_count():
  rng = np.random.default_rng(0)
  rule = ImageRule(2, 'native', max_patches=12)
  items = [
    [(0, 1, *rng.integers(1, 20, 2)) for _ in range(rng.integers(0, 4))]
    for _ in range(50)
  ]
  text, targets = rng.integers(1, 9, 50), rng.integers(1, 5, 50)
  # A model that takes one slot per two patches and a closing one.
  lengths = Lengths.of(
    index_of(text, targets, items),
    {'image': rule},
    lambda item: (1, 1, item.grid[1] * item.grid[2] // 2 + 1),
  )
  assert lengths.names == NAMES
  for n in range(50):
    patches = [np.prod(rule.grid(*item[2:])) for item in items[n]]
    slots = sum(p // 2 + 1 for p in patches)
    want = [text[n] + slots, targets[n], sum(patches), len(items[n])]
    assert lengths.needs[n].tolist() == want
  assert lengths.refused == {}


@pytest.mark.parametrize('most', [20, 2**31 - 1])  # the second fit no single number
def test_lengths_are_the_same_in_chunks(monkeypatch, most):
  rng = np.random.default_rng(1)
  items = [
    [(0, *rng.integers(1, most, 3)) for _ in range(rng.integers(0, 4))] for _ in range(30)
  ]
  index = index_of(rng.integers(0, 3, 30), rng.integers(0, 3, 30), items)
  rules = {'image': Refusing()}
  whole = Lengths.of(index, rules, lambda item: item.grid)
  monkeypatch.setattr('mmjax.data.plan._CHUNK', 7)
  cut = Lengths.of(index, rules, lambda item: item.grid)
  assert (whole.needs == cut.needs).all() and whole.largest_item == cut.largest_item
  assert whole.refused.keys() == cut.refused.keys()
  for reason, documents in whole.refused.items():
    assert documents.tolist() == cut.refused[reason].tolist()


def test_what_no_budget_helps_is_refused():
  index = index_of(
    [5, 5, 0, 5, 5, 5],
    [1, 1, 0, 0, 1, 1],
    [[], [(1, 9, 1, 1)], [], [], [(0, 1, 1, 4), (0, 1, 3, 3)], [(0, 1, 200, 200)]],
  )
  lengths = Lengths.of(index, {'image': Refusing()}, lambda item: item.grid)
  refused = {reason: documents.tolist() for reason, documents in lengths.refused.items()}
  assert refused == {
    'unsupported_audio': [1],
    'empty': [2],
    'nothing_trained': [3],
    'too_flat': [4],
    'too_many_pixels': [5],
  }


def test_kinds_other_than_images_are_asked_for_time_too():
  class Rule:
    def grid(self, frames, height, width):
      return (frames, height, width)

  lengths = Lengths.of(
    index_of([2], [1], [[(2, 3, 2, 2)]]), {'video': Rule()}, lambda item: item.grid
  )
  assert lengths.names == ('stream', 'targets', 'video/patches', 'video/items')
  assert lengths.needs.tolist() == [[14, 1, 12, 1]]
