"""easy-VQA (PyPI easy-vqa 1.0): 5,000 images 64 x 64 of one shape, 48,248 questions.

  train/17   Image   Text('what shape is it?') Text(' circle')   branch 1
                     Text('is it red?')        Text(' no')       branch 2, ...

One document per image; each of its questions is a branch of its own.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Sequence

from mmjax.data.document import Document, Image, Text
from mmjax.data.source import Record, Source, parse_range, ranges

_IMAGES = {'train': 4000, 'test': 1000}
_PIECE = 500  # images


@dataclasses.dataclass(frozen=True)
class EasyVqa(Source):
  """The package easy-vqa: one image, then all its questions and answers."""

  def fingerprint(self) -> str | None:
    import importlib.metadata

    try:
      return 'easy-vqa ' + importlib.metadata.version('easy-vqa')
    except importlib.metadata.PackageNotFoundError:
      return None

  def total(self, splits: Sequence[str] | None = None) -> int | None:
    return sum(_IMAGES.get(split, 0) for split in splits or _IMAGES)

  def pieces(self, splits: Sequence[str] | None = None) -> Sequence[str]:
    _package()
    return [
      piece
      for split, total in _IMAGES.items()
      if splits is None or split in splits
      for piece in ranges(split, total, _PIECE)
    ]

  def read(self, piece: str, splits: Sequence[str] | None = None) -> Iterator[Record]:
    split, start, end = parse_range(piece)
    paths, turns = _questions(split)
    for image in sorted(turns)[start:end]:
      spans = [Image(pathlib.Path(paths[image]).read_bytes())]
      for turn, (question, answer) in enumerate(turns[image], start=1):
        spans += [Text(question, False, turn), Text(f' {answer}', True, turn)]
      types = [question_type(*pair) for pair in turns[image]]
      yield split, Document(tuple(spans), f'{split}/{image}', {'types': types})


def _package():
  try:
    import easy_vqa
  except ImportError:
    raise ValueError(
      "source easy_vqa needs its package: pip install 'mmjax[quickstart]'"
    ) from None
  return easy_vqa


@functools.lru_cache(2)
def _questions(split: str):
  """(path by image, [(question, answer), ...] by image)."""
  package = _package()
  questions, answers, images = getattr(package, f'get_{split}_questions')()
  turns = {}
  for question, answer, image in zip(questions, answers, images):
    turns.setdefault(image, []).append((question, answer))
  return getattr(package, f'get_{split}_image_paths')(), turns


def question_type(question: str, answer: str) -> str:
  """'shape', 'color', 'yes/no: shape' or 'yes/no: color' of an easy-VQA question."""
  if answer not in ('yes', 'no'):
    return 'color' if 'what color' in question or 'the color' in question else 'shape'
  about_shape = re.search('circle|rectangle|triangle', question)
  return 'yes/no: shape' if about_shape else 'yes/no: color'
