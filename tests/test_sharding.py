import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mmjax import sharding


class Layer(nn.Module):
  axes: tuple = ('embed', 'mlp')

  @nn.compact
  def __call__(self, x, _=None):
    D = x.shape[-1]
    up = sharding.param(self, 'up', nn.initializers.lecun_normal(), (D, 64), self.axes)
    gate = sharding.param(self, 'gate', nn.initializers.ones, (), ())
    down = sharding.param(
      self, 'down', nn.initializers.lecun_normal(), (64, D), ('mlp', 'embed')
    )
    h = sharding.constrain(jnp.tanh(x @ up), 'batch', 'seq', 'act_mlp')
    return x + gate * (h @ down), None


class Stack(nn.Module):
  axes: tuple = ('embed', 'mlp')

  @nn.compact
  def __call__(self, x):
    layers = nn.scan(
      Layer,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=3,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    return layers(self.axes, name='layers')(x, None)[0]


X = jnp.linspace(-1, 1, 8 * 4 * 32).reshape(8, 4, 32)


def _init(axes=('embed', 'mlp')):
  model = Stack(axes)
  key = jax.random.key(0)
  return (
    model,
    jax.eval_shape(model.init, key, X),
    sharding.axis_names(model.init, key, X),
  )


def test_names_stay_off_the_tree_and_scan_adds_its_own():
  model, abstract, names = _init()
  assert names['params']['layers'] == {
    'up': P('layers', 'embed', 'mlp'),
    'gate': P('layers'),
    'down': P('layers', 'mlp', 'embed'),
  }
  params = model.init(jax.random.key(0), X)
  assert all(type(leaf) is type(X) for leaf in jax.tree.leaves(params))
  assert jax.tree.structure(params) == jax.tree.structure(abstract)


def test_sharded_equals_one_device_and_constraints_are_in_the_program():
  model, abstract, names = _init()
  mesh = sharding.make_mesh({'fsdp': 4, 'tensor': 2})
  rules = sharding.rules_for('fsdp+tensor')
  specs = sharding.shardings(names, abstract, mesh, rules)
  plain = model.init(jax.random.key(0), X)

  def loss(params, x):
    return jnp.sum(model.apply(params, x) ** 2)

  want = jax.grad(loss)(plain, X)
  with sharding.use(mesh, rules):
    params = jax.jit(model.init, out_shardings=specs)(jax.random.key(0), X)
    up = params['params']['layers']['up']
    assert up.sharding.shard_shape(up.shape) == (3, 8, 32)
    step = jax.jit(jax.grad(loss), out_shardings=specs)
    lowered = step.lower(params, X).as_text()
    got = step(params, X)
  assert 'sharding_constraint' in lowered

  def off(a, b):
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b))

  assert max(jax.tree.leaves(jax.tree.map(off, got, want))) < 1e-6


def test_constrain_is_nothing_outside_and_checked_inside():
  assert sharding.constrain(X, 'no such name') is X
  with sharding.use(sharding.make_mesh({'data': 8}), sharding.rules_for('dp')):
    with pytest.raises(
      ValueError, match="no sharding rule for axis 'act_mpl'.*'act_mlp'"
    ):
      sharding.constrain(X, 'batch', 'seq', 'act_mpl')
    with pytest.raises(ValueError, match="'batch' of size 3 does not divide"):
      sharding.constrain(X[:3], 'batch', None, None)
    with pytest.raises(ValueError, match='do not name shape'):
      sharding.constrain(X, 'batch')


@pytest.mark.parametrize(
  'axes, overrides, message',
  [
    (('embed', 'mpl'), {}, "params/layers/up: no sharding rule for axis 'mpl'; did you"),
    (('embed', 'mlp'), {'mlp': 'fsdp'}, 'params/layers/down: .*use a mesh axis twice'),
    (('embed', 'mlp'), {'layers': 'tensor', 'mlp': None}, "'layers' of size 3 does not"),
  ],
)
def test_wrong_layouts_name_the_parameter(axes, overrides, message):
  _, abstract, names = _init(axes)
  mesh = sharding.make_mesh({'fsdp': 4, 'tensor': 2})
  with pytest.raises(ValueError, match=message) as error:
    sharding.shardings(
      names, abstract, mesh, sharding.rules_for('fsdp+tensor', overrides)
    )
  assert '\n' not in str(error.value)


def test_wrong_number_of_names_and_unnamed_parameters():
  with pytest.raises(ValueError, match=r"up: axes \('embed',\) do not name shape"):
    _init(('embed',))
  dense = nn.Dense(3)
  args = (jax.random.key(0), X)
  names = sharding.axis_names(dense.init, *args)
  abstract = jax.eval_shape(dense.init, *args)
  mesh = sharding.make_mesh({'data': 8})
  with pytest.raises(ValueError, match='params/bias: names .* do not name shape'):
    sharding.shardings(names, abstract, mesh, sharding.rules_for('dp'))


