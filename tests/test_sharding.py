import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mmjax import sharding
from mmjax.batch import BankBudget, Budget


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
    ({'fsdp': 3}, r'mesh fsdp = 3 needs 3 devices, there are 8; fits: fsdp = 8$'),
    ({'fsdp': 4, 'tensor': 4}, 'needs 16 .* fits: fsdp = 2; or tensor = 2$'),
    (
      {'data': -1, 'fsdp': 5},
      'a multiple of 5 devices, .* fits: fsdp = 1 or 2 or 4 or 8',
    ),
    ({'data': 3, 'fsdp': 3}, 'needs 9 devices, .* fits: sizes whose product divides 8'),
    ({'slice': 2, 'data': -1, 'fsdp': 3}, 'multiple of 6 .* fits: fsdp = 1 or 2 or 4$'),
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


class Chip:
  """A device of so many slices of x by y chips, as `mesh_utils` looks at it."""

  device_kind, core_on_chip = 'a chip', 0

  def __init__(self, id, platform, slice_index=None, coords=None):
    self.id, self.platform, self.coords = id, platform, coords
    if slice_index is not None:
      self.slice_index = slice_index


def chips(platform, slices, x, y):
  # Not in order of slices: what JAX gives is in order of processes.
  return [
    Chip(x * y * s + y * i + j, platform, s, (i, j, 0))
    for i in range(x)
    for j in range(y)
    for s in reversed(range(slices))
  ]


def laid(sizes, devices):
  """The mesh axes over 1, and the ids of each slice of the mesh."""
  mesh = sharding.make_mesh(sizes, devices)
  assert mesh.axis_names == sharding.MESH_AXES
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
  ids = [[d.id for d in part.flat] for part in mesh.devices]
  return {a: n for a, n in mesh.shape.items() if n > 1}, ids


@pytest.mark.parametrize('platform', ['tpu', 'gpu'])
@pytest.mark.parametrize(
  'sizes, want',
  [
    ({}, {'slice': 3, 'data': 8}),
    ({'fsdp': -1, 'tensor': 2}, {'slice': 3, 'fsdp': 4, 'tensor': 2}),
    ({'slice': 3, 'fsdp': 8}, {'slice': 3, 'fsdp': 8}),
    ({'slice': -1, 'data': 4, 'fsdp': 2}, {'slice': 3, 'data': 4, 'fsdp': 2}),
  ],
)
def test_slices_are_outermost_and_need_not_be_named(platform, sizes, want):
  shape, ids = laid(sizes, chips(platform, 3, 4, 2))
  assert shape == want
  assert [sorted(part) for part in ids] == [
    list(range(8 * s, 8 * s + 8)) for s in range(3)
  ]


def test_gpus_of_several_nodes_may_be_one_axis():
  shape, ids = laid({'slice': 1, 'fsdp': -1}, chips('gpu', 2, 4, 1))
  assert shape == {'fsdp': 8} and ids == [list(range(8))]


def test_an_axis_may_take_a_part_of_a_physical_one():
  assert laid({'fsdp': 2, 'tensor': 8}, chips('tpu', 1, 4, 4))[0] == {
    'fsdp': 2, 'tensor': 8,
  }  # fmt: skip
  one = [Chip(i, 'tpu', None, (i, 0, 0)) for i in range(4)]  # some don't tell their slice
  assert laid({}, one)[0] == {'data': 4}


@pytest.mark.parametrize(
  'platform, slices, sizes, message',
  [
    ('tpu', 2, {'slice': 1, 'data': -1}, "'slice' is 1, but the number of slices is 2"),
    ('tpu', 1, {'slice': 2, 'data': -1}, "'slice' is 2, but the number of slices is 1"),
    ('tpu', 2, {'slice': -1, 'data': 2}, "'slice' is 4, but the number of slices is 2"),
    ('gpu', 4, {'slice': 2, 'data': -1}, "'slice' is 2, but the number of slices is 4"),
    ('gpu', 1, {'slice': 2, 'data': -1}, "'slice' is 2, but the number of slices is 1"),
    ('tpu', 2, {'data': 8}, r'mesh slice = 2, data = 8 needs 16 devices.*: data = 4$'),
  ],
)
def test_slices_that_are_not_there(platform, slices, sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(sizes, chips(platform, slices, 8 // slices, 1))


def test_slices_hold_equally_many():
  with pytest.raises(ValueError, match=r'slices of different sizes: \[2, 4\] devices'):
    sharding.make_mesh({}, [Chip(i, 'tpu', int(i > 3), (i % 4, 0, 0)) for i in range(6)])


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


def test_streams_and_banks_are_split_over_context_but_items_are_not():
  mesh = sharding.make_mesh({'fsdp': 2, 'context': 4})
  batch = Budget(16, 8, {'image': BankBudget(12, 3, 6)}).empty(4)
  batch.stream.tokens[:] = np.arange(16)[None]
  placed = sharding.place_batch(batch, 4, mesh, sharding.rules_for('dp'))
  np.testing.assert_array_equal(placed.stream.tokens, batch.stream.tokens)
  shapes = jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), placed)
  bank = shapes.bank['image']
  assert shapes.stream.positions == (2, 4, 3) and shapes.stream.weights == (2, 4)
  assert (bank.values, bank.items) == ((2, 3, 6), (2, 3))
  assert (bank.item_segments, bank.item_order) == ((2, 3), (2, 3))
  rules = sharding.whole_stream(sharding.rules_for('dp'))
  whole = sharding.batch_shardings(batch, mesh, rules)
  assert whole.stream.tokens.shard_shape((4, 16)) == (2, 16)
  batch = Budget(18, 8).empty(4)
  with pytest.raises(
    ValueError, match=r"batch.stream.*'seq' of size 18 does not.* = 4; 16 or 20 would"
  ):
    sharding.batch_shardings(batch, mesh, sharding.rules_for('dp'))


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
