"""WebDataset: tars in which files of one name, up to its first dot, are one sample.

  shard-00000.tar    000.jpg  000.txt  000.json  001.jpg  001.txt  001.json  ...
                     '-------- one ----------'   '-------- two ----------'

Such tars are what img2dataset writes. They are read as a stream and never unpacked; a
name that would lead out of a folder is refused all the same, as is what is no plain file.
github.com/webdataset/webdataset
"""

import dataclasses
import functools
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

from mmjax.data import paths
from mmjax.data.document import BadDocument, Document, Image
from mmjax.data.layouts import branches, dialogue
from mmjax.data.source import Files, Found

IMAGES = ('jpg', 'jpeg', 'png', 'webp', 'gif', 'bmp', 'tif', 'tiff', 'ppm', 'jp2')
_FIELDS = (
  'caption',
  'captions',
  'text',
  'conversations',
  'conversation',
  'messages',
)  # in a .json
_NAME = re.compile(r'((?:.*/)?[^./][^./]*)\.([^/]+)')


@dataclasses.dataclass(frozen=True)
class WebDataset(Files):
  """Samples of tars as documents: the image, then its text.

  files: a pattern of tars (or .tar.gz), see `paths.expand`; a piece is a tar.
  image: the extension of the image; several in order: 'left.jpg,right.jpg'. By default
    the first member with an extension of an image.
  text: the extension of the text, 'json:NAME' for a field of the .json; by default .txt,
    a field such as 'caption', or .cls. A list of strings is several captions, a
    list of turns a dialogue (see `layouts.dialogue`).
  classes: a file with a name per line: what a number in .cls means. The name is the text
    and meta['label'].
  encoding: of .txt and .cls. What isn't that is dropped as 'not_unicode', not guessed.
  max_bytes: of a member; larger ones are refused.
  split, test_share: see `source.Files`.

  Dropped by reason: 'no_image', 'no_text', 'empty_text', 'bad_json', 'not_unicode',
  'path_outside', 'not_a_file' (links, devices, files with holes), 'too_large',
  'bad_sample' (an extension twice, no such class), 'cut_tar' (the rest of the tar),
  'missing_file' (all of it), and what `layouts.dialogue` says.
  """

  files: str
  image: str | None = None
  text: str | None = None
  classes: str | None = None
  encoding: str = 'utf-8'
  max_bytes: int = 2**28
  split: str | None = None
  test_share: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    try:
      ''.encode(self.encoding)
    except LookupError:
      raise ValueError(f'source webdataset: no encoding {self.encoding!r}') from None

  def found(self, piece: str, wanted: Callable[[str], bool]) -> Iterator[Found]:
    shard = self.name(piece)
    key, sample, broken = None, {}, None

    def flush():
      if broken is not None:
        yield name, broken
      elif sample and wanted(name):
        yield name, self._document(sample, name)

    for path, content in members(piece, self.max_bytes):
      if path is None:  # the last sample may not be whole
        lost = f'; with it {key!a}, its last sample' if sample else ''
        yield None, BadDocument(content.reason, content.message + lost)
        return
      parts = _NAME.fullmatch(path)
      if parts is None:
        continue  # neither key nor extension
      if parts[1] != key:
        yield from flush()
        key, sample, broken = parts[1], {}, None
        name = f'{shard}/{key}'
      extension = parts[2].lower()
      if isinstance(content, BadDocument):
        broken = content
      elif extension in sample:
        broken = BadDocument('bad_sample', f'{shard}: {path!a} stands there twice')
      else:
        sample[extension] = content
    yield from flush()

  def _document(self, sample: dict[str, bytes], name: str) -> Document | BadDocument:
    try:
      if self.image:
        wanted = self.image.lower().split(',')
      else:
        wanted = [e for e in sample if e in IMAGES][:1]
      if not wanted or not all(e in sample for e in wanted):
        raise BadDocument('no_image', f'there is {", ".join(sample)}')
      images = [sample[e] for e in wanted]
      value, meta = self._text(sample)
      if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        spans, roles = dialogue(value, images, lambda content: content)
        return Document(tuple(spans), name, {'roles': roles})
      texts = value if isinstance(value, list) else [value]
      texts = [str(one).strip() for one in texts if one is not None]
      pairs = [('', text) for text in texts if text]
      if not pairs:
        raise BadDocument('empty_text', 'a caption without text')
      spans = branches([Image(content) for content in images], pairs)
      return Document(tuple(spans), name, meta)
    except BadDocument as error:
      return BadDocument(error.reason, f'{name}: {error.message}')

  def _text(self, sample: dict[str, bytes]) -> tuple[Any, dict[str, str]]:
    """What stands for the text, and meta."""
    extension, _, field = (self.text or '').partition(':')
    if not extension:
      extension = next((e for e in ('txt', 'json', 'cls') if e in sample), '')
    if extension not in sample:
      raise BadDocument('no_text', f'there is {", ".join(sample)}')
    content = sample[extension]
    if extension.rpartition('.')[2] == 'json':
      tree = _json(content)
      names = [field] if field else _FIELDS
      if not isinstance(tree, dict):
        raise BadDocument('bad_json', 'no object')
      found = next((tree[n] for n in names if tree.get(n) is not None), None)
      if found is None:
        raise BadDocument('no_text', f'{extension} has {", ".join(map(str, tree))}')
      return found, {}
    try:
      # A byte order mark is no text.
      text = content.decode(self.encoding).removeprefix('\ufeff').strip()
    except UnicodeDecodeError as error:
      raise BadDocument('not_unicode', f'{extension}: {error}') from None
    if extension != 'cls':
      return text, {}
    if self.classes:
      names = _lines(self.classes)
      if not text.isdecimal() or int(text) >= len(names):
        raise BadDocument('bad_sample', f'no class {text[:20]!a}')
      text = names[int(text)]
    return text, {'label': text}


