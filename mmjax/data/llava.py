"""Dialogues about images in JSON, as LLaVA (2304.08485) and its kin publish them.

  [{"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
    "conversations": [{"from": "human", "value": "<image>\\nWhat is on the bus?"},
                      {"from": "gpt", "value": "An advertisement."}, ...]}, ...]

  [{"images": ["a.jpg", "b.jpg"],
    "messages": [{"role": "user", "content": "<image><image>Which is older?"}, ...]}, ...]

An image stands where its mark stands. All turns are one document without branches: what
was said before is seen. What the assistant says is trained.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

from mmjax.data import paths, zips
from mmjax.data.annotations import Annotations
from mmjax.data.document import BadDocument, Document
from mmjax.data.folder import Folder
from mmjax.data.layouts import dialogue
from mmjax.data.source import Found


@dataclasses.dataclass(frozen=True)
class Llava(Annotations):
  """Dialogues of JSON files (a list), or of .jsonl or .jsonl.zip (a line each).

  files: a pattern, see `paths.expand`.
  images: the folder (or .tar or .zip) of the images; by default that of the file.
  split, test_share: see `source.Files`.

  Dropped by reason: 'missing_file', 'path_outside', 'image_remote', 'bad_turn',
  'bad_json', and what `layouts.dialogue` says, 'image_marks' before all.
  """

  files: str
  images: str | None = None
  split: str | None = None
  test_share: float = 0.0

  def sets(self) -> list[tuple[str, ...]]:
    return [files for files in super().sets() if not _is_lines(files[0])]

  def pieces(self, splits=None) -> list[str]:
    lines = [f for f in paths.expand(self.files) if _is_lines(f)]
    whole = super().pieces(splits) if self.sets() or not lines else []
    return whole + [f'{f}#lines' for f in lines if self.may_hold(f, splits)]

  def total(self, splits=None) -> int | None:
    if any(_is_lines(file) for file in paths.expand(self.files)):
      return None
    return super().total(splits)

  @staticmethod
  def entries(*trees: Any) -> list[Any]:
    (tree,) = trees
    if not isinstance(tree, list):
      raise BadDocument('bad_json', 'no list of dialogues')
    return tree

  def found(self, piece: str, wanted: Callable[[str], bool]) -> Iterator[Found]:
    if not piece.endswith('#lines'):
      yield from super().found(piece, wanted)
      return
    file = self.file(piece)
    for number, line in json_lines(file):
      name = f'{self.name(file)}#{number}'
      if not wanted(name):
        continue
      try:
        if isinstance(line, BadDocument):
          raise line
        for one in self.documents(line, file, name):
          yield name, one
      except BadDocument as error:
        yield name, BadDocument(error.reason, f'{name}: {error.message}')

  def documents(self, entry: Any, file: str, name: str) -> Iterator[Document]:
    if not isinstance(entry, dict):
      raise BadDocument('bad_turn', 'no object with "conversations" or "messages"')
    turns = entry.get('conversations', entry.get('messages'))
    if not isinstance(turns, list) or not turns:
      have = ', '.join(entry)[:80]
      raise BadDocument(
        'bad_turn', f'no "conversations" or "messages"; there are: {have}'
      )
    if entry.get('video') or entry.get('videos'):
      raise BadDocument('unsupported_video', 'a dialogue about a video')
    images = entry.get('image', entry.get('images')) or []
    images = images if isinstance(images, list) else [images]
    folder = Folder(paths.parent(file) if self.images is None else self.images)

    def read(image):
      if not isinstance(image, str):
        raise BadDocument('missing_file', f'{str(image)[:60]!a} names no file')
      return folder.read(image)

    spans, roles = dialogue(turns, images, read)
    yield Document(tuple(spans), name, {'roles': roles})


def _is_lines(file: str) -> bool:
  return file.endswith(('.jsonl', '.ndjson', '.jsonl.zip'))


def json_lines(file: str) -> Iterator[tuple[int, Any]]:
  """(number from 1, value or BadDocument) of each line that isn't empty.

  file: of lines, or NAME.zip of such, see `data.zips`.

  Bad are 'bad_json', and what `zips.lines` says.

  Raises:
    OSError: the file isn't there or can't be read.
  """
  if file.endswith('.zip'):
    lines = contextlib.closing(zips.lines(file))
  else:
    lines = paths.open_file(file)
  with lines as lines:
    for number, line in enumerate(lines, 1):
      if isinstance(line, BadDocument):
        yield number, line
      elif line.strip():
        try:
          yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
          yield number, BadDocument('bad_json', str(error))
