"""Weights out of a torch file, without torch and without running anything.

A state dict of torch is a pickle, and a pickle is a program: a list of instructions
for a machine with a stack, one of which calls any function by name. Here is a machine
that knows only the instructions that lay out numbers, text, lists and dicts, and five
names that mean a tensor or a dict. Any other name or instruction ends the reading
before anything is done with it.

  before torch 1.6   magic number, version, about the system, the dict, keys: five
                     pickles; then for every key the count of its numbers, the numbers
  since              a zip: NAME/data.pkl and NAME/data/KEY, not compressed
"""

import io
import math
import pathlib
import pickletools
import struct
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
  'DoubleStorage': np.float64,
  'FloatStorage': np.float32,
  'HalfStorage': np.float16,
  'BFloat16Storage': ml_dtypes.bfloat16,
  'LongStorage': np.int64,
  'IntStorage': np.int32,
  'ShortStorage': np.int16,
  'CharStorage': np.int8,
  'ByteStorage': np.uint8,
  'BoolStorage': np.bool_,
}


class _Dtype(NamedTuple):
  name: str


class _Stored(NamedTuple):
  """The numbers that tensors look at: the words of one persistent id."""

  dtype: np.dtype
  key: str
  count: int


class _Tensor(NamedTuple):
  storage: _Stored
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Refused(Exception):
  """Ends the reading; the message is the line's end."""


def load(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of a torch state dict, by name.

  Args:
    path: a file that torch.save wrote of a dict of tensors, in the old format or as
      a zip.

  Raises:
    ValueError: no such file; anything in it but names and tensors; a file that ends
      too early or isn't torch's. One line.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f'{path}: no such file')
  data = path.read_bytes()
  try:
    read = _zip if data.startswith(b'PK\x03\x04') else _legacy
    return read(data)
  except _Refused as error:
    raise ValueError(f'{path}: {error}') from None


def _legacy(data):
  file = io.BytesIO(data)
  try:
    magic = _unpickle(file)
  except _Refused:
    magic = None
  if magic != _MAGIC:
    raise _Refused('no state dict of torch (another magic number)')
  _unpickle(file), _unpickle(file)  # version of the format, sizes of C's types
  named = _state(_unpickle(file))
  keys = _unpickle(file)
  stored = {t.storage.key: t.storage for t in named.values()}
  if not isinstance(keys, list) or not set(stored) <= {str(key) for key in keys}:
    raise _Refused('damaged: tensors name numbers that are not in it')
  flat, at = {}, file.tell()
  for key in map(str, keys):
    if len(data) < at + 8:
      raise _Refused(f'it ends before the numbers {key!r}')
    (count,) = struct.unpack_from('<q', data, at)
    if key not in stored:
      raise _Refused(f'damaged: no tensor has the numbers {key!r}')
    want = stored[key]
    if count != want.count:
      raise _Refused(f'damaged: {count} numbers {key!r}, not {want.count}')
    at += 8
    size = count * want.dtype.itemsize
    if len(data) < at + size:
      raise _Refused(f'it ends inside of the numbers {key!r}')
    flat[key] = np.frombuffer(data, want.dtype, count, at)
    at += size
  return {name: _array(name, t, flat) for name, t in named.items()}


def _zip(data):
  try:
    archive = zipfile.ZipFile(io.BytesIO(data))
    infos = {i.filename: i for i in archive.infolist()}
  except (zipfile.BadZipFile, ValueError, OSError) as error:
    raise _Refused(f'no whole zip file ({error})') from None

  def member(name):
    if name not in infos:
      raise _Refused(f'damaged: it has no {name}')
    if infos[name].compress_type != zipfile.ZIP_STORED:
      raise _Refused(f'{name} is compressed, which torch never does')
    try:
      return archive.read(name)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError) as error:
      raise _Refused(f'damaged: {name} ({error})') from None

  roots = [n.removesuffix('data.pkl') for n in infos if n.endswith('/data.pkl')]
  if len(roots) != 1:
    raise _Refused('no state dict of torch (it holds no data.pkl)')
  root = roots[0]
  if f'{root}byteorder' in infos and member(f'{root}byteorder') != b'little':
    raise _Refused('its numbers are not little-endian')
  named = _state(_unpickle(io.BytesIO(member(f'{root}data.pkl'))))
  flat = {}
  for t in named.values():
    s = t.storage
    if s.key not in flat:
      raw = member(f'{root}data/{s.key}')
      if len(raw) != s.count * s.dtype.itemsize:
        raise _Refused(f'damaged: {len(raw)} bytes in data/{s.key}')
      flat[s.key] = np.frombuffer(raw, s.dtype)
  return {name: _array(name, t, flat) for name, t in named.items()}


def _state(found) -> dict[str, _Tensor]:
  """Refuses what isn't a dict of tensors."""
  if not isinstance(found, dict):
    raise _Refused(f'it holds a {type(found).__name__}, not a dict of tensors')
  for name, value in found.items():
    if not isinstance(name, str) or not isinstance(value, _Tensor):
      raise _Refused(
        f'{name!r} is a {type(value).__name__}, not a tensor; save the state dict alone'
      )
  return found


