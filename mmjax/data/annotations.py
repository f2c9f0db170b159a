"""Sources of one JSON file of annotations beside a folder of images.

A file is read whole, once a process (the largest public ones are about a gigabyte); its
entries, a document each, are pieces of 512:

  coco:annotations/captions_train2017.json      captions_train2017.json#0, #512, ...
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mmjax.data import paths
from mmjax.data.document import BadDocument, Document
from mmjax.data.source import Files, Found

PER_PIECE = 512


class Annotations(Files):
  """A subclass says by `entries` what stands in a file, by `document` what one means."""

  @staticmethod
  def entries(*trees: Any) -> list[Any]:
    """The entries of a file's JSON; a BadDocument among them is counted.

    Raises:
      BadDocument: 'bad_json', it isn't laid out so.
    """
    raise NotImplementedError

  def documents(self, entry: Any, file: str, name: str) -> Iterator[Document]:
    """The document of an entry, and BadDocuments for what had to be left out of it.

    Raises:
      BadDocument: it can't become one.
    """
    raise NotImplementedError

  def name_of(self, entry: Any, file: str, number: int) -> str:
    """The id of an entry."""
    return f'{self.name(file)}#{number}'

  def sets(self) -> list[tuple[str, ...]]:
    """Files that are read together, the first gives its name."""
    return [(file,) for file in paths.expand(self.files)]

  def fingerprint(self) -> str | None:
    """A hash of the annotations; images aren't looked at. None = they can't be read."""
    try:
      return paths.fingerprint((f for files in self.sets() for f in files), whole=True)
    except ValueError:
      return None

  def total(self, splits: Sequence[str] | None = None) -> int | None:
    if splits is not None and self.test_share:
      return None
    return sum(len(e) for file, e in self._read() if self.may_hold(file, splits) and e)

  def pieces(self, splits: Sequence[str] | None = None) -> list[str]:
    """FILE#0, FILE#512, ...

    Raises:
      ValueError: no such file, or all of them are no JSON laid out so.
    """
    found = self._read()
    if all(entries is None for _, entries in found):
      load(self.entries, self.sets()[0])
    return [
      f'{file}#{start}'
      for file, entries in found
      if self.may_hold(file, splits)
      for start in range(0, max(len(entries or ()), 1), PER_PIECE)
    ]

  def _read(self) -> list[tuple[str, list[Any] | None]]:
    found = []
    for files in self.sets():
      try:
        found.append((files[0], load(self.entries, files)))
      except BadDocument:
        found.append((files[0], None))
    return found

  def file(self, piece: str) -> str:
    return piece.rpartition('#')[0]

  def found(self, piece: str, wanted: Callable[[str], bool]) -> Iterator[Found]:
    file, start = self.file(piece), int(piece.rpartition('#')[2])
    try:
      entries = load(self.entries, next(s for s in self.sets() if s[0] == file))
    except BadDocument as error:
      yield None, error
      return
    for number, entry in enumerate(entries[start : start + PER_PIECE], start):
      if isinstance(entry, BadDocument):
        message = f'{self.name(file)}: {entry.message}'
        yield None, BadDocument(entry.reason, message)
        continue
      name = self.name_of(entry, file, number)
      if not wanted(name):
        continue
      try:
        for one in self.documents(entry, file, name):
          yield name, one
      except BadDocument as error:
        yield name, BadDocument(error.reason, f'{name}: {error.message}')


def load(entries: Callable[..., list[Any]], files: tuple[str, ...]) -> list[Any]:
  """The entries of files that are read together.

  Raises:
    BadDocument: 'missing_file'; 'bad_json', no JSON or laid out otherwise.
  """
  return _load(entries, files, paths.fingerprint(files))


@functools.lru_cache(2)
def _load(entries, files, fingerprint):
  trees = []
  for file in files:
    try:
      trees.append(json.loads(paths.read(file)))
    except FileNotFoundError:
      raise BadDocument('missing_file', f'{file}: no such file') from None
    except (ValueError, RecursionError) as error:
      raise BadDocument('bad_json', f'{file}: {error}') from None
  try:
    return entries(*trees)
  except BadDocument as error:
    raise BadDocument(error.reason, f'{", ".join(files)}: {error.message}') from None
