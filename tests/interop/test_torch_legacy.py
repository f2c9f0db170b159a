"""Files are written here with Python's pickle, as torch.save does."""

import collections
import io
import pathlib
import pickle
import pickletools
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mmjax.interop import torch_legacy

TENSORS = {
  'a.weight': np.arange(12, dtype=np.float32).reshape(3, 4),
  'a.bias': np.array([1.5, -2], np.float16),
  'steps': np.array(7, np.int64),
  'mask': np.array([True, False]),
  'half': np.array([1, 2, 3], ml_dtypes.bfloat16),
  'none': np.zeros((0, 3), np.float32),
}
TYPES = {
  'float32': 'FloatStorage', 'float16': 'HalfStorage', 'int64': 'LongStorage',
  'bool': 'BoolStorage', 'bfloat16': 'BFloat16Storage',
}  # fmt: skip


class Named:
  """Pickled as a name, as functions and classes are."""

  def __init__(self, name):
    self.name = name


class Called:
  """Pickled as a call of a name."""

  def __init__(self, name, *args, key=None):
    self.name, self.args, self.key = Named(name), args, key


class Words(tuple):
  """Pickled as a persistent id."""


class Writer(pickle._Pickler):
  """The pickler in Python: it writes names that can't be imported here."""

  def persistent_id(self, obj):
    return tuple(obj) if isinstance(obj, Words) else None

  def save(self, obj, save_persistent_id=True):
    if isinstance(obj, Named):
      module, _, name = obj.name.rpartition('.')
      self.write(pickle.GLOBAL + f'{module}\n{name}\n'.encode())
    elif isinstance(obj, Called):
      self.save(obj.name)
      self.save(obj.args)
      self.write(pickle.REDUCE)
    else:
      super().save(obj, save_persistent_id)


def pickled(obj):
  """The pickle of what is no pickle yet."""
  if isinstance(obj, bytes):
    return obj
  file = io.BytesIO()
  Writer(file, 2).dump(obj)
  return file.getvalue()


