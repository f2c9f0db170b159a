import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmjax.batch import FOREVER, BankBudget, Budget, KeyTags, QueryTags, visible

TAG = st.integers(-2, 4)


@given(
  st.lists(st.tuples(TAG, TAG, TAG, TAG), min_size=1, max_size=6),
  st.lists(st.tuples(TAG, TAG, TAG), min_size=1, max_size=6),
)
def test_visible_is_the_rule_of_the_contract(queries, keys):
  q = np.array(queries, np.int32).T[:, None]
  k = np.array(keys, np.int32).T[:, None]
  seen = visible(QueryTags(*q), KeyTags(*k))
  forever = visible(QueryTags(*q[:3]), KeyTags(*k[:2]))
  for t, (segment, first, last, rank) in enumerate(queries):
    for s, (key_segment, order, until) in enumerate(keys):
      sees = segment == key_segment and first <= order <= last
      assert forever[0, t, s] == sees
      assert seen[0, t, s] == (sees and rank <= until)


def test_keys_that_end_need_queries_with_an_order():
  one = np.ones((1, 2), np.int32)
  with pytest.raises(ValueError, match="need the queries' `order`"):
    visible(QueryTags(one, one, one), KeyTags(one, one, one))


def test_patterns_of_the_design():
  def mask(order, first, last):
    one = np.ones((1, len(order)), np.int32)
    q = QueryTags(one, np.array([first], np.int32), np.array([last], np.int32))
    return visible(q, KeyTags(one, np.array([order], np.int32)))[0].astype(int)

  causal = mask([0, 1, 2], [0, 0, 0], [0, 1, 2])
  np.testing.assert_array_equal(causal, np.tril(np.ones((3, 3), int)))
  # text, an image of two slots, text: the image sees itself, not what follows
  image = mask([0, 1, 1, 2], [0, 0, 0, 0], [0, 1, 1, 2])
  np.testing.assert_array_equal(
    image, [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
  )
  window = mask([0, 1, 2, 3], [-1, 0, 1, 2], [0, 1, 2, 3])  # w = 1
  np.testing.assert_array_equal(window, np.tril(np.triu(np.ones((4, 4), int), -1)))
  # the picture in the docstring: both questions see the image, not each other
  rank = np.array([[0, 0, 0, 1, 2, 3, 4]], np.int32)
  until = np.array([[FOREVER] * 3 + [2, 2, 4, 4]], np.int32)
  one = np.ones_like(rank)
  branches = visible(QueryTags(one, 0 * rank, rank, rank), KeyTags(one, rank, until))
  want = np.zeros((7, 7), int)
  want[:, :3] = 1
  want[3:5, 3:5] = want[5:, 5:] = np.tril(np.ones((2, 2), int))
  np.testing.assert_array_equal(branches[0], want)


def test_padding_sees_nothing_and_is_a_pytree_of_static_shape():
  budget = Budget(8, 4, {'image': BankBudget(patches=6, items=2, channels=12)})
  batch = budget.empty(rows=3)
  assert not visible(batch.stream.query_tags, batch.stream.key_tags).any()
  leaves = jax.tree.leaves(batch)
  assert len(leaves) == 9 + 5
  assert all(leaf.shape[0] == 3 for leaf in leaves)
  again = jax.tree.map(lambda x: x, batch)
  assert again.bank['image'].values.shape == (3, 6, 12)
  assert again.bank['image'].values.dtype == np.uint8
