"""What a source of documents is: names of pieces, and the records of each.

  pieces()                 'train 0:512'    'train 512:1024'    'test 0:300'
  read('train 512:1024')   ('train', Document), ('train', BadDocument), ...

A piece (a tar, a range of rows or bytes, some pages) is read on its own, so pieces are
read side by side by processes, and those that are done aren't read again after a kill.
The records of a source are its pieces', one piece after the other. Of sources of files

  webdataset:gs://b/{train,val}-*.tar     pieces: each tar       splits: train, val
  parquet:data/*.parquet                  pieces: each row group

a file's split stands in its name, or is told; of the training split a share may be held
out, by a hash of each document's id, as 'test'.
"""

import hashlib
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

from mmjax.data import paths
from mmjax.data.document import BadDocument, Document

Record = tuple[str, Document | BadDocument]
Found = tuple[str | None, Document | BadDocument]  # id; None = of a whole file

_SPLITS = {
  'train': 'train',
  'training': 'train',
  'val': 'val',
  'valid': 'val',
  'validation': 'val',
  'dev': 'val',
  'test': 'test',
}
_SPLIT = '|'.join(sorted(_SPLITS, key=len, reverse=True))


def share_of(name: str) -> float:
  """A number in [0, 1) that is as good as random, always the same for a name."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / 2**48


def split_of(path: str) -> str:
  """The split that a file's name has as a word, or its folder is called; else 'train'.

  'data/validation-00000-of-00002.parquet' is 'val', and so is 'val2017/0001.tar'.
  """
  folder, name = posixpath.split(path.lower())
  found = re.search(rf'(?<![a-z])({_SPLIT})(?![a-z])', name) or re.fullmatch(
    rf'({_SPLIT})\d*', posixpath.basename(folder)
  )
  return _SPLITS[found[1]] if found else 'train'


class Source:
  """Base of sources, which are frozen dataclasses, so that they go to processes.

  The first field is the argument of the spec NAME:ARGUMENT, the others are options.

  left_out: reasons under which a source leaves something out because it was asked to,
    not because it is damaged.
  """

  left_out: ClassVar[frozenset[str]] = frozenset()

  def fingerprint(self) -> str | None:
    """What the data is made from, to notice when that changes; None = unknown."""
    return None

  def total(self, splits: Sequence[str] | None = None) -> int | None:
    """How many records those splits have, where that is known beforehand."""
    return None

  def pieces(self, splits: Sequence[str] | None = None) -> Sequence[str]:
    """Names of the pieces, in order; the same for equal data.

    Raises:
      ValueError: the source can't be read at all.
    """
    raise NotImplementedError

  def read(self, piece: str, splits: Sequence[str] | None = None) -> Iterator[Record]:
    """The records of a piece that are of the named splits, or all.

    What can't become a document comes as (split, BadDocument), to be counted.

    Raises:
      ValueError, OSError: the piece can't be read.
    """
    raise NotImplementedError

  def records(self, splits: Sequence[str] | None = None) -> Iterator[Record]:
    """The records of all pieces, one after the other."""
    for piece in self.pieces(splits):
      yield from self.read(piece, splits)


def ranges(name: str, total: int, size: int) -> list[str]:
  """'NAME 0:512', 'NAME 512:1024', ...: pieces of `size` out of `total` records."""
  return [f'{name} {i}:{min(i + size, total)}' for i in range(0, total, size)]


def parse_range(piece: str) -> tuple[str, int, int]:
  """(name, start, end) of a name of `ranges`.

  Raises:
    ValueError: it is none.
  """
  match = re.fullmatch(r'(.*) (\d+):(\d+)', piece, re.DOTALL)
  if match is None:
    raise ValueError(f'{piece!r} is no piece of this source')
  return match[1], int(match[2]), int(match[3])


class Files(Source):
  """A source of files; a subclass is a frozen dataclass with these fields.

  files: a pattern, see `paths.expand`.
  split: of all of them; by default what each file's name says, see `split_of`.
  test_share: of the split 'train' that is 'test'; by a hash of a document's id.
  """

  files: str
  split: str | None
  test_share: float

  def __post_init__(self):
    name = type(self).__name__.lower()
    if not 0 <= self.test_share <= 1:
      raise ValueError(f'source {name}: test_share={self.test_share} is no share')
    if self.split is not None and not re.fullmatch(r'\w[\w.-]*', self.split):
      raise ValueError(f'source {name}: split={self.split!r} is no plain name')

  def fingerprint(self) -> str | None:
    """A hash of the files' names, sizes, begins and ends; None = they can't be read."""
    try:
      return paths.fingerprint(paths.expand(self.files))
    except ValueError:
      return None

  def pieces(self, splits: Sequence[str] | None = None) -> list[str]:
    """The files that may hold something of those splits.

    Raises:
      ValueError: there is no such file.
    """
    return [f for f in paths.expand(self.files) if self.may_hold(f, splits)]

  def may_hold(self, file: str, splits: Sequence[str] | None) -> bool:
    """Whether a file may have documents of those splits."""
    home = self.home(file)
    return splits is None or home in splits or (
      home == 'train' and self.test_share > 0 and 'test' in splits
    )  # fmt: skip

  def file(self, piece: str) -> str:
    """The file that a piece is of: itself, or FILE of 'FILE#7'."""
    return piece

  def home(self, file: str) -> str:
    """The split of a file."""
    return self.split or split_of(file)

  def name(self, file: str) -> str:
    """What ids call a file."""
    return paths.relative(file, self.files)

  def read(self, piece: str, splits: Sequence[str] | None = None) -> Iterator[Record]:
    """The records of a piece that are of those splits.

    A file that is gone comes as BadDocument 'missing_file'.

    Raises:
      OSError: a file that is there and can't be read.
    """
    file = self.file(piece)
    home = self.home(file)

    def place(name):
      held = home == 'train' and name is not None and share_of(name) < self.test_share
      return 'test' if held else home

    def wanted(name):
      return splits is None or place(name) in splits

    try:
      for name, record in self.found(piece, wanted):
        if wanted(name):
          yield place(name), record
    except FileNotFoundError:
      if wanted(None):
        yield home, BadDocument('missing_file', f'{file}: no such file')

  def found(self, piece: str, wanted: Callable[[str], bool]) -> Iterator[Found]:
    """(id, record) of a piece; of an unwanted id the media needn't be read."""
    raise NotImplementedError
