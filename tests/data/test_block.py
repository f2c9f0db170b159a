"""A batch in one piece of memory is the batch; blocks in use aren't used again."""

import gc
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.batch import BankBudget, Budget
from mmjax.data.block import Layout, Ring

BUDGET = Budget(
  13, 5, {'image': BankBudget(7, 3, 12), 'audio': BankBudget(5, 0, 3, 'float32')}
)  # odd sizes, and an array of none


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert jax.tree.map(lambda x: (x.dtype, x.shape), a) == jax.tree.map(
    lambda x: (x.dtype, x.shape), b
  )


def test_arrays_lie_apart_and_aligned_and_are_views_of_the_block():
  layout = pickle.loads(pickle.dumps(Layout(BUDGET, 2)))
  size = sum(-(-x.nbytes // 64) * 64 for x in jax.tree.leaves(BUDGET.empty(2)))
  assert layout.size == size
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
  assert_equal(Layout(BUDGET, 0).batch(block), BUDGET.empty(0))


def ring(**options):
  """A ring, and two workers' views of it."""
  parent = Ring(**{'size': 5000, 'blocks': 2, 'workers': 2} | options)
  return parent, *(pickle.loads(pickle.dumps(parent)) for _ in range(2))


def test_workers_take_their_own_blocks_and_the_parent_sees_what_they_wrote():
  parent, *workers = ring()
  taken = {}
  for step in (7, 8, 9, 10):
    number, block = workers[step % 2].take(step)
    assert block.shape == (5000,) and block.ctypes.data % 64 == 0
    block.fill(step)
    taken[number] = step
  assert len(taken) == 4 and all(n % 2 == step % 2 for n, step in taken.items())
  for number, step in taken.items():
    assert (parent.lend(number) == step).all()  # nobody wrote into another's


def test_a_block_is_taken_again_only_when_the_last_view_is_gone():
  parent, worker, _ = ring(blocks=1, size=Layout(BUDGET, 2).size)
  number, _ = worker.take(0)
  assert worker.take(0) is None
  batch = Layout(BUDGET, 2).batch(parent.lend(number))
  assert worker.take(2) is None
  kept = batch.bank['image'].values[1, 2:].T  # a view of a view
  del batch
  gc.collect()
  assert worker.take(4) is None
  kept[:] = 3
  del kept
  gc.collect()
  again, block = worker.take(6)
  assert again == number and 3 in block  # it comes as it was left
  assert worker.take(8) is None


@pytest.mark.parametrize('place', [jax.device_put, jnp.asarray])
def test_jax_arrays_of_a_block_never_change(place):
  """On a CPU they may be the memory itself, and a transfer may be under way."""
  parent, worker, _ = ring(size=2**16)
  for step in range(0, 40, 2):
    number, block = worker.take(step)
    block.fill(step)
    lent = parent.lend(number)
    array = place(lent.view(np.int32).reshape(128, 128))
    del lent
    for later in range(2):
      if (found := worker.take(later * 2)) is not None:
        found[1].fill(255)  # whoever gets it now may
        parent.lend(found[0])
    assert (np.asarray(array).view(np.uint8) == step).all()
    del array
    gc.collect()


def test_nothing_is_left_behind():
  def files():
    links = (f'/proc/self/fd/{name}' for name in os.listdir('/proc/self/fd'))
    return [p for p in links if os.path.lexists(p) and 'mmjax' in os.readlink(p)]

  def mapped():
    with open('/proc/self/maps') as maps:
      return sum('memfd:mmjax' in line for line in maps)

  gc.collect()
  before = len(files()), mapped()
  parent, worker, _ = ring()
  number, _ = worker.take(0)
  lent = parent.lend(number)
  assert (len(files()), mapped()) > before
  del parent, worker, _
  gc.collect()
  lent[:] = 1  # it is still there
  del lent
  gc.collect()
  assert (len(files()), mapped()) == before


def test_without_such_memory_there_is_no_block(tmp_path, monkeypatch):
  parent, worker, other = ring()
  assert worker.take(0)
  monkeypatch.setattr(other, '_path', '/proc/self/no')
  assert other.take(0) is None
  (tmp_path / 'file').write_bytes(bytes(2**16))  # of someone else
  for path in (f'{tmp_path}/file', str(tmp_path)):
    another = pickle.loads(pickle.dumps(parent))
    monkeypatch.setattr(another, '_path', path)
    assert another.take(0) is None
  assert not any((tmp_path / 'file').read_bytes())
  monkeypatch.delattr(os, 'memfd_create')
  assert all(one.take(0) is None for one in ring())
