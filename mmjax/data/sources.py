"""Where documents come from. A source gives (split, Document) one after the other.

  easy_vqa     the package easy-vqa: one image, then all its questions and answers
  jsonl:FILE   a line per document, media paths relative to the file:
               {"spans": [{"image": "cat.png"}, {"text": "what is it?"},
                          {"text": " a cat", "trained": true}],
                "id": "7", "split": "train", "meta": {"types": ["animal"]}}
               (spans may have "branch": 1, ... see `data.document`)
  tfds:NAME    TensorFlow Datasets through `tfds.data_source`, without TensorFlow
  html:DIR     pages of text and figures, as of offline manuals; see `data.html`
  emoji:DIR    pictures and names of emoji from npm's packages in DIR, see `data.emoji`

  webdataset:FILES, parquet:FILES, llava:FILES, mmc4:FILES, coco:CAPTIONS and
  vqa2:QUESTIONS,ANNOTATIONS: sets as they are published; see the files of those names.
  FILES is a pattern, also of gs:// and s3://, see `data.paths`.

What can't become a document comes as (split, BadDocument), to be counted.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mmjax.data.coco import Coco
from mmjax.data.document import Audio, BadDocument, Document, Image, Text, Video
from mmjax.data.emoji import Emoji
from mmjax.data.html import Html
from mmjax.data.llava import Llava
from mmjax.data.mmc4 import Mmc4
from mmjax.data.parquet import Parquet
from mmjax.data.vqa2 import Vqa2
from mmjax.data.webdataset import WebDataset

Record = tuple[str, Document | BadDocument]


@dataclasses.dataclass(frozen=True)
class EasyVqa:
  """PyPI easy-vqa 1.0: 5,000 images 64 x 64 of one shape, 48,248 questions."""

  def fingerprint(self) -> str | None:
    """What the data is made from, to notice when that changes; None = unknown."""
    import importlib.metadata

    try:
      return 'easy-vqa ' + importlib.metadata.version('easy-vqa')
    except importlib.metadata.PackageNotFoundError:
      return None

  def total(self, splits: Sequence[str] | None = None) -> int | None:
    """How many records those splits have, where that is known beforehand."""
    sizes = {'train': 4000, 'test': 1000}
    return sum(sizes.get(split, 0) for split in splits or sizes)

  def records(self, splits: Sequence[str] | None = None) -> Iterator[Record]:
    """Documents of the named splits, or of all.

    Raises:
      ValueError: the source can't be read at all.
    """
    try:
      import easy_vqa
    except ImportError:
      raise ValueError(
        "source easy_vqa needs its package: pip install 'mmjax[quickstart]'"
      ) from None
    for split in ('train', 'test'):
      if splits is not None and split not in splits:
        continue
      questions, answers, images = getattr(easy_vqa, f'get_{split}_questions')()
      paths = getattr(easy_vqa, f'get_{split}_image_paths')()
      turns = {}
      for question, answer, image in zip(questions, answers, images):
        turns.setdefault(image, []).append((question, answer))
      for image, pairs in sorted(turns.items()):
        spans = [Image(pathlib.Path(paths[image]).read_bytes())]
        for turn, (question, answer) in enumerate(pairs, start=1):
          spans += [Text(question, False, turn), Text(f' {answer}', True, turn)]
        types = [question_type(*pair) for pair in pairs]
        yield split, Document(tuple(spans), f'{split}/{image}', {'types': types})


def question_type(question: str, answer: str) -> str:
  """'shape', 'color', 'yes/no: shape' or 'yes/no: color' of an easy-VQA question."""
  if answer not in ('yes', 'no'):
    return 'color' if 'what color' in question or 'the color' in question else 'shape'
  about_shape = re.search('circle|rectangle|triangle', question)
  return 'yes/no: shape' if about_shape else 'yes/no: color'


@dataclasses.dataclass(frozen=True)
class Jsonl:
  """A file of one JSON document per line; see the top of this file.

  Paths that leave the file's folder (also through links) are refused. Sound and
  video files are carried as they are: {"audio": path, "rate": 16000} and
  {"video": path, "fps": 25}, or {"video": [path, ...], "fps": 25} of images.
  """

  file: str

  def fingerprint(self) -> str | None:
    try:
      with open(self.file, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError:
      return None

  def total(self, splits: Sequence[str] | None = None) -> int | None:
    return None

  def records(self, splits: Sequence[str] | None = None) -> Iterator[Record]:
    path = pathlib.Path(self.file)
    if not path.is_file():
      raise ValueError(f'source {path}: no such file')
    with open(path, 'rb') as file:
      for number, line in enumerate(file, 1):
        if not line.strip():
          continue
        split = 'train'
        try:
          tree = _object(line)
          split = tree.get('split', split)
          if not isinstance(split, str) or not re.fullmatch(r'\w[\w.-]*', split):
            raise BadDocument('bad_split', f'{split!a}')
          if splits is None or split in splits:
            yield split, _line(tree, path.parent.resolve(), str(number))
        except BadDocument as error:
          where = f'{path.name} line {number}: {error.message}'
          yield str(split), BadDocument(error.reason, where)


def _object(line: bytes) -> dict[str, Any]:
  try:
    tree = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise BadDocument('bad_json', str(error)) from None
  if not isinstance(tree, dict) or not isinstance(tree.get('spans'), list):
    raise BadDocument('bad_line', 'no object with "spans"')
  return tree


def _line(tree: dict[str, Any], folder: pathlib.Path, name: str) -> Document:
  """The document of a line.

  Raises:
    BadDocument: 'bad_line', 'unknown_span', 'path_outside' or 'missing_file'.
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