def _array(name, t: _Tensor, flat) -> np.ndarray:
  """The tensor's own copy of its numbers, as it walks through them."""
  numbers = flat[t.storage.key]
  if flat[t.storage.key].dtype != t.storage.dtype:
    raise _Refused(f'damaged: {name} reads {numbers.dtype} as {t.storage.dtype}')
  count = math.prod(t.shape)
  last = t.offset + sum((n - 1) * s for n, s in zip(t.shape, t.strides))
  if count and (last >= len(numbers) or count > len(numbers)):
    raise _Refused(f'damaged: {name} {list(t.shape)} is larger than its numbers')
  if not count:
    return np.zeros(t.shape, numbers.dtype)
  strides = [s * numbers.itemsize for s in t.strides]
  return np.lib.stride_tricks.as_strided(numbers[t.offset :], t.shape, strides).copy()


# ---- The machine ----


def _tensor(storage, offset, shape, strides, *rest) -> _Tensor:
  del rest  # whether it was trained, and hooks
  sizes = (offset, *shape, *strides)
  if not isinstance(storage, _Stored) or len(shape) != len(strides):
    raise _Refused('damaged: a tensor without numbers')
  if not all(type(n) is int and 0 <= n < 2**48 for n in sizes):
    raise _Refused('damaged: a tensor of a shape that cannot be')
  return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(data, *rest) -> _Tensor:
  del rest
  return data


def _dict(items=()) -> dict:
  return {_key(k): v for k, v in items}


_CALLS = {
  'collections.OrderedDict': _dict,
  'torch._utils._rebuild_tensor': _tensor,
  'torch._utils._rebuild_tensor_v2': _tensor,
  'torch._utils._rebuild_parameter': _parameter,
}
_NAMES = {**_CALLS, **{f'torch.{n}': _Dtype(n) for n in _DTYPES}}
_VALUES = {
  'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': (),
}  # fmt: skip
_LITERALS = {
  'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE', 'SHORT_BINUNICODE',
}  # fmt: skip
_MARK = object()


def _unpickle(file: io.BytesIO) -> Any:
  """One pickle, from where the file stands to its end."""
  try:
    return _run(pickletools.genops(file))
  except (ValueError, EOFError, struct.error) as error:
    raise _Refused(f'it ends too early, or is no pickle ({error})') from None
  except (IndexError, TypeError, KeyError, AttributeError):
    raise _Refused('damaged: a pickle that makes no sense') from None


def _run(ops) -> Any:
  stack, memo = [], {}

  def since_mark():
    at = max(i for i, x in enumerate(stack) if x is _MARK)
    values = stack[at + 1 :]
    del stack[at:]
    return values

  for op, arg, _ in ops:
    name = op.name
    if name in _LITERALS:
      stack.append(arg)
    elif name in _VALUES:
      stack.append(_VALUES[name])
    elif name == 'EMPTY_DICT':
      stack.append({})
    elif name == 'EMPTY_LIST':
      stack.append([])
    elif name == 'MARK':
      stack.append(_MARK)
    elif name in ('BINPUT', 'LONG_BINPUT'):
      memo[arg] = stack[-1]
    elif name in ('BINGET', 'LONG_BINGET'):
      stack.append(memo[arg])
    elif name == 'TUPLE':
      stack.append(tuple(since_mark()))
    elif name in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
      n = int(name[-1])
      stack[-n:] = [tuple(stack[-n:])]
    elif name == 'APPEND':
      value = stack.pop()
      _of(stack[-1], list).append(value)
    elif name == 'APPENDS':
      values = since_mark()
      _of(stack[-1], list).extend(values)
    elif name == 'SETITEM':
      value, key = stack.pop(), stack.pop()
      _of(stack[-1], dict)[_key(key)] = value
    elif name == 'SETITEMS':
      values = since_mark()
      pairs = zip(values[::2], values[1::2], strict=True)
      _of(stack[-1], dict).update((_key(k), v) for k, v in pairs)
    elif name == 'GLOBAL':
      stack.append(_named(arg.replace(' ', '.')))
    elif name == 'REDUCE':
      args = _of(stack.pop(), tuple)
      call = stack.pop()
      if call not in _CALLS.values():
        raise _Refused('damaged: it calls what is no function')
      stack.append(call(*args))
    elif name == 'BINPERSID':
      stack.append(_stored(stack.pop()))
    elif name == 'BUILD':  # an OrderedDict's attributes: versions of modules
      stack.pop()
      _of(stack[-1], dict)
    elif name == 'STOP':
      return stack.pop()
    elif name != 'PROTO':
      raise _Refused(f'refused: the pickle has the instruction {name}')
  raise _Refused('it ends too early')


def _named(name):
  if name not in _NAMES:
    raise _Refused(
      f'refused: the pickle names {name}, and may only name {", ".join(_CALLS)} and'
      ' types of numbers'
    )
  return _NAMES[name]


def _stored(words) -> _Stored:
  """('storage', type, key, device, count, view) of a persistent id."""
  kind, dtype, key, _, count = _of(words, tuple)[:5]
  if kind != 'storage' or not isinstance(dtype, _Dtype) or words[5:] not in ((), (None,)):
    raise _Refused('damaged: a persistent id that names no numbers')
  if not isinstance(key, str) or type(count) is not int or count < 0:
    raise _Refused('damaged: numbers without a name or count')
  return _Stored(np.dtype(_DTYPES[dtype.name]), key, count)


def _of(value, kind):
  if not isinstance(value, kind):
    raise _Refused(f'damaged: a pickle fills a {type(value).__name__}')
  return value


def _key(key):
  if not isinstance(key, str | int):
    raise _Refused(f'damaged: a dict with a key of type {type(key).__name__}')
  return key
