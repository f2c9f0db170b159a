"""A batch in one piece of memory is the batch."""

import pickle

import jax
import numpy as np

from mmjax.batch import BankBudget, Budget
from mmjax.data.block import Layout

BUDGET = Budget(
  13, 5, {'image': BankBudget(7, 3, 12), 'audio': BankBudget(5, 0, 3, 'float32')}
)  # odd sizes, and an array of none


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert jax.tree.map(lambda x: (x.dtype, x.shape), a) == jax.tree.map(
    lambda x: (x.dtype, x.shape), b
  )


def test_a_shared_block_begins_as_padding():
  layout = pickle.loads(pickle.dumps(Layout(BUDGET, 3)))
  block = layout.shared()
  block.unlink_on_del()
  assert_equal(layout.batch(block), BUDGET.empty(3))
  empty = Layout(BUDGET, 0).shared()
  empty.unlink_on_del()
  assert_equal(Layout(BUDGET, 0).batch(empty), BUDGET.empty(0))


def test_arrays_lie_apart_and_aligned_and_are_views_of_the_block():
  layout = Layout(BUDGET, 2)
  size = sum(-(-x.nbytes // 64) * 64 for x in jax.tree.leaves(BUDGET.empty(2)))
  block = np.zeros(size + 64, np.uint8)
  block = block[-block.ctypes.data % 64 :][:size]
  leaves = jax.tree.leaves(layout.batch(block))
  for i, leaf in enumerate(leaves):
    assert type(leaf) is np.ndarray and leaf.flags.c_contiguous
    assert leaf.nbytes == 0 or leaf.ctypes.data % 64 == 0
    leaf.fill(i + 1)
  for i, leaf in enumerate(leaves):
    assert (leaf == i + 1).all()  # no array has written into another
  copy = layout.batch(block.copy())
  assert_equal(copy, layout.batch(block))
  block.fill(0)
  assert not any(leaf.any() for leaf in leaves) and copy.stream.tokens.all()
