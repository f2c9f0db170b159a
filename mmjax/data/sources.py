"""Where documents come from, by name. What a source is stands in `data.source`.

easy_vqa     the package easy-vqa: one image, then all its questions and answers
jsonl:FILE   a line per document, media paths relative to the file; see `data.jsonl`
tfds:NAME    TensorFlow Datasets through `tfds.data_source`, without TensorFlow
html:DIR     pages of text and figures, as of offline manuals; see `data.html`
emoji:DIR    pictures and names of emoji from npm's packages in DIR, see `data.emoji`

webdataset:FILES, parquet:FILES, llava:FILES, mmc4:FILES, coco:CAPTIONS and
vqa2:QUESTIONS,ANNOTATIONS: sets as they are published; see the files of those names.
FILES is a pattern, also of gs:// and s3://, see `data.paths`.
"""

import dataclasses
from typing import Any

from mmjax.data.coco import Coco
from mmjax.data.easy_vqa import EasyVqa
from mmjax.data.emoji import Emoji
from mmjax.data.html import Html
from mmjax.data.jsonl import Jsonl
from mmjax.data.llava import Llava
from mmjax.data.mmc4 import Mmc4
from mmjax.data.parquet import Parquet
from mmjax.data.source import Source
from mmjax.data.tfds import Tfds
from mmjax.data.vqa2 import Vqa2
from mmjax.data.webdataset import WebDataset

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


def build(spec: str, **options: Any) -> Source:
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
