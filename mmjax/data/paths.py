"""Where files are: on a disk, or in a bucket. All sources read through here.

  data/shard-00000.tar               a path
  data/shard-{00000..00099}.tar      a hundred of them; {train,val} names two
  gs://bucket/pages/*.parquet        what is there, sorted; also s3:// and memory://

Local files are opened as such, all others by fsspec, which takes gcsfs for gs:// and s3fs
for s3:// (the extra `cloud`).
"""

import glob
import hashlib
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from mmjax.data.document import BadDocument

_PACKAGES = {'gs': 'gcsfs', 's3': 's3fs', 'memory': 'fsspec'}
_MOST = 1_000_000  # names that one pattern may stand for
_ENDS = 2**16  # bytes of a large file's begin and end that tell it from another


def scheme(path: str | os.PathLike) -> str:
  """'gs', 's3', 'memory', or '' for a local path.

  Raises:
    ValueError: anything else before '://'.
  """
  name, separator, _ = os.fspath(path).partition('://')
  if not separator or not re.fullmatch(r'[A-Za-z][A-Za-z0-9+.-]*', name):
    return ''
  if name not in _PACKAGES:
    known = ', '.join(f'{one}://' for one in _PACKAGES)
    raise ValueError(f'{path}: no way to read {name}://; choose a local path, {known}')
  return name


def _system(path: str) -> Any:
  """The file system of a path that isn't local."""
  kind = scheme(path)
  try:
    import fsspec

    return fsspec.filesystem(kind)
  except ImportError:
    raise ValueError(
      f"{path}: {kind}:// needs the package {_PACKAGES[kind]}: pip install 'mmjax[cloud]'"
    ) from None


def open_file(path: str | os.PathLike) -> BinaryIO:
  """A file to read bytes from; one can seek in it.

  Raises:
    OSError: FileNotFoundError where it isn't there.
    ValueError: no way to read such a path.
  """
  path = os.fspath(path)
  return _system(path).open(path, 'rb') if scheme(path) else open(path, 'rb')


def read(path: str | os.PathLike, start: int = 0, length: int | None = None) -> bytes:
  """The bytes of a file, or `length` of them from `start`; errors as `open_file`."""
  path = os.fspath(path)
  if scheme(path):
    end = None if length is None else start + length
    return _system(path).cat_file(path, start or None, end)
  with open(path, 'rb') as file:
    file.seek(start)
    return file.read(length)


def exists(path: str | os.PathLike) -> bool:
  """Whether there is such a file or folder."""
  path = os.fspath(path)
  return _system(path).exists(path) if scheme(path) else os.path.exists(path)


def is_dir(path: str | os.PathLike) -> bool:
  """Whether there is such a folder (in a bucket: anything below that name)."""
  path = os.fspath(path)
  return _system(path).isdir(path) if scheme(path) else os.path.isdir(path)


def is_file(path: str | os.PathLike) -> bool:
  """Whether there is such a plain file."""
  path = os.fspath(path)
  return _system(path).isfile(path) if scheme(path) else os.path.isfile(path)


def files(folder: str | os.PathLike) -> Iterator[str]:
  """Names, from the folder on, of all files in it and below, in no order."""
  folder = os.fspath(folder)
  if kind := scheme(folder):
    root = folder.removeprefix(f'{kind}://').strip('/')
    for name in _system(folder).find(folder):
      yield name.strip('/').removeprefix(f'{root}/')
    return
  for here, _, names in os.walk(folder):
    for name in names:
      yield os.path.relpath(os.path.join(here, name), folder)


def size(path: str | os.PathLike) -> int:
  """Bytes of a file; errors as `open_file`."""
  path = os.fspath(path)
  return _system(path).size(path) if scheme(path) else os.path.getsize(path)


