"""Files: where they are, how they are written, and those that two rooms read.

  path/to/model.gguf       a path
  package:NAME/FILE        FILE inside the installed package NAME, which is not imported
  gs://bucket/runs/one     of a run also this, see `place`: `etils.epath` by gcsfs

Leftmost in the import law: `data` takes the tokenizer, `interop` the weights of the
same GGUF file.
"""

import contextlib
import importlib.util
import logging
import os
import pathlib
import uuid
from typing import Any

_PACKAGE = 'package:'
_BUCKET = 'gs://'


def find(spec: str | os.PathLike) -> pathlib.Path:
  """The path that a spec means; of a package's file, one that exists.

  Raises:
    ValueError: no such package, or no such file in it.
  """
  text = os.fspath(spec)
  if not text.startswith(_PACKAGE):
    return pathlib.Path(text)
  name, _, file = text.removeprefix(_PACKAGE).partition('/')
  # A name with dots would import what stands before the last one.
  found = importlib.util.find_spec(name) if name.isidentifier() else None
  if found is None:
    raise ValueError(f'{text}: no package {name!r} is installed')
  folders = [pathlib.Path(p) for p in found.submodule_search_locations or ()]
  for folder in folders:
    if (folder / file).exists():
      return folder / file
  where = folders[0] if folders else found.origin
  raise ValueError(f'{text}: no {file!r} in {where}')


def on_disk(path: str | os.PathLike, what: str) -> pathlib.Path:
  """A path that has to be of this machine's file system.

  Raises:
    ValueError: it is a bucket's, which would become a directory called 'gs:'.
  """
  text = os.fspath(path)
  if '://' in text:
    raise ValueError(
      f'{what} {text}: has to be on a disk; mount the bucket on every host, or take a'
      ' shared disk'
    )
  return pathlib.Path(text)


def in_bucket(path: str | os.PathLike) -> bool:
  """Whether a path is not of this machine's file system but in a bucket."""
  return os.fspath(path).startswith(_BUCKET)


def place(path: str | os.PathLike, what: str) -> Any:
  """A path of a run: pathlib's on a disk, in a bucket one with the same methods.

  In a bucket there are no empty folders, nothing is appended to, and no folder is
  renamed as one act; but an object is whole when it appears.

  Raises:
    ValueError: another kind of bucket, a bucket without a folder, or no gcsfs.
  """
  if not in_bucket(path):
    return on_disk(path, what)
  if not os.fspath(path).removeprefix(_BUCKET).strip('/').partition('/')[2]:
    raise ValueError(f'{what} {path}: name a folder in the bucket, as {path}/runs/one')
  if importlib.util.find_spec('gcsfs') is None:
    raise ValueError(
      f"{what} {path}: needs the package gcsfs: pip install 'mmjax[cloud]'"
    )
  # The same way to the bucket whether or not TensorFlow happens to be installed.
  os.environ.setdefault('EPATH_USE_TF', 'false')
  import fsspec
  from etils import epath

  # Other processes write there too, and TensorStore does, of which gcsfs doesn't hear.
  fsspec.config.conf.setdefault('gcs', {}).setdefault('use_listings_cache', False)
  return epath.Path(path)


@contextlib.contextmanager
def reaching(path: str | os.PathLike):
  """Inside, what goes wrong with a bucket is one line.

  Raises:
    ValueError: no such bucket, no right to it, no way there.
  """
  told = logging.getLogger('gcsfs')  # the same, as a stack trace
  before = told.level
  told.setLevel(logging.CRITICAL)
  try:
    yield
  except Exception as error:
    if not in_bucket(path) or isinstance(error, ValueError):
      raise
    if isinstance(error, FileNotFoundError):
      raise ValueError(f'{path}: no such bucket') from error
    why = ' '.join(str(error).split())[:300]
    raise ValueError(f'{path}: {type(error).__name__}: {why}') from error
  finally:
    told.setLevel(before)


def replace(path: Any, content: str | bytes) -> None:
  """Writes a file whole or not at all: a reader never sees half of it.

  Args:
    path: a path or a `place`, in a folder that is there.
  """
  data = content.encode() if isinstance(content, str) else content
  if in_bucket(path):
    path.write_bytes(data)
    return
  fresh = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:12]}')  # hosts share pids
  try:
    fresh.write_bytes(data)
    os.replace(fresh, path)
  finally:
    fresh.unlink(missing_ok=True)


def open_gguf(path: str | os.PathLike) -> Any:
  """A `gguf.GGUFReader` of a file (mapped into memory) that is whole.

  Raises:
    ValueError: no such file, another format, or one that was cut.
  """
  import gguf

  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f'{path}: no such file')
  try:
    return gguf.GGUFReader(path)
  except Exception as error:  # what the reader stumbles over first
    why = ' '.join(str(error).split())
    raise ValueError(f'{path} is no whole GGUF file: {why}') from error


def gguf_value(reader: Any, key: str, default: Any = None) -> Any:
  """A value of the metadata as plain Python; the default where it isn't there."""
  field = reader.get_field(key)
  return default if field is None else field.contents()
