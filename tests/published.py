"""Small images, and what a source gives; for tests of the layouts that sets come in."""

import io
import json

import PIL.Image

from mmjax.data import sources
from mmjax.data.document import BadDocument, Image, Text


def picture(shade, width=8, height=6, form='PNG'):
  """An image file of one shade of red."""
  file = io.BytesIO()
  PIL.Image.new('RGB', (width, height), (shade, 0, 0)).save(file, form)
  return file.getvalue()


def found(spec, splits=None, **options):
  """({id: (split, spans)}, [BadDocument, ...]) of a source."""
  good, bad = {}, []
  for split, record in sources.build(spec, **options).records(splits):
    if isinstance(record, BadDocument):
      bad.append(record)
    else:
      assert record.id not in good
      good[record.id] = split, plain(record)
  return good, bad


def plain(document):
  """Spans as tuples that compare: a text as it is, an image by its file."""
  return [
    (s.text, s.trained, s.branch) if isinstance(s, Text) else (s.content, s.branch)
    for s in document.spans
    if isinstance(s, (Text, Image)) or 1 / 0
  ]


def reasons(bad):
  return sorted(error.reason for error in bad)


def write_json(path, tree):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(tree))
  return path