def expand(pattern: str | os.PathLike) -> list[str]:
  """The files that a pattern means: braces first, in their order, then * ? [ ], sorted.

  A name that braces spell out stands in the list whether or not it is there (in a set of
  thousands of shards some are missing); what can't be read is counted then.

  Raises:
    ValueError: not one such file, a folder, or braces that stand for too many.
  """
  pattern = os.fspath(pattern)
  if is_dir(pattern):
    raise ValueError(f'{pattern}: is a folder; name files, as in {pattern}/*')
  if exists(pattern):
    return [pattern]
  import bracex

  try:
    names = bracex.expand(pattern, limit=_MOST)
  except bracex.ExpansionLimitException:
    raise ValueError(f'{pattern}: stands for more than {_MOST:,} names') from None
  found, there = [], False
  for name in names:
    if glob.has_magic(name):
      some = _glob(name)
      there = there or bool(some)
    else:
      some = [name]
      there = there or exists(name)
    found += some
  if not there:
    raise ValueError(f'{pattern}: no such file')
  return list(dict.fromkeys(found))


def _glob(pattern: str) -> list[str]:
  kind = scheme(pattern)
  if not kind:
    return sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
  system = _system(pattern)
  found = system.glob(pattern, detail=True)
  return sorted(
    f'{kind}://{name.lstrip("/")}' for name, i in found.items() if i['type'] == 'file'
  )


def relative(path: str, pattern: str | os.PathLike) -> str:
  """A file's name below the folder that all files of a pattern share.

  'a/b/train/0.tar' of 'a/b/*/{0..9}.tar' is 'train/0.tar', wherever 'a/b' is.
  """
  pattern = os.fspath(pattern)
  root = pattern if path == pattern else re.split(r'[*?[{]', pattern)[0]
  return path.removeprefix(root[: root.rfind('/') + 1])


def parent(path: str | os.PathLike) -> str:
  """The folder of a file, '.' for a name alone."""
  path = os.fspath(path)
  kind = scheme(path)
  if not kind:
    return posixpath.dirname(path) or '.'
  return f'{kind}://' + posixpath.dirname(path.removeprefix(f'{kind}://'))


def absolute(path: str | os.PathLike) -> str:
  """A local path from the root; one in a bucket is that anyway."""
  path = os.fspath(path)
  return path if scheme(path) else os.path.abspath(path)


def inner(name: str) -> str:
  """A name below some folder, without '.' and '..'.

  Raises:
    BadDocument: 'path_outside' for an absolute one, or one that leads out.
  """
  plain = posixpath.normpath(name)
  if '\0' in name or name.startswith('/') or plain.split('/')[0] == '..':
    raise BadDocument('path_outside', f'{name!a} leaves the folder')
  return plain


def inside(folder: str | os.PathLike, name: str) -> str:
  """The path of the file `name` of a folder, from which it must not lead out.

  Raises:
    BadDocument: 'image_remote' for a URL; 'path_outside' as `inner`, and (on a disk)
      for a link that leads out.
  """
  folder = os.fspath(folder)
  if re.match(r'\w[\w+.-]*://|//|data:', name):
    raise BadDocument('image_remote', name[:80])
  path = posixpath.join(folder, inner(name))
  if not scheme(folder):
    root = os.path.realpath(folder)
    if os.path.commonpath([root, os.path.realpath(path)]) != root:
      raise BadDocument('path_outside', f'{name!a} is a link that leaves the folder')
  return path


def fingerprint(files: Iterable[str], whole: bool = False) -> str | None:
  """A hash that tells these files from others; None if one can't be read.

  On a disk it is of their sizes, begins and ends, or of all their bytes where `whole`;
  in a bucket of what the bucket says of them. A missing file counts as missing.
  """
  found = hashlib.sha256()
  try:
    for path in files:
      try:
        mark = _remote_mark(path) if scheme(path) else _mark(path, whole)
      except FileNotFoundError:
        mark = 'missing'
      found.update(f'{posixpath.basename(path)} {mark}\n'.encode())
  except (OSError, ValueError):
    return None
  return found.hexdigest()


def _mark(path: str, whole: bool) -> str:
  length = os.path.getsize(path)
  with open(path, 'rb') as file:
    if whole or length <= 2 * _ENDS:
      return hashlib.file_digest(file, 'sha256').hexdigest()
    ends = file.read(_ENDS)
    file.seek(-_ENDS, os.SEEK_END)
    return f'{length} {hashlib.sha256(ends + file.read()).hexdigest()}'


def _remote_mark(path: str) -> str:
  info = _system(path).info(path)
  keys = ('size', 'ETag', 'etag', 'md5Hash', 'created')
  return ' '.join(str(info[key]) for key in keys if key in info)
