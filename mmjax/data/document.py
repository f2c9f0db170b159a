"""A document: text, images, audio and video in the order they are met.

  Document((Image(png), Text('what shape is it?', False), Text(' circle', True)))

`trained` says whether the loss counts the span: answers yes, prompts no.
`branch` says who sees it: spans of branch 0, the trunk, are seen by all that
follows; those of a branch 1, 2, ... only inside that branch. So one image, held
once, serves any number of questions or captions that know nothing of each other:

  Document((Image(png), Text('what shape?', branch=1), Text(' circle', True, 1),
                        Text('is it red?', branch=2), Text(' no', True, 2)))

Captions, dialogues, web pages and few-shot prompts are all Documents; no task
has a format of its own. On disk a document is one msgpack map,

  {version, id, meta, spans: [['text', branch, text, trained], ['image', 0, bytes], ...]}

in which arrays are {dtype, shape, data}, and nothing can carry code. Text that is
`special` has a fifth field, true.
"""

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

VERSION = 2
KINDS = ('image', 'audio', 'video')  # `Index.item_kind` counts in this order
_DTYPES = ('|u1', '<i2', '<f4')  # of arrays on disk


class BadDocument(ValueError):
  """A document that can't be used; `reason` is a short slug to count it under."""

  def __init__(self, reason: str, message: str = ''):
    super().__init__(reason, message)  # both, so that it pickles
    self.reason = reason
    self.message = message

  def __str__(self):
    return f'{self.reason}: {self.message}' if self.message else self.reason


