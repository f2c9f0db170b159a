"""Zips, read where they are: nothing is unpacked, so no name leads anywhere.

  docs_no_face_shard_0_v3.jsonl.zip    lines of the .jsonl inside, one after the other
  images.zip                           images by name, see `data.folder`

A few bytes of a zip may stand for any number, so sizes are limited: of a file, and of a
line. Both are asked before memory is given.
"""

import functools
import io
import posixpath
import stat
import zipfile
import zlib
from collections.abc import Iterator

from mmjax.data import paths
from mmjax.data.document import BadDocument

MOST_FILE = 2**28  # bytes of a file that is read as a whole
MOST_LINES = 2**36  # of one that is read by lines
MOST_LINE = 2**26
# What reading from a damaged or locked zip raises.
_ERRORS = (
  zipfile.BadZipFile,
  zlib.error,
  EOFError,
  NotImplementedError,
  RuntimeError,
  OSError,
  ValueError,
)


def _open(path: str) -> zipfile.ZipFile:
  """Raises OSError, and ValueError for what is no zip."""
  try:
    return zipfile.ZipFile(paths.open_file(path) if paths.scheme(path) else path)
  except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
    raise ValueError(f'{path}: no zip: {error}') from None


@functools.lru_cache(4)
def _archive(path: str) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
  """A zip, open, and its plain files by name; reads of it may come from any thread."""
  archive = _open(path)
  return archive, {
    posixpath.normpath(one.filename): one for one in archive.infolist() if _plain(one)
  }


def _plain(one: zipfile.ZipInfo) -> bool:
  kind = stat.S_IFMT(one.external_attr >> 16)
  return not one.is_dir() and kind in (0, stat.S_IFREG)  # 0 = not said


def read(path: str, name: str, most: int = MOST_FILE) -> bytes:
  """The bytes of a file in a zip, of at most so many.

  Raises:
    KeyError: no such file in it, or a link.
    BadDocument: 'too_large'; 'bad_zip' for a damaged or locked file.
    OSError, ValueError: the zip isn't there, or is none.
  """
  archive, files = _archive(path)
  one = files[name]
  if one.file_size > most:
    raise BadDocument('too_large', f'{path}: {name!a}: {one.file_size:,} bytes')
  try:
    return archive.read(one)
  except _ERRORS as error:
    raise BadDocument('bad_zip', f'{path}: {name!a}: {error}') from None


def lines(path: str, suffix: str = '.jsonl') -> Iterator[bytes | BadDocument]:
  """The lines of all files in a zip that are called so, in the order of the zip.

  What can't be used comes as BadDocument: 'path_outside', 'too_large' (a file or a
  line), 'bad_zip' (the rest of a file, or all).

  Raises:
    OSError: the zip isn't there or can't be read.
  """
  try:
    archive = _open(path)
  except ValueError as error:
    yield BadDocument('bad_zip', str(error))
    return
  with archive:
    for one in archive.infolist():
      if not one.filename.endswith(suffix) or not _plain(one):
        continue
      try:
        paths.inner(one.filename)
        if one.file_size > MOST_LINES:
          raise BadDocument('too_large', f'{one.file_size:,} bytes')
        with io.BufferedReader(archive.open(one)) as file:
          yield from _limited(file)
      except BadDocument as error:
        where = f'{path}: {one.filename!a}'
        yield BadDocument(error.reason, f'{where}: {error.message}')
      except _ERRORS as error:
        yield BadDocument('bad_zip', f'{path}: {one.filename!a}: {error}')


def _limited(file) -> Iterator[bytes | BadDocument]:
  while line := file.readline(MOST_LINE + 1):
    if len(line) > MOST_LINE:
      while line and not line.endswith(b'\n'):
        line = file.readline(MOST_LINE)
      yield BadDocument('too_large', f'a line of more than {MOST_LINE:,} bytes')
    else:
      yield line
