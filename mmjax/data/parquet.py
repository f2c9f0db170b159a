"""Parquet as Hugging Face keeps datasets; the columns' types say what a row is.

  image {bytes, path}       caption: string, or a list of them      captions
  image                     question, answer                        a question
  images: list of the same  conversations or messages: turns        a dialogue
  images: list              texts: list of {user, assistant}        a dialogue
  images: [.., None, ..]    texts: [None, .., None]                 a page (OBELICS)

A page's lists are parallel, one of both None at each place (2306.16527). Row groups are
pieces; rows are read a few at a time, and only the columns that are used.
huggingface.co/docs/datasets
"""

import contextlib
import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mmjax.data import paths
from mmjax.data.document import BadDocument, Document, Image
from mmjax.data.folder import Folder
from mmjax.data.layouts import branches, dialogue, interleaved
from mmjax.data.source import Files, Found

_IMAGES = ('image', 'images', 'jpg', 'png', 'img', 'picture')
_TEXTS = (
  *('conversations', 'conversation', 'messages', 'texts', 'caption', 'captions'),
  *('answer', 'answers', 'text', 'sentences', 'label_text'),
)
_PROMPTS = ('question', 'prompt')  # of an answer
_ROWS = 32  # read at once


@dataclasses.dataclass(frozen=True)
class Parquet(Files):
  """Rows of Parquet files as documents; options name columns that aren't found alone.

  files: a pattern, see `paths.expand`; a piece is a row group.
  image, text, prompt: columns; 'none' for image says that there is none.
  images: the folder (or .tar, .zip) for images that a file names but lacks. A URL's
    is there under the SHA-256 of the URL in hex digits.
  min_images: pages of fewer are left out.
  split, test_share: see `source.Files`.

  Dropped by reason: 'no_image', 'empty_text', 'missing_column' (a row group), 'bad_file',
  'missing_file', 'image_remote' (URLs, without the option images; also single images of
  a page), 'few_images', 'bad_row', and what `layouts.dialogue` says.
  """

  files: str
  image: str | None = None
  text: str | None = None
  prompt: str | None = None
  images: str | None = None
  min_images: int = 1
  split: str | None = None
  test_share: float = 0.0

  def total(self, splits: Sequence[str] | None = None) -> int | None:
    if splits is not None and self.test_share:
      return None
    return sum(
      sum(found.rows)
      for file, found in self._footers
      if self.may_hold(file, splits) and found is not None
    )

  def pieces(self, splits: Sequence[str] | None = None) -> list[str]:
    """FILE#0, FILE#1, ... for the row groups.

    Raises:
      ValueError: no such file, or none that has the columns.
    """
    errors = [f.error for _, f in self._footers if f is not None]
    if errors and all(errors):
      raise ValueError(f'source parquet: {errors[0].message}')
    return [
      f'{file}#{group}'
      for file, found in self._footers
      if self.may_hold(file, splits)
      for group in range(len(found.rows) if found is not None else 1)
    ]

  def file(self, piece: str) -> str:
    return piece.rpartition('#')[0]

  @functools.cached_property
  def _footers(self) -> list[tuple[str, '_Footer | None']]:
    """By file its row groups and layout; None for what can't be read."""
    return [(file, self._footer(file)) for file in paths.expand(self.files)]

  def _footer(self, file: str) -> '_Footer | None':
    try:
      with opened(file) as parquet:
        metadata = parquet.metadata
        rows = tuple(
          metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)
        )
        error = None
        try:
          self._layout(parquet.schema_arrow, file)
        except BadDocument as found:
          error = found
        return _Footer(rows, error)
    except (FileNotFoundError, BadDocument):
      return None

  def found(self, piece: str, wanted: Callable[[str], bool]) -> Iterator[Found]:
    file, _, group = piece.rpartition('#')
    shard, group = self.name(file), int(group)
    try:
      with opened(file) as parquet:
        layout = self._layout(parquet.schema_arrow, file)
        columns = [c for c in dataclasses.astuple(layout) if c]
        sizes = [parquet.metadata.row_group(g).num_rows for g in range(group)]
        row = sum(sizes)
        for batch in _batches(parquet, group, columns, file):
          held = {name: batch.column(name) for name in columns}
          for i in range(batch.num_rows):
            name = f'{shard}#{row}'
            row += 1
            if not wanted(name):
              continue
            record = {column: values[i].as_py() for column, values in held.items()}
            for one in self._documents(record, layout, name):
              yield name, one
    except BadDocument as error:
      yield None, error

  def _layout(self, schema: Any, file: str) -> '_Layout':
    """Which columns to read.

    Raises:
      BadDocument: 'missing_column', with those there are.
    """
    names = schema.names

    def pick(option, choices, what):
      if option == 'none':
        return None
      if option:
        choices = (option,)
      column = next((c for c in choices if c in names), None)
      if column is None and (option or what):
        name = repr(option) if option else f'of {what} ({", ".join(choices)})'
        have = ', '.join(names) or 'none'
        raise BadDocument(
          'missing_column', f'{file}: no column {name}; there are: {have}'
        )
      return column

    text = pick(self.text, _TEXTS, 'texts')
    image = pick(self.image, _IMAGES, '')
    if image is None and self.image != 'none':  # any column that holds files
      image = next((f.name for f in schema if _holds_files(f.type)), None)
    if image is None and self.image != 'none':
      pick(None, _IMAGES, 'images')
    prompt = pick(self.prompt, _PROMPTS if text.startswith('answer') else (), '')
    return _Layout(image, text, prompt)

  def _documents(self, record, layout, name) -> Iterator[Document | BadDocument]:
    bad = []
    try:
      text = _rows(record[layout.text])
      image = record[layout.image] if layout.image else []
      several = isinstance(image, list)
      images = image if several else [image]
      turns = isinstance(text, list) and any(isinstance(t, dict) for t in text)
      if turns:
        spans, roles = dialogue(text, [i for i in images if i is not None], self._bytes)
        yield Document(tuple(spans), name, {'roles': roles})
      elif isinstance(text, list) and several and layout.image:
        yield Document(tuple(self._page(text, images, bad)), name)
      else:
        yield self._captions(record, layout, images, text, name)
    except BadDocument as error:
      yield BadDocument(error.reason, f'{name}: {error.message}')
    for error in bad:
      yield BadDocument(error.reason, f'{name}: {error.message}')

  def _captions(self, record, layout, images, text, name) -> Document:
    texts = text if isinstance(text, list) else [text]
    texts = [str(t).strip() for t in texts if t is not None]
    texts = [t for t in texts if t]
    if not texts:
      raise BadDocument('empty_text', f'nothing in column {layout.text!r}')
    prompts = record[layout.prompt] if layout.prompt else ''
    if isinstance(prompts, list) and len(prompts) != len(texts):
      raise BadDocument('bad_row', f'{len(prompts)} prompts, {len(texts)} texts')
    if not isinstance(prompts, list):
      prompts, texts = [prompts or ''], texts[:1] if layout.prompt else texts
      prompts = prompts * len(texts)
    media = [Image(self._bytes(one)) for one in images]
    return Document(tuple(branches(media, list(zip(prompts, texts)))), name)

  def _page(self, texts, images, bad):
    if len(texts) != len(images):
      raise BadDocument('bad_row', f'{len(texts)} texts, {len(images)} images')
    parts, count = [], 0
    for text, image in zip(texts, images):
      if image is not None:
        try:
          parts.append(Image(self._bytes(image)))
          count += 1
        except BadDocument as error:
          bad.append(error)
      if text is not None:
        parts.append(text)
    if count < self.min_images:
      raise BadDocument('few_images', f'{count}')
    return interleaved(parts)

  def _bytes(self, value: Any) -> bytes:
    """The file of an image: as it is, or from the folder."""
    if isinstance(value, dict):
      value = value.get('bytes') or value.get('path')
    if isinstance(value, bytes) and value:
      return value
    if not isinstance(value, str) or not value:
      raise BadDocument('no_image', 'neither bytes nor a path')
    remote = re.match(r'https?://', value)
    if self.images is None:
      if remote:
        raise BadDocument('image_remote', value[:80])
      raise BadDocument(
        'missing_file', f'{value!a}: name the folder by the option images'
      )
    if remote:
      value = hashlib.sha256(value.encode()).hexdigest()
    return Folder(self.images).read(value)