@dataclasses.dataclass(frozen=True)
class Text:
  """Text; the loss counts it (and the end token that closes it) iff `trained`.

  `special` says that these are words of a template, not of the data: names of special
  tokens in them are these tokens. In all other text they are letters.
  """

  text: str
  trained: bool = False
  branch: int = 0
  special: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
  """An image: an encoded file's bytes, or u8[H, W, 3].

  `change`, from pixels to pixels, is what augmentation does to it once it is
  decoded. It leaves the native size alone, whatever the shape that comes out.
  """

  content: bytes | np.ndarray
  branch: int = 0
  change: Callable[[np.ndarray], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Audio:
  """Sound: f32 (or i16)[n] at `rate` samples per second, or an encoded file's bytes."""

  wave: np.ndarray | bytes
  rate: float
  branch: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
  """Frames u8[n, H, W, 3] at `fps` frames per second, or an encoded file's bytes.

  Frames may also be image files, a tuple of their bytes.
  """

  frames: np.ndarray | bytes | tuple[bytes, ...]
  fps: float
  branch: int = 0


Span = Text | Image | Audio | Video
_KIND_OF = {Text: 'text', Image: 'image', Audio: 'audio', Video: 'video'}


@dataclasses.dataclass(frozen=True)
class Document:
  """An ordered list of spans.

  `meta` maps names to a string or a list of strings; `meta['types']`, where
  given, names the question type of each trained Text span, in order.
  """

  spans: tuple[Span, ...]
  id: str = ''
  meta: dict[str, str | list[str]] = dataclasses.field(default_factory=dict)


def kind_of(span: Span) -> str:
  """'text', 'image', 'audio' or 'video'.

  Raises:
    BadDocument: 'unknown_span', for anything else.
  """
  kind = _KIND_OF.get(type(span))
  if kind is None:
    name = type(span).__name__
    raise BadDocument('unknown_span', f'{name} is not a Text, Image, Audio or Video')
  return kind


def check_branches(document: Document) -> None:
  """Sees to it that branches count from 1 and each stands in one place.

  Raises:
    BadDocument: 'bad_branch', or 'unknown_span'.
  """
  current, seen = 0, {0}
  for span in document.spans:
    kind_of(span)
    branch, before, current = span.branch, current, span.branch
    if branch == before:
      continue
    if branch < 0 or (branch and branch in seen):
      why = 'is negative' if branch < 0 else 'stands in two places'
      raise BadDocument('bad_branch', f'document {document.id!a}: branch {branch} {why}')
    seen.add(branch)


def encode(document: Document) -> bytes:
  """A document as bytes. Images given as arrays are stored as PNG.

  Raises:
    BadDocument: an unknown span, an array of the wrong shape or type, a text
      that isn't Unicode (lone surrogates).
  """
  try:
    return msgpack.packb(
      {
        'version': VERSION,
        'id': document.id,
        'meta': document.meta,
        'spans': [_pack(span) for span in document.spans],
      }
    )
  except UnicodeEncodeError as error:
    raise BadDocument('not_unicode', f'document {document.id!a}: {error}') from None
  except TypeError as error:
    raise BadDocument('bad_span', f'document {document.id!a}: {error}') from None


def decode(record: bytes) -> Document:
  """The document of `encode`.

  Raises:
    BadDocument: 'unreadable_record', 'unknown_version' or 'unknown_span'.
  """
  try:
    tree = msgpack.unpackb(record)
  except (ValueError, msgpack.UnpackException) as error:
    raise BadDocument('unreadable_record', f'not msgpack ({error})') from None
  if not isinstance(tree, dict) or not isinstance(tree.get('spans'), list):
    raise BadDocument('unreadable_record', 'not a document')
  if tree.get('version') != VERSION:
    raise BadDocument(
      'unknown_version', f'format {tree.get("version")!r}; this code reads {VERSION}'
    )
  try:
    spans = tuple(_unpack(span) for span in tree['spans'])
    return Document(spans, tree['id'], tree['meta'])
  except BadDocument:
    raise
  except (ValueError, TypeError, KeyError, IndexError) as error:
    raise BadDocument('unreadable_record', f'a broken span ({error})') from None


def _pack(span: Span) -> list[Any]:
  kind, branch = kind_of(span), int(span.branch)
  if kind == 'text':
    fields = ['text', branch, span.text, bool(span.trained)]
    return [*fields, True] if span.special else fields
  if kind == 'image':
    content = span.content
    if span.change is not None:
      raise BadDocument('bad_span', 'an augmented image is never stored')
    return ['image', branch, content if isinstance(content, bytes) else _png(content)]
  if kind == 'audio':
    return ['audio', branch, _pack_array(span.wave, 1), float(span.rate)]
  images = isinstance(span.frames, tuple)
  frames = list(span.frames) if images else _pack_array(span.frames, 4)
  return ['video', branch, frames, float(span.fps)]


def _unpack(fields: list[Any]) -> Span:
  kind, branch, *rest = fields
  if type(branch) is not int:
    raise ValueError(f'branch {branch!a}')
  if kind == 'text':
    text, trained, *special = rest
    return Text(text, trained, branch, *special)
  if kind == 'image':
    return Image(*rest, branch=branch)
  if kind in ('audio', 'video'):
    content, rate = rest
    if kind == 'video' and isinstance(content, list):
      if not all(isinstance(frame, bytes) for frame in content):
        raise ValueError('a frame is no file')
      content = tuple(content)
    elif not isinstance(content, bytes):
      content = _unpack_array(content)
    return (Audio if kind == 'audio' else Video)(content, rate, branch)
  raise BadDocument('unknown_span', f'{kind!a}; known: text, {", ".join(KINDS)}')


def _png(image: np.ndarray) -> bytes:
  import PIL.Image

  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
    raise BadDocument(
      'bad_span', f'an image is u8[H, W, 3], not {image.dtype}{list(image.shape)}'
    )
  if 0 in image.shape:
    raise BadDocument('zero_size', f'an image of {image.shape[0]} x {image.shape[1]}')
  file = io.BytesIO()
  PIL.Image.fromarray(image).save(file, 'PNG')
  return file.getvalue()


def _pack_array(array: np.ndarray | bytes, ndim: int):
  if isinstance(array, bytes):
    return array
  dtype = array.dtype.newbyteorder('<').str
  if dtype not in _DTYPES or array.ndim != ndim:
    raise BadDocument(
      'bad_span', f'expected {ndim} axes of u8, i16 or f32, not {array.dtype}'
      f'{list(array.shape)}'
    )  # fmt: skip
  return {
    'dtype': dtype,
    'shape': list(array.shape),
    'data': array.astype(dtype, copy=False).tobytes(),
  }


def _unpack_array(tree: dict[str, Any]) -> np.ndarray:
  if tree['dtype'] not in _DTYPES:
    raise ValueError(f'array of {tree["dtype"]!a}')
  return np.frombuffer(tree['data'], tree['dtype']).reshape(tree['shape'])
