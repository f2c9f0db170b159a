"""Where the parts of a training state lie."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from mmjax import sharding
from mmjax.train import optim, state


@pytest.mark.parametrize('name', sorted(optim.OPTIMIZERS))
@pytest.mark.parametrize('freeze', [[], ['b/*']])
def test_what_the_optimizer_keeps_of_a_parameter_lies_where_that_does(name, freeze):
  mesh = sharding.make_mesh({'fsdp': 4, 'tensor': 2})
  rules = sharding.rules_for('fsdp+tensor')
  names = {'a': P('embed', 'mlp'), 'b': {'a': P('layers', 'embed', 'mlp')}}
  shapes = {'a': (8, 4), 'b': {'a': (2, 4, 8)}}
  shapes = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  made = optim.build(
    shapes, names, name=name, learning_rate=0.1, steps=9, freeze=freeze, ema=0.9
  )
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  abstract = jax.eval_shape(lambda: state.create(zeros, made))
  placed = sharding.shardings(names, shapes, mesh, rules)
  got = state.shardings(abstract, placed, made, mesh)
  spec = {(8, 4): placed['a'], (2, 4, 8): placed['b']['a']}
  assert len({s.spec for s in spec.values()}) == 2
  kept = []
  for leaf, where in zip(
    jax.tree.leaves(abstract.opt_state), jax.tree.leaves(got.opt_state), strict=True
  ):
    if leaf.shape in spec:
      kept.append(leaf.shape)
      assert where == spec[leaf.shape]
    else:
      assert where.spec == P()
  if name in ('adamw', 'lion', 'muon', 'sgd'):
    assert set(kept) == {(8, 4)} if freeze else set(spec)