def members(
  path: str, max_bytes: int
) -> Iterator[tuple[str | None, bytes | BadDocument]]:
  """(name, bytes or why not) of each file in a tar; a tar that is cut ends with None.

  Raises:
    OSError: the tar isn't there or can't be read.
  """
  with paths.open_file(path) as file:
    try:
      with tarfile.open(fileobj=file, mode='r|*', tarinfo=_Member) as tar:
        while (member := tar.next()) is not None:
          tar.members.clear()  # it would keep them all
          if member.isdir():
            continue
          try:
            paths.inner(member.name)
            if not member.isreg() or member.issparse():
              raise BadDocument('not_a_file', 'a link, a device or a file with holes')
            if member.size > max_bytes:
              raise BadDocument('too_large', f'{member.size:,} bytes')
          except BadDocument as error:
            message = f'{path}: {member.name!a}: {error.message}'
            yield member.name, BadDocument(error.reason, message)
            continue
          content = tar.extractfile(member).read()
          if len(content) < member.size:
            raise tarfile.ReadError('unexpected end of data')
          yield member.name, content
    except (tarfile.TarError, EOFError) as error:
      yield None, BadDocument('cut_tar', f'{path}: {error}')


class _Member(tarfile.TarInfo):
  """Tells what `tarfile` takes for the end: a tar that ends in the middle."""

  @classmethod
  def fromtarfile(cls, tar):
    try:
      return super().fromtarfile(tar)
    except tarfile.EOFHeaderError:
      raise  # the mark of the end
    except tarfile.HeaderError as error:
      raise tarfile.ReadError(f'no end mark: {error}') from None


def _json(content: bytes) -> Any:
  try:
    return json.loads(content)
  except UnicodeDecodeError as error:
    raise BadDocument('not_unicode', f'json: {error}') from None
  except (ValueError, RecursionError) as error:
    raise BadDocument('bad_json', str(error)) from None


@functools.lru_cache(4)
def _lines(path: str) -> list[str]:
  try:
    return paths.read(path).decode().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f'{path}: no file of class names: {error}') from None
