"""TensorFlow Datasets through `tfds.data_source`, stored as ArrayRecord, no TensorFlow.

FeaturesDict(image=Image, question=Text, answer=ClassLabel)   image, prompt, text
-> Document(Image, Text('what is it?'), Text(' cat', trained=True))
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mmjax.data.document import BadDocument, Document, Image, Text
from mmjax.data.source import Record, Source, parse_range, ranges

_PIECE = 512  # records


@dataclasses.dataclass(frozen=True)
class Tfds(Source):
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

  # The version is part of the name; to ask for a fingerprint would import TFDS.

  def pieces(self, splits: Sequence[str] | None = None) -> Sequence[str]:
    builder = _builder(self)
    builder.download_and_prepare()
    return [
      piece
      for split, info in builder.info.splits.items()
      if splits is None or split in splits
      for piece in ranges(split, info.num_examples, _PIECE)
    ]

  def read(self, piece: str, splits: Sequence[str] | None = None) -> Iterator[Record]:
    split, start, end = parse_range(piece)
    data, features = _data(self, split)
    for i in range(start, end):
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


# A process opens it once, not once for each of its pieces.
@functools.lru_cache(2)
def _builder(source: Tfds):
  import tensorflow_datasets as tfds

  name = f'tfds:{source.name}'
  try:
    builder = tfds.builder(
      source.name, data_dir=source.data_dir, file_format='array_record'
    )
  except tfds.core.DatasetNotFoundError as error:
    raise ValueError(f'{name}: {str(error).splitlines()[0]}') from None
  features = builder.info.features
  for feature in (source.image, source.prompt, source.text):
    if feature and feature not in features:
      have = ', '.join(features)
      raise ValueError(f'{name} has no feature {feature!r}; there are: {have}')
  return builder


@functools.lru_cache(4)
def _data(source: Tfds, split: str):
  """(records of a split, features). Files stay files; those in a Sequence can't."""
  import tensorflow_datasets as tfds

  builder = _builder(source)
  features = builder.info.features
  one = source.image and isinstance(features[source.image], tfds.features.Image)
  decoders = {source.image: tfds.decode.SkipDecoding()} if one else None
  return builder.as_data_source(split, decoders=decoders), features


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
