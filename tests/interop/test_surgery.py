"""What fitting parameters must leave as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import models
from mmjax.batch import BankBudget, Budget
from mmjax.interop import surgery

RNG = np.random.default_rng(0)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_old_words_keep_their_logits_and_new_ones_are_average(dtype):
  table = RNG.normal(size=(50, 16)).astype(dtype)
  hidden = RNG.normal(size=(7, 16)).astype(dtype)
  grown = surgery.grow_vocabulary(table, 64, seed=3)
  assert grown.dtype == dtype and grown.shape == (64, 16)
  np.testing.assert_array_equal(hidden @ grown[:50].T, hidden @ table.T)
  assert len(np.unique(grown, axis=0)) == 64  # no two alike
  old, new = (np.asarray(x, 'f4') for x in (table, grown[50:]))
  assert np.abs(new - old.mean(0)).max() < 0.1 * old.std()
  # A new word is no likelier than e^mean(logits), so it takes little from the others.
  scores = np.asarray(hidden, 'f4') @ old.T
  fresh = np.asarray(hidden, 'f4') @ new.T
  assert (fresh - scores.mean(1, keepdims=True)).max() < 0.5
  assert (fresh < np.log(np.exp(scores).sum(1, keepdims=True))).all()


def test_growing_is_repeatable_and_on_any_axis():
  table = RNG.normal(size=(5, 3)).astype('f4')
  grow = surgery.grow_vocabulary
  np.testing.assert_array_equal(grow(table, 8), grow(table, 8))
  assert (grow(table, 8) != grow(table, 8, seed=1)).any()
  np.testing.assert_array_equal(grow(table.T, 8, axis=1), grow(table, 8).T)
  np.testing.assert_array_equal(grow(table, 5), table)
  assert grow(table[:, 0], 7).shape == (7,)
  with pytest.raises(ValueError, match='a vocabulary of 5 does not shrink to 4'):
    grow(table, 4)


def test_padded():
  assert [surgery.padded(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]


def test_the_same_grid_is_the_same_table():
  table = RNG.normal(size=(1 + 3 * 5, 4)).astype('f4')
  np.testing.assert_array_equal(surgery.resize_positions(table, (3, 5), (3, 5)), table)
  flat = np.full((1 + 3 * 5, 4), 0.7, 'f4')
  flat[0] = 9  # the class token's
  got = surgery.resize_positions(flat, (3, 5), (9, 2))
  assert got.shape == (19, 4) and (got[0] == 9).all()
  np.testing.assert_allclose(got[1:], 0.7, rtol=1e-6)
  ramp = np.arange(8.0, dtype='f4').repeat(2)[:, None]
  # Twice the rows: in the middle a ramp of half the slope.
  doubled = surgery.resize_positions(ramp, (8, 2), (16, 2))[::2, 0]
  np.testing.assert_allclose(np.diff(doubled)[1:-1], 0.5, rtol=1e-5)
  with pytest.raises(ValueError, match=r'a table of 16 positions has no grid \(9, 2\)'):
    surgery.resize_positions(ramp, (9, 2), (3, 3))


def test_an_encoder_with_the_resized_table_gives_what_it_gave():
  """For pictures of the new grid, which read the old table between its entries."""
  model = models.build(
    'vit',
    channels=3,
    embed_dim=8,
    num_layers=1,
    num_heads=2,
    mlp_dim=8,
    position_grid=[4, 4],
  )
  bank = Budget(1, 1, {'image': BankBudget(6, 1, 3)}).empty(1).bank['image']
  bank.values[:] = RNG.integers(0, 256, bank.values.shape)
  bank.items[:] = bank.item_segments[:] = 1
  bank.positions[0, :, 1:] = np.indices((3, 2)).reshape(2, -1).T
  made = jax.eval_shape(model.init, jax.random.key(0), bank)['params']
  params = jax.tree.map(lambda x: RNG.normal(size=x.shape).astype('f4'), made)
  table = surgery.resize_positions(params['position'], (4, 4), (3, 2))
  other = model.clone(position_grid=(3, 2))
  want = jax.jit(model.apply)({'params': params}, bank).values
  got = jax.jit(other.apply)({'params': {**params, 'position': table}}, bank).values
  assert np.abs(want).max() > 0.1
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_positions_are_cut_not_grown():
  table = RNG.normal(size=(6, 2))
  np.testing.assert_array_equal(surgery.cut_positions(table, 4), table[:4])
  with pytest.raises(ValueError, match='a table of 6 positions does not grow to 7'):
    surgery.cut_positions(table, 7)


def test_stitch_puts_parts_in():
  tree = {'lm': {'a': np.zeros(2), 'b': {'c': np.zeros(3)}}, 'vision': {'d': np.zeros(1)}}
  part = {'a': jnp.ones(2), 'b': {'c': jnp.ones(3)}}
  got = surgery.stitch(tree, {'lm': part, 'vision/d': jnp.ones(1)})
  assert jax.tree.structure(got) == jax.tree.structure(tree)
  assert all((x == 1).all() for x in jax.tree.leaves(got))
  assert not tree['lm']['a'].any()  # the old tree is as it was
  for parts, message in (
    ({'visoin': part}, r"no parameters at 'visoin'; did you mean 'vision'\? \(choices: "),
    ({'lm': {'a': np.ones(2)}}, r'lm/b/c is absent in the part, \[3\] here'),
    ({'lm': {**part, 'e': np.ones(1)}}, r'lm/e is \[1\] in the part, absent here'),
    ({'lm/a': np.ones(5)}, r'lm/a is \[5\] in the part, \[2\] here'),
  ):
    with pytest.raises(ValueError, match=message):
      surgery.stitch(tree, parts)
