"""Every slice of ours is that of the whole, and goes back bit by bit."""

import itertools

import numpy as np
import pytest

from mmjax.interop.families.vit import Patches, patch_size
from mmjax.interop.leaf import Leaf, join

LEAVES = [
  Leaf('w', 'W', '(N H) D -> D N H'),
  Leaf('w', 'W', 'D (N H) -> N H D'),
  Leaf('w', 'W', 'D (3 N H) -> D N H', 1),
  Leaf('w', 'W', '(3 N H) D -> D N H', 2),
  Leaf('w', 'W', '(3 N H) -> N H', 2),
  Leaf('w', 'W', '(N 3 H) D -> D N H', 1),
  Leaf('w', 'W', '(N 3 H) -> N H', 2),
  Leaf('w', 'W', '1 1 D -> D'),
  Leaf('w', 'W', '1 -> '),
  Leaf('w', 'W', 'F D -> D F'),
  Leaf('w', 'W', 'D -> D'),
]
SIZES = dict(N=2, H=3, D=4, F=5)


class Counted:
  """A tensor that counts what is read of it."""

  def __init__(self, x):
    self.x, self.read = x, 0

  def __getitem__(self, index):
    found = self.x[index]
    self.read += found.size
    return found


def whole(leaf):
  """(theirs, ours) by NumPy alone: split, pick the part, transpose."""
  letters = leaf.axes.split('->')[1].split()
  shape = tuple(SIZES[a] for a in letters)
  theirs = np.random.default_rng(0).normal(size=leaf.their_shape(shape))
  split, order = [], []
  for a in leaf.axes.split('->')[0].replace('(', ' ').replace(')', ' ').split():
    split.append(int(a) if a.isdigit() else SIZES[a])
    order.append(a)
  x = theirs.reshape(split)
  for number in [a for a in order if a.isdigit()]:
    x = np.take(x, leaf.part, order.index(number))
    order.remove(number)
  return theirs, x.transpose([order.index(a) for a in letters])


@pytest.mark.parametrize('leaf', LEAVES, ids=lambda leaf: leaf.axes)
def test_every_slice_is_that_of_the_whole(leaf):
  theirs, ours = whole(leaf)
  assert leaf.their_shape(ours.shape) == theirs.shape
  spans = [[(i, j) for i in range(n) for j in range(i + 1, n + 1)] for n in ours.shape]
  for pick in itertools.product(*spans):
    index = tuple(slice(*s) for s in pick)
    np.testing.assert_array_equal(leaf.take(theirs, ours.shape, index), ours[index])
  every = (slice(None),) * ours.ndim
  np.testing.assert_array_equal(leaf.take(theirs, ours.shape, every), ours)


def test_heads_of_a_fused_tensor_are_read_alone():
  leaf = Leaf('w', 'W', 'D (3 N H) -> D N H', 1)
  theirs, ours = whole(leaf)
  counted = Counted(theirs)
  index = (slice(1, 3), slice(1, 2), slice(None))
  np.testing.assert_array_equal(leaf.take(counted, ours.shape, index), ours[index])
  assert counted.read == ours[index].size


@pytest.mark.parametrize('axes', sorted({leaf.axes for leaf in LEAVES}))
def test_goes_back(axes):
  parts = 3 if '3' in axes else 1
  leaves = [Leaf(f'w{i}', 'W', axes, i) for i in range(parts)]
  theirs = whole(leaves[0])[0]
  arrays = {leaf.ours: whole(leaf)[1] for leaf in leaves}
  got = join(leaves[::-1], arrays)
  np.testing.assert_array_equal(got, theirs)
  assert got.flags.c_contiguous  # files hold the bytes as they lie


@pytest.mark.parametrize(
  ('axes', 'message'),
  [
    ('D F -> D H', 'w: .* has not the same axes on both sides'),
    ('D D -> D D', 'w: .* has not the same axes on both sides'),
  ],
)
def test_refuses(axes, message):
  with pytest.raises(ValueError, match=message):
    Leaf('w', 'W', axes)


def test_refuses_a_shape_of_other_axes():
  with pytest.raises(ValueError, match=r"w: shape \(2, 3\) does not fit '\(N H\) D"):
    LEAVES[0].their_shape((2, 3))


def test_patches_are_cut_by_a_convolution():
  """Every slice of the kernel of rows, columns and colours; back bit by bit."""
  leaf = Patches('w', 'W')
  theirs = np.random.default_rng(0).normal(size=(5, 3, 2, 2))
  ours = np.stack(
    [theirs[:, c, h, w] for h in range(2) for w in range(2) for c in range(3)]
  )
  assert leaf.their_shape(ours.shape) == theirs.shape
  for rows, columns in itertools.product(
    (slice(None), slice(3, 7), slice(11, 12)), (slice(None), slice(1, 3))
  ):
    counted = Counted(theirs)
    got = leaf.take(counted, ours.shape, (rows, columns))
    np.testing.assert_array_equal(got, ours[rows, columns])
    assert counted.read == 12 * ours[:, columns].shape[1]
  np.testing.assert_array_equal(join([leaf], {'w': ours}), theirs)
  assert [patch_size(n) for n in (3, 588, 768)] == [1, 14, 16]
  for channels in (6, 14, 80):
    with pytest.raises(ValueError, match=f'{channels} channels are no square patch'):
      patch_size(channels)


@pytest.mark.parametrize(('axes', 'shape'), [('->', ()), ('1 ->', (1,))])
def test_a_number_stays_one(axes, shape):
  leaf, x = Leaf('w', 'W', axes), np.full(shape, 2.5)
  assert leaf.their_shape(()) == shape
  got = leaf.take(x, (), ())
  assert got.shape == () and got == 2.5
  assert join([leaf], {'w': got}).shape == shape
