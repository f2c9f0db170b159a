"""A directory of Hugging Face: config.json and weights as safetensors.

  config.json
  preprocessor_config.json                          of images, if there are any
  model.safetensors                                 or, sharded,
  model-00001-of-00002.safetensors, ...
  model.safetensors.index.json                      {"weight_map": {name: file}}

Tensors are read slice by slice from their place in the file, and nothing that
could run code is ever opened.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

PREPROCESSOR = 'preprocessor_config'
_INDEX = 'model.safetensors.index.json'
_PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.pickle')
_CHUNK = 1_000_000  # values that are read at once where rows aren't wanted whole
# The tensors that can be weights, and what NumPy calls their type.
FLOATS = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}


class Source:
  """The config and the tensors of a directory, or of one .safetensors file in it.

  What is said of images, in a file of its own, is the config's key `PREPROCESSOR`.

  Raises:
    ValueError: what isn't there, can't be read, or is a pickle.
  """

  def __init__(self, path):
    path = pathlib.Path(path)
    _refuse_pickle([path] if path.suffix in _PICKLES else [])
    if not path.exists():
      raise ValueError(f'{path}: no such directory')
    self.directory = path.parent if path.is_file() else path
    self.config_name = f'{self.directory}/config.json'
    self.config = _json(self.directory / 'config.json')
    if (images := self.directory / f'{PREPROCESSOR}.json').exists():
      self.config[PREPROCESSOR] = _json(images)
    files = [path] if path.is_file() else self._files()
    self._slices = {}
    for file in files:
      self._slices |= _tensors(file)

  def _files(self) -> list[pathlib.Path]:
    index = self.directory / _INDEX
    if not index.exists():
      found = sorted(self.directory.glob('*.safetensors'))
      if not found:
        _refuse_pickle(p for p in self.directory.iterdir() if p.suffix in _PICKLES)
        raise ValueError(f'{self.directory}: no .safetensors file')
      whole = self.directory / 'model.safetensors'
      if whole in found or len(found) == 1:
        return [whole if whole in found else found[0]]
      raise ValueError(
        f'{self.directory}: {len(found)} .safetensors files, but no {_INDEX}'
      )
    names = _json(index).get('weight_map')
    if not isinstance(names, dict):
      raise ValueError(f'{index}: it has no "weight_map"')
    files = [self.directory / name for name in sorted(set(names.values()))]
    for file in files:
      if file.parent != self.directory:
        raise ValueError(f'{index}: {file} is not in the directory')
      if not file.exists():
        raise ValueError(f'{index} names {file.name}, which is not there')
    return files

  def names(self) -> set[str]:
    return set(self._slices)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._slices[name].shape

  def dtype(self, name: str) -> str:
    """The type as safetensors calls it, e.g. 'BF16'."""
    return self._slices[name].dtype

  def __getitem__(self, name: str) -> 'Slices':
    """What reads a slice of the tensor: source[name][2:4, :] -> np.ndarray."""
    return self._slices[name]


def write(
  directory: pathlib.Path,
  config: dict[str, Any],
  sizes: dict[str, int],
  tensors: Iterable[tuple[str, np.ndarray]],
  max_shard_bytes: int,
) -> None:
  """Writes a directory; holds at most one shard's tensors in memory.

  Args:
    sizes: bytes by tensor, in the order of `tensors`.
  """
  from safetensors.numpy import save_file

  shards, used = [[]], 0
  for name, size in sizes.items():
    if shards[-1] and used + size > max_shard_bytes:
      shards, used = [*shards, []], 0
    shards[-1].append(name)
    used += size
  directory.mkdir(parents=True, exist_ok=True)
  old = sorted(directory.glob('*.safetensors')) + [directory / _INDEX]
  if found := [p.name for p in old if p.exists()]:
    raise ValueError(f'{directory} already has {found[0]}')
  tensors, places = iter(tensors), {}
  for i, names in enumerate(shards, 1):
    file = f'model-{i:05}-of-{len(shards):05}.safetensors'
    file = 'model.safetensors' if len(shards) == 1 else file
    held = dict(next(tensors) for _ in names)
    places.update(dict.fromkeys(held, file))
    save_file(held, directory / file, {'format': 'pt'})
  if len(shards) > 1:
    index = dict(metadata=dict(total_size=sum(sizes.values())), weight_map=places)
    (directory / _INDEX).write_text(json.dumps(index, indent=2) + '\n')
  config = dict(config)
  for name in PREPROCESSOR, 'config':
    said = config.pop(name, None) if name == PREPROCESSOR else config
    if said is not None:
      (directory / f'{name}.json').write_text(json.dumps(said, indent=2) + '\n')


@dataclasses.dataclass(frozen=True)
class Slices:
  """A tensor in a file, of which no more is read than what is asked for.

  Fields: dtype as safetensors calls it; start: where in the file it begins.
  """

  path: pathlib.Path
  start: int
  shape: tuple[int, ...]
  dtype: str

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    """The slice, in steps of 1: whole rows at once, else some rows at a time."""
    if not self.shape:
      return self._rows(0, 1).reshape(())
    first, *rest = (slice(*i.indices(n)[:2]) for i, n in zip(index, self.shape))
    row = math.prod(self.shape[1:])
    if all(i == slice(0, n) for i, n in zip(rest, self.shape[1:])):
      return self._rows(first.start, first.stop)
    step = max(1, _CHUNK // row)
    sizes = [len(range(i.start, i.stop)) for i in (first, *rest)]
    out = np.empty(sizes, np.dtype(FLOATS[self.dtype]))
    for i in range(first.start, first.stop, step):
      stop = min(i + step, first.stop)
      out[i - first.start : stop - first.start] = self._rows(i, stop)[:, *rest]
    return out

  def _rows(self, start, stop):
    dtype, row = np.dtype(FLOATS[self.dtype]), math.prod(self.shape[1:])
    size = row * dtype.itemsize
    where = self.start + start * size
    data = np.fromfile(self.path, np.uint8, (stop - start) * size, offset=where)
    return data.view(dtype).reshape(stop - start, *self.shape[1:])


def _tensors(file: pathlib.Path) -> dict[str, Slices]:
  """The tensors of a file that the library finds whole."""
  import safetensors

  try:
    safetensors.safe_open(file, 'numpy', backend='pread')
    with open(file, 'rb') as opened:
      size = int.from_bytes(opened.read(8), 'little')
      header = json.loads(opened.read(size))
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f'{file} is no whole safetensors file: {error}') from error
  header.pop('__metadata__', None)
  return {
    name: Slices(file, 8 + size + x['data_offsets'][0], tuple(x['shape']), x['dtype'])
    for name, x in header.items()
  }


def _json(path):
  if not path.exists():
    raise ValueError(f'{path.parent}: no {path.name}')
  try:
    found = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f'{path} is no JSON: {error}') from error
  if not isinstance(found, dict):
    raise ValueError(f'{path}: it must hold an object')
  return found


def _refuse_pickle(paths):
  if paths := sorted(paths):
    raise ValueError(
      f'{paths[0]} is a pickle, which can run any code when it is read; save the model as'
      ' safetensors instead'
    )
