"""A file of one JSON document per line, media in files beside it.

  {"spans": [{"image": "cat.png"}, {"text": "what is it?"},
             {"text": " a cat", "trained": true}],
   "id": "7", "split": "train", "meta": {"types": ["animal"]}}

Spans may have "branch": 1, ... (see `data.document`); "id" is the line's number if it
isn't given, "split" is train. Paths are relative to the file, which may be in a bucket,
see `data.paths`.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from mmjax.data import paths
from mmjax.data.document import Audio, BadDocument, Document, Image, Text, Video
from mmjax.data.source import Record, Source, parse_range

_LINES, _BYTES = 512, 2**22  # a piece ends after so many of either


@dataclasses.dataclass(frozen=True)
class Jsonl(Source):
  """A file of one JSON document per line; see the top of this file.

  Paths that leave the file's folder (also through links) are refused. Sound and
  video files are carried as they are: {"audio": path, "rate": 16000} and
  {"video": path, "fps": 25}, or {"video": [path, ...], "fps": 25} of images.
  """

  file: str

  def fingerprint(self) -> str | None:
    """A hash of the file; None = it can't be read. The media aren't looked at."""
    try:
      return self._scan[0]
    except ValueError:
      return None

  def pieces(self, splits: Sequence[str] | None = None) -> Sequence[str]:
    return self._scan[1]

  @functools.cached_property
  def _scan(self) -> tuple[str, list[str]]:
    """(hash of the file, pieces 'line FIRST bytes START:END'), in one reading."""
    if not paths.is_file(self.file):
      raise ValueError(f'source {self.file}: no such file')
    digest, pieces = hashlib.sha256(), []
    first, start, end = 1, 0, 0
    with paths.open_file(self.file) as file:
      for number, line in enumerate(file, 1):
        digest.update(line)
        end += len(line)
        if number - first + 1 == _LINES or end - start >= _BYTES:
          pieces.append(f'line {first} bytes {start}:{end}')
          first, start = number + 1, end
    if end > start:
      pieces.append(f'line {first} bytes {start}:{end}')
    return digest.hexdigest(), pieces

  def read(self, piece: str, splits: Sequence[str] | None = None) -> Iterator[Record]:
    name, start, end = parse_range(piece)
    content = paths.read(self.file, start, end - start)
    if len(content) < end - start:
      raise ValueError(f'source {self.file}: it was cut while it was read')
    for number, line in enumerate(io.BytesIO(content), int(name.split()[1])):
      if not line.strip():
        continue
      split = 'train'
      try:
        tree = _object(line)
        split = tree.get('split', split)
        if not isinstance(split, str) or not re.fullmatch(r'\w[\w.-]*', split):
          raise BadDocument('bad_split', f'{split!a}')
        if splits is None or split in splits:
          yield split, _line(tree, paths.parent(self.file), str(number))
      except BadDocument as error:
        where = f'{os.path.basename(self.file)} line {number}: {error.message}'
        yield str(split), BadDocument(error.reason, where)


def _object(line: bytes) -> dict[str, Any]:
  try:
    tree = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise BadDocument('bad_json', str(error)) from None
  if not isinstance(tree, dict) or not isinstance(tree.get('spans'), list):
    raise BadDocument('bad_line', 'no object with "spans"')
  return tree


def _line(tree: dict[str, Any], folder: str, name: str) -> Document:
  """The document of a line.

  Raises:
    BadDocument: 'bad_line', 'unknown_span', 'path_outside', 'image_remote' (a URL) or
      'missing_file'.
  """
  meta = tree.get('meta', {})
  if not isinstance(meta, dict) or not all(map(_is_meta, meta.values())):
    raise BadDocument('bad_line', '"meta" maps names to strings or lists of strings')
  spans = []
  for span in tree['spans']:
    kinds = {'text', 'image', 'audio', 'video'} & set(
      span if isinstance(span, dict) else ()
    )
    if len(kinds) != 1:
      raise BadDocument('unknown_span', f'{json.dumps(span)[:80]}: one of text, image, '
                        'audio, video')  # fmt: skip
    kind = kinds.pop()
    value, trained = span[kind], span.get('trained', False)
    files = value if kind == 'video' and isinstance(value, list) else [value]
    if not all(isinstance(f, str) for f in files) or not isinstance(trained, bool):
      raise BadDocument('bad_line', f'{kind} must be a string, "trained" true or false')
    branch = span.get('branch', 0)
    if type(branch) is not int or branch < 0:
      raise BadDocument('bad_line', f'"branch" must be 0, 1, ..., not {branch!a}')
    if kind == 'text':
      if any('\ud800' <= c <= '\udfff' for c in value):
        raise BadDocument('not_unicode', f'{value[:40]!a} holds lone surrogates')
      spans.append(Text(value, trained, branch))
      continue
    content = tuple(_file(folder, name) for name in files)
    content = content if files is value else content[0]
    rate = span.get({'audio': 'rate', 'video': 'fps'}.get(kind), 0)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
      raise BadDocument('bad_line', f'{kind}: rate and fps are numbers')
    spans.append(
      Image(content, branch) if kind == 'image' else
      (Audio if kind == 'audio' else Video)(content, rate, branch)
    )  # fmt: skip
  return Document(tuple(spans), str(tree.get('id', name)), meta)


def _is_meta(value) -> bool:
  if isinstance(value, list):
    return all(isinstance(one, str) for one in value)
  return isinstance(value, str)


def _file(folder: str, name: str) -> bytes:
  try:
    return paths.read(paths.inside(folder, name))
  except BadDocument:
    raise
  except (OSError, ValueError, RuntimeError) as error:
    raise BadDocument('missing_file', f'{name!a}: {error}') from None