def tensor(key, x, offset=0, shape=None, strides=None, count=None, kind=None):
  kind = Named(f'torch.{kind or TYPES[x.dtype.name]}')
  count = x.size if count is None else count
  shape = x.shape if shape is None else shape
  steps = tuple(s // x.itemsize for s in x.strides) if strides is None else strides
  return Called(
    'torch._utils._rebuild_tensor_v2',
    Words(('storage', kind, key, 'cpu', count, None)), offset, shape, steps,
    False, collections.OrderedDict(),
  )  # fmt: skip


def state(tensors=TENSORS):
  found = collections.OrderedDict(
    (name, tensor(str(i), x)) for i, (name, x) in enumerate(tensors.items())
  )
  found._metadata = collections.OrderedDict({'': {'version': 1}})
  return found


def legacy(path, found=None, numbers=TENSORS, magic=0x1950A86A20F9469CFC6C):
  numbers = {str(i): x for i, x in enumerate(numbers.values())}
  data = pickled(magic) + pickled(1001) + pickled({'little_endian': True})
  data += pickled(state() if found is None else found) + pickled(list(numbers))
  for x in numbers.values():
    data += struct.pack('<q', x.size) + x.tobytes()
  path.write_bytes(data)
  return path


def zipped(path, found=None, numbers=TENSORS, compress=zipfile.ZIP_STORED, **more):
  with zipfile.ZipFile(path, 'w', compress) as archive:
    archive.writestr('x/data.pkl', pickled(state() if found is None else found))
    for i, x in enumerate(numbers.values()):
      archive.writestr(f'x/data/{i}', x.tobytes())
    for name, data in more.items():
      archive.writestr(f'x/{name}', data)
  return path


WRITERS = {'legacy': legacy, 'zip': zipped}


@pytest.mark.parametrize('write', WRITERS.values(), ids=WRITERS)
def test_reads_what_was_written(tmp_path, write):
  got = torch_legacy.load(write(tmp_path / 'a.pth'))
  assert got.keys() == TENSORS.keys()
  for name, want in TENSORS.items():
    assert got[name].dtype == want.dtype and got[name].flags.writeable
    np.testing.assert_array_equal(got[name], want)


@pytest.mark.parametrize('write', WRITERS.values(), ids=WRITERS)
def test_views_and_parameters(tmp_path, write):
  x = TENSORS['a.weight']
  found = {
    'transposed': tensor('0', x, shape=(4, 3), strides=(1, 4), count=12),
    'part': tensor('0', x, offset=5, shape=(2,), strides=(4,), count=12),
    'parameter': Called('torch._utils._rebuild_parameter', tensor('0', x), True, {}),
  }
  got = torch_legacy.load(write(tmp_path / 'a.pth', found, {'x': x}))
  np.testing.assert_array_equal(got['transposed'], x.T)
  np.testing.assert_array_equal(got['part'], [5, 9])
  np.testing.assert_array_equal(got['parameter'], x)


def test_reads_files_of_torch(tmp_path):
  torch = pytest.importorskip('torch')
  values = {'w': torch.arange(6.0).reshape(2, 3), 'n': torch.tensor([3])}
  for new in (False, True):
    path = tmp_path / f'{new}.pth'
    torch.save(values, path, _use_new_zipfile_serialization=new)
    for name, x in torch_legacy.load(path).items():
      np.testing.assert_array_equal(x, values[name].numpy())


class Evil:
  """Leaves a file behind if anything runs it."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize('write', WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize('protocol', range(6))
def test_runs_nothing(tmp_path, write, protocol):
  trap = tmp_path / 'trap'
  data = pickle.dumps({'a': 1, 'b': Evil(trap)}, protocol)
  pickle.loads(data)
  assert trap.exists()  # it would have worked
  trap.unlink()
  path = write(tmp_path / 'a.pth', data)
  with pytest.raises(ValueError, match='refused: the pickle (names|has)') as caught:
    torch_legacy.load(path)
  assert not trap.exists() and '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'name',
  ['os.system', 'posix.system', 'builtins.eval', 'builtins.getattr', 'torch.load',
   'torch.hub.load', 'collections.Counter', 'numpy.core.multiarray._reconstruct',
   'torch.storage._load_from_bytes', 'torch._utils._rebuild_sparse_tensor'],
)  # fmt: skip
def test_refuses_names(tmp_path, name):
  for found in ({'a': Named(name)}, {'a': Called(name, 'true')}):
    path = legacy(tmp_path / 'a.pth', found)
    with pytest.raises(ValueError, match=f'refused: the pickle names {name},'):
      torch_legacy.load(path)


@pytest.mark.parametrize('write', WRITERS.values(), ids=WRITERS)
def test_every_cut_is_one_line(tmp_path, write):
  path = write(tmp_path / 'a.pth')
  data = path.read_bytes()
  for n in range(0, len(data) - 1, 7):
    path.write_bytes(data[:n])
    with pytest.raises(ValueError, match='^[^\n]+$'):
      torch_legacy.load(path)


def test_every_damaged_byte_is_read_or_one_line(tmp_path):
  """No byte of the pickles, however changed, gives another kind of error."""
  path = legacy(tmp_path / 'a.pth')
  data = path.read_bytes()
  refused = 0
  for i, new in np.random.default_rng(0).integers(0, (len(data), 256), (600, 2)):
    path.write_bytes(data[:i] + bytes([new]) + data[i + 1 :])
    try:
      torch_legacy.load(path)
    except ValueError as error:
      refused += 1
      assert '\n' not in str(error)
  assert refused > 200


X = TENSORS['a.weight']


@pytest.mark.parametrize(
  ('found', 'message'),
  [
    ([1], 'holds a list, not a dict of tensors'),
    ({'epoch': 3}, "'epoch' is a int, not a tensor; save the state dict alone"),
    ({'a': {'b': 1}}, "'a' is a dict, not a tensor"),
    ({1: 2}, '1 is a int'),
    ({'a': tensor('0', X, shape=(4, 4), strides=(4, 1), count=12)}, 'larger than its'),
    ({'a': tensor('0', X, shape=(9, 9), strides=(0, 0), count=12)}, 'larger than its'),
    ({'a': tensor('0', X, offset=-1, count=12)}, 'a shape that cannot be'),
    ({'a': tensor('0', X, shape=(3,), count=12)}, 'a tensor without numbers'),
    ({'a': tensor('9', X)}, 'tensors name numbers that are not in it'),
    ({'a': tensor('0', X, count=11)}, "12 numbers '0', not 11"),
    ({'a': tensor('0', X), 'b': tensor('0', X, kind='IntStorage')}, 'reads int32'),
    ({'a': Words(('storage', 1, '0', 'cpu', 1, None))}, 'names no numbers'),
    ({'a': Words(('storage', Named('torch.IntStorage'), 5, 'cpu', 1, None))},
     'numbers without a name'),
    ({(1, 2): 3}, 'a key of type tuple'),
    ({'a': 10**400}, "'a' is a int"),
    ({'a': frozenset()}, 'refused: the pickle names __builtin__.frozenset'),
  ],
)  # fmt: skip
def test_refuses_contents(tmp_path, found, message):
  path = legacy(tmp_path / 'a.pth', found, {'x': X})
  with pytest.raises(ValueError, match=message):
    torch_legacy.load(path)


def test_refuses_files(tmp_path):
  path = tmp_path / 'a.pth'
  with pytest.raises(ValueError, match='no such file'):
    torch_legacy.load(path)
  cases = (
    (lambda: legacy(path, magic=3), 'another magic number'),
    (lambda: path.write_bytes(b'hello'), 'another magic number'),
    (lambda: zipped(path, compress=zipfile.ZIP_DEFLATED), 'is compressed'),
    (lambda: zipped(path, byteorder=b'big'), 'not little-endian'),
    (lambda: zipped(path, numbers={}), 'has no x/data/0'),
    (lambda: zipped(path, numbers={'x': X[:1]}), '16 bytes in data/0'),
    (lambda: path.write_bytes(b'PK\x03\x04' + bytes(99)), 'no whole zip file'),
  )
  for write, message in cases:
    write()
    with pytest.raises(ValueError, match=message):
      torch_legacy.load(path)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('readme', 'hello')
  with pytest.raises(ValueError, match='holds no data.pkl'):
    torch_legacy.load(path)


def test_no_instruction_calls_but_by_the_list():
  """What the machine knows, against all that pickles have: no NEWOBJ, INST, OBJ, ..."""
  known = {'REDUCE', 'BUILD', 'GLOBAL', 'BINPERSID'}
  calling = {'INST', 'OBJ', 'NEWOBJ', 'NEWOBJ_EX', 'STACK_GLOBAL', 'EXT1', 'PERSID'}
  for op in pickletools.opcodes:
    if op.name in calling:
      assert op.name not in known
      steps = [(op, None, 0)]
      with pytest.raises(torch_legacy._Refused, match=f'instruction {op.name}'):
        torch_legacy._run(steps)
