import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmjax.batch import BankBudget, Budget, KeyTags, QueryTags, visible

TAG = st.integers(-2, 4)


@given(
  st.lists(st.tuples(TAG, TAG, TAG), min_size=1, max_size=6),
  st.lists(st.tuples(TAG, TAG), min_size=1, max_size=6),
)
def test_visible_is_the_rule_of_the_contract(queries, keys):
  q = np.array(queries, np.int32).T[:, None]
  k = np.array(keys, np.int32).T[:, None]
  seen = visible(QueryTags(*q), KeyTags(*k))
  for t, (segment, first, last) in enumerate(queries):
    for s, (key_segment, order) in enumerate(keys):
      assert seen[0, t, s] == (segment == key_segment and first <= order <= last)


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


def test_padding_sees_nothing_and_is_a_pytree_of_static_shape():
  budget = Budget(8, 4, {'image': BankBudget(patches=6, items=2, channels=12)})
  batch = budget.empty(rows=3)
  assert not visible(batch.stream.query_tags, batch.stream.key_tags).any()
  leaves = jax.tree.leaves(batch)
  assert len(leaves) == 8 + 5
  assert all(leaf.shape[0] == 3 for leaf in leaves)
  again = jax.tree.map(lambda x: x, batch)
  assert again.bank['image'].values.shape == (3, 6, 12)
  assert again.bank['image'].values.dtype == np.uint8