@dataclasses.dataclass(frozen=True)
class _Footer:
  rows: tuple[int, ...]  # of each row group
  error: BadDocument | None


@dataclasses.dataclass(frozen=True)
class _Layout:
  image: str | None
  text: str
  prompt: str | None


def _rows(value: Any) -> Any:
  """Turns that are kept as lists by name, {'role': [...], 'content': [...]}, as turns."""
  if (
    isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values())
  ):
    return [dict(zip(value, row)) for row in zip(*value.values())]
  return value


def _holds_files(kind: Any) -> bool:
  """Whether a column is of images as `datasets` keeps them, or of a list of them."""
  import pyarrow as pa

  if pa.types.is_list(kind) or pa.types.is_large_list(kind):
    kind = kind.value_type
  names = {kind.field(i).name for i in range(kind.num_fields)} if (
    pa.types.is_struct(kind)
  ) else set()  # fmt: skip
  return {'bytes', 'path'} <= names


@contextlib.contextmanager
def opened(path: str) -> Iterator[Any]:
  """A `pyarrow.parquet.ParquetFile`.

  Raises:
    BadDocument: 'bad_file'.
    OSError: it isn't there or can't be read.
  """
  import pyarrow as pa
  import pyarrow.parquet as pq

  with paths.open_file(path) as file:
    try:
      parquet = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
      raise BadDocument('bad_file', f'{path}: {str(error).splitlines()[0]}') from None
    with parquet:
      yield parquet


def _batches(parquet, group, columns, file):
  import pyarrow as pa

  try:
    yield from parquet.iter_batches(_ROWS, row_groups=[group], columns=columns)
  except (pa.ArrowException, OSError) as error:
    raise BadDocument('bad_file', f'{file}: {str(error).splitlines()[0]}') from None
