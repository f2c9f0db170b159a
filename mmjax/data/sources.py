"""Where documents come from. A source gives (split, Document) one after the other.

  easy_vqa     the package easy-vqa: one image, then all its questions and answers
  jsonl:FILE   a line per document: {"spans": [{"image": "cat.png"},
               {"text": "what is it?"}, {"text": " a cat", "trained": true}]}
  tfds:NAME    TensorFlow Datasets through `tfds.data_source`, without TensorFlow

What can't become a document comes as (split, BadDocument), to be counted.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from mmjax.data.document import BadDocument, Document, Image, Text

Record = tuple[str, Document | BadDocument]


@dataclasses.dataclass(frozen=True)
class EasyVqa:
  """PyPI easy-vqa 1.0: 5,000 images 64 x 64 of one shape, 48,248 questions."""

  def fingerprint(self) -> str | None:
    """What the data was made from, to notice when that changes."""
    import importlib.metadata

    try:
      return 'easy-vqa ' + importlib.metadata.version('easy-vqa')
    except importlib.metadata.PackageNotFoundError:
      return None

  def total(self) -> int | None:
    """How many records there are, where that is known beforehand."""
    return 5000

  def records(self) -> Iterator[Record]:
    try:
      import easy_vqa
    except ImportError:
      raise ValueError(
        "source easy_vqa needs its package: pip install 'mmjax[quickstart]'"
      ) from None
    for split in ('train', 'test'):
      questions, answers, images = getattr(easy_vqa, f'get_{split}_questions')()
      paths = getattr(easy_vqa, f'get_{split}_image_paths')()
      turns = {}
      for question, answer, image in zip(questions, answers, images):
        turns.setdefault(image, []).append((question, answer))
      for image, pairs in sorted(turns.items()):
        with open(paths[image], 'rb') as file:
          spans = [Image(file.read())]
        for question, answer in pairs:
          spans += [Text(question), Text(f' {answer}', trained=True)]
        types = [question_type(*pair) for pair in pairs]
        yield split, Document(tuple(spans), f'{split}/{image}', {'types': types})


def question_type(question: str, answer: str) -> str:
  """'shape', 'color', 'yes/no: shape' or 'yes/no: color' of an easy-VQA question."""
  if answer not in ('yes', 'no'):
    return 'color' if 'what color' in question or 'the color' in question else 'shape'
  about_shape = re.search('circle|rectangle|triangle', question)
  return 'yes/no: shape' if about_shape else 'yes/no: color'


# Name -> class; a spec is NAME or NAME:ARGUMENT.
SOURCES = {'easy_vqa': EasyVqa}


def build(spec: str, **options: Any):
  """The source of a spec, e.g. 'easy_vqa' or 'jsonl:data.jsonl'.

  Raises:
    ValueError: an unknown source, a missing or needless argument.
  """
  name, colon, argument = spec.partition(':')
  if name not in SOURCES:
    raise ValueError(f'source {spec!r}; choose among: {", ".join(SOURCES)}')
  cls = SOURCES[name]
  wants = [f.name for f in dataclasses.fields(cls)]
  if bool(wants) != bool(argument):
    form = f'{name}:{wants[0].upper()}' if wants else name
    raise ValueError(f'source {spec!r} should read {form}')
  return cls(argument, **options) if wants else cls()