def _file(folder: pathlib.Path, name: str) -> bytes:
  try:
    path = (folder / name).resolve()
    if pathlib.PurePath(name).is_absolute() or not path.is_relative_to(folder):
      raise BadDocument('path_outside', f'{name!a} leaves the folder of the file')
    return path.read_bytes()
  except BadDocument:
    raise
  except (OSError, ValueError, RuntimeError) as error:
    raise BadDocument('missing_file', f'{name!a}: {error}') from None


@dataclasses.dataclass(frozen=True)
class Tfds:
  """A TensorFlow dataset, stored as ArrayRecord; features named become spans.

  name: as for `tfds.data_source`, e.g. 'coco_captions:1.1.0'.
  data_dir: where it is kept; TFDS's default if not given.
  image: feature of the image or images, which come first.
  prompt: feature of a text (or texts) that isn't trained.
  text: feature of the trained text (or texts, one per prompt). A class label is
    read as its name. After a prompt, a space is put in front.

  Several texts about the same media are branches: none sees another.
  """

  name: str
  data_dir: str | None = None
  image: str | None = 'image'
  prompt: str | None = None
  text: str = 'text'

  def fingerprint(self) -> str | None:
    return None  # the version is part of the name; asking would import TFDS

  def total(self, splits: Sequence[str] | None = None) -> int | None:
    return None

  def records(self, splits: Sequence[str] | None = None) -> Iterator[Record]:
    import tensorflow_datasets as tfds

    name = f'tfds:{self.name}'
    try:
      builder = tfds.builder(
        self.name, data_dir=self.data_dir, file_format='array_record'
      )
    except tfds.core.DatasetNotFoundError as error:
      raise ValueError(f'{name}: {str(error).splitlines()[0]}') from None
    features = builder.info.features
    wanted = [f for f in (self.image, self.prompt, self.text) if f]
    for feature in wanted:
      if feature not in features:
        have = ', '.join(features)
        raise ValueError(f'{name} has no feature {feature!r}; there are: {have}')
    builder.download_and_prepare()
    # Files stay as they are; those inside a Sequence TFDS can't but decode.
    one = self.image and isinstance(features[self.image], tfds.features.Image)
    decoders = {self.image: tfds.decode.SkipDecoding()} if one else None
    for split in builder.info.splits:
      if splits is not None and split not in splits:
        continue
      data = builder.as_data_source(split, decoders=decoders)
      for i in range(len(data)):
        yield split, self._document(data, i, features, f'{split}/{i}')

  def _document(self, data, i, features, name) -> Document | BadDocument:
    try:
      record = data[i]
    except Exception as error:  # TFDS decodes all features; what fails, and how, varies
      return BadDocument('bad_record', f'{name}: {str(error).splitlines()[:1]}')
    spans = [Image(_pixels(one)) for one in _several(record, self.image)]
    prompts = _texts(record, features, self.prompt)
    texts = _texts(record, features, self.text)
    if prompts and len(prompts) != len(texts):
      return BadDocument(
        'bad_record', f'{name}: {len(prompts)} prompts, {len(texts)} texts'
      )
    for j, text in enumerate(texts):
      branch = j + 1 if self.image and len(texts) > 1 else 0
      if prompts:
        spans += [Text(prompts[j], False, branch), Text(f' {text}', True, branch)]
      else:
        spans.append(Text(text, True, branch))
    return Document(tuple(spans), name)


def _several(record, feature) -> list[Any]:
  value = record[feature] if feature else []
  if isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype == object):
    return list(value)
  return [value]


def _pixels(value):
  return value if isinstance(value, bytes) else np.asarray(value)


def _texts(record, features, feature) -> list[str]:
  if not feature:
    return []
  of = getattr(features[feature], 'feature', features[feature])  # inside a Sequence
  names = getattr(of, 'names', None)
  return [
    value.decode(errors='replace') if isinstance(value, bytes)
    else names[int(value)] if names else str(value)
    for value in np.atleast_1d(np.asarray(record[feature], object))
  ]  # fmt: skip


# Name -> class; a spec is NAME or NAME:ARGUMENT.
SOURCES = {
  'coco': Coco,
  'easy_vqa': EasyVqa,
  'emoji': Emoji,
  'html': Html,
  'jsonl': Jsonl,
  'llava': Llava,
  'mmc4': Mmc4,
  'parquet': Parquet,
  'tfds': Tfds,
  'vqa2': Vqa2,
  'webdataset': WebDataset,
}


def build(spec: str, **options: Any) -> Any:
  """The source of a spec, e.g. 'easy_vqa' or 'jsonl:data.jsonl'.

  Raises:
    ValueError: an unknown source or option, a missing or needless argument.
  """
  name, _, argument = spec.partition(':')
  if name not in SOURCES:
    raise ValueError(f'source {spec!r}; choose among: {", ".join(SOURCES)}')
  cls = SOURCES[name]
  fields = [f.name for f in dataclasses.fields(cls)]
  if bool(fields) != bool(argument):
    form = f'{name}:{fields[0].upper()}' if fields else name
    raise ValueError(f'source {spec!r} should read {form}')
  unknown = sorted(set(options) - set(fields[1:]))
  if unknown:
    have = ', '.join(fields[1:]) or 'none'
    raise ValueError(f'source {name} has no option {unknown[0]!r}; there are: {have}')
  return cls(argument, **options) if fields else cls()