@pytest.mark.parametrize(
  'sizes, message',
  [
    ({'dta': 8}, "unknown mesh axis 'dta'; did you mean 'data'"),
    ({'data': -1, 'fsdp': -1}, 'only one can be filled'),
    ({'fsdp': 3}, r'needs 3 devices, there are 8; sizes that divide: \[1, 2, 4, 8\]'),
    ({'data': -1, 'fsdp': 5}, 'sizes that divide'),
    ({'data': 0}, 'must be positive'),
  ],
)
def test_bad_meshes(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(sizes)


def test_mesh_fills_one_axis():
  shape = dict(sharding.make_mesh({'data': -1, 'tensor': 2}).shape)
  assert shape == {
    'slice': 1, 'data': 4, 'fsdp': 1, 'tensor': 2, 'context': 1, 'expert': 1,
  }  # fmt: skip


def test_bad_rules():
  with pytest.raises(
    ValueError, match="unknown sharding preset 'fdsp'; did you mean 'fsdp'"
  ):
    sharding.rules_for('fdsp')
  with pytest.raises(ValueError, match="unknown axis 'embd'; did you mean 'embed'"):
    sharding.rules_for('fsdp', {'embd': None})
  with pytest.raises(ValueError, match="names mesh axis 'tensr'; did you mean 'tensor'"):
    sharding.rules_for('fsdp', {'mlp': 'tensr'})


def test_replicated_parameters_are_refused():
  _, abstract, names = _init()
  mesh = sharding.make_mesh({'fsdp': 8})
  split = sharding.shardings(names, abstract, mesh, sharding.rules_for('fsdp'))
  sharding.refuse_replicated(abstract, split, 0.02)  # only the gate is whole
  whole = sharding.shardings(names, abstract, mesh, sharding.rules_for('dp'))
  with pytest.raises(ValueError, match='100% of parameter bytes are replicated.*up'):
    sharding.refuse_replicated(abstract, whole, 0.02)


def test_table_counts_bytes_per_device():
  _, abstract, names = _init()
  mesh = sharding.make_mesh({'fsdp': 4, 'tensor': 2})
  specs = sharding.shardings(names, abstract, mesh, sharding.rules_for('fsdp+tensor'))
  text = sharding.table(abstract, specs)
  assert 'params/layers/up' in text
  total = 3 * (2 * 32 * 64 // 8 + 1) * 4
  assert text.splitlines()[-1].split() == ['total', f'{total:,}']


def test_batch_is_split_by_rows():
  mesh = sharding.make_mesh({'data': 4, 'fsdp': 2})
  rules = sharding.rules_for('fsdp')
  local = {'tokens': np.arange(16, dtype=np.int32).reshape(8, 2)}
  placed = sharding.place_batch(local, 8, mesh, rules)
  assert placed['tokens'].sharding.shard_shape((8, 2)) == (1, 2)
  np.testing.assert_array_equal(placed['tokens'], local['tokens'])
  with pytest.raises(ValueError, match="batch.*'batch' of size 6 does not divide"):
    sharding.place_batch({'tokens': local['tokens'][:6]}, 6, mesh, rules)


Device = collections.namedtuple('Device', 'id process_index')


@pytest.mark.parametrize(
  ('held', 'want'),
  [
    ([[(0, 4)], [(4, 8)]], [(0, 2), (1, 2)]),
    ([[(0, 2), (4, 6)], [(2, 4), (6, 8)]], [(0, 2), (1, 2)]),
    ([[(0, 8)], [(0, 8)]], [(0, 1), (0, 1)]),
    ([[(0, 4)], [(4, 8)], [(0, 4)], [(4, 8)]], [(0, 2), (1, 2), (0, 2), (1, 2)]),
    ([[(0, 2), (2, 4)], [(2, 4), (4, 6)], [(6, 8), (0, 2)]], None),
    ([[(0, 2)], [(2, 4), (4, 6)]], None),
  ],
)
def test_processes_load_the_rows_that_they_hold(monkeypatch, held, want):
  class Where:
    def __init__(self, mesh, spec):
      self.spec = spec

    def devices_indices_map(self, shape):
      parts = [(p, part) for p, parts in enumerate(held) for part in parts]
      return {Device(i, p): (slice(*part),) for i, (p, part) in enumerate(parts)}

  mesh, rules = sharding.make_mesh({'data': 8}), sharding.rules_for('dp')
  monkeypatch.setattr(sharding, 'NamedSharding', Where)
  got = []
  for i in range(len(held)):
    monkeypatch.setattr('jax.process_index', lambda i=i: i)
    if want is None:
      with pytest.raises(ValueError, match='processes hold overlapping rows'):
        sharding.row_block(8, mesh, rules)
    else:
      got.append(sharding.row_block(8, mesh, rules))
  assert want is None or got == want


def test_outside_of_use_nothing_is_constrained():
  mesh, rules = sharding.make_mesh({'data': 8}), sharding.rules_for('dp')
  odd = jnp.zeros((3, 2))
  with sharding.use(mesh, rules):
    with sharding.outside():
      assert sharding.constrain(odd, 'batch', None) is odd
      assert sharding.parts('batch') == 1
    with pytest.raises(ValueError, match="'batch' of size 3 does not divide"):
      sharding.constrain(odd, 'batch', None)
