"""Files that others made: where they are, and the opening of those that two rooms read.

  path/to/model.gguf       a path
  package:NAME/FILE        FILE inside the installed package NAME, which is not imported

Leftmost in the import law: `data` takes the tokenizer, `interop` the weights of the
same GGUF file.
"""

import importlib.util
import os
import pathlib
from typing import Any

_PACKAGE = 'package:'


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
