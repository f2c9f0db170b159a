"""What a user lets in: rules over the images and texts of documents, and their places.

  Rules(min_side=64, max_aspect=3.0, min_images=1, place_images='previous')

  [text] [image 40 x 40] [text]    ->  [text] [text]  'image_small'
                                   ->  nothing left to look at: dropped, 'few_images'

A rule about an image or a text span takes it out of its document, if the document can do
without: if all its texts are trained and it has no branches, as with web pages. Of
questions, dialogues and the like, which make no sense in part, the whole document is
dropped. What a rule takes out or drops is counted under its reason.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mmjax.data import media
from mmjax.data.document import BadDocument, Document, Image, Text, kind_of
from mmjax.data.source import share_of
from mmjax.names import closest

Scorer = Callable[[np.ndarray, str], float]  # (u8[H, W, 3], text) -> similarity

PLACES = ('previous', 'after')
_SPAN = {  # of an image or a text span
  'min_side': 'image_small',
  'max_side': 'image_large',
  'max_aspect': 'image_thin',
  'min_similarity': 'image_unlike_text',
  'unique_images': 'image_repeated',
  'min_span_words': 'short_span',
  'max_span_words': 'long_span',
}
_DOCUMENT = {
  'min_words': 'few_words',
  'max_words': 'many_words',
  'min_characters': 'few_characters',
  'max_characters': 'many_characters',
  'min_images': 'few_images',
  'max_images': 'many_images',
  'max_words_per_image': 'much_text',
}
REASONS = frozenset({*_SPAN.values(), *_DOCUMENT.values()})


@dataclasses.dataclass(frozen=True)
class Rules:
  """Limits (inclusive; None = no limit), each with the reason it is counted under.

  Of an image, by its header; taken out of its document (see the top of this file):
    min_side, max_side: pixels of the shorter, the longer side. 'image_small',
      'image_large'
    max_aspect: long : short side. 'image_thin'
    min_similarity: what the scorer says of it and its text, which is the next text of
      the document, or if none follows, the one before. NaN is below all limits; an
      image without any text stays. 'image_unlike_text'
    unique_images: of images with the same bytes, the first of all documents that are
      kept stays, in the order of the source, over all splits. 'image_repeated'
  Of a text span, words being what blanks separate; taken out likewise:
    min_span_words, max_span_words: 'short_span', 'long_span'
  Of a document, after those; it is dropped:
    min_words, max_words, min_characters, max_characters: of all its text.
      'few_words', 'many_words', 'few_characters', 'many_characters'
    min_images, max_images: 'few_images', 'many_images'; also 'few_images' when it had
      images and all were taken out
    max_words_per_image: of those that have images. 'much_text'
  Of what is kept:
    place_images: 'previous' puts each image in front of the text that stands before
      it, which then sees it; 'after' puts it behind the text that follows it. Where
      there is no such text it stays. Documents with branches or prompts stay too.
    place_share: of the documents in which images are so placed; 'previous' in half of
      them is the rule of Flamingo for pages, where an image may belong to the text on
      either side (2204.14198).
    seed: of the coins, with the document's name and text: a document's coin depends on
      nothing else.

  Raises:
    ValueError: a limit that makes no sense, an unknown place.
  """

  min_side: int | None = None
  max_side: int | None = None
  max_aspect: float | None = None
  min_similarity: float | None = None
  unique_images: bool = False
  min_span_words: int | None = None
  max_span_words: int | None = None
  min_words: int | None = None
  max_words: int | None = None
  min_characters: int | None = None
  max_characters: int | None = None
  min_images: int | None = None
  max_images: int | None = None
  max_words_per_image: float | None = None
  place_images: str | None = None
  place_share: float = 0.5
  seed: int = 0

  def __post_init__(self):
    for name in (*_SPAN, *_DOCUMENT):
      value = getattr(self, name)
      number = isinstance(value, (int, float)) and not isinstance(value, bool)
      if name == 'unique_images':
        if not isinstance(value, bool):
          raise ValueError(f'rules: unique_images={value!r} must be true or false')
      elif value is not None and not number:
        raise ValueError(f'rules: {name}={value!r} must be a number')
      elif value is not None and name != 'min_similarity' and not value >= 0:
        raise ValueError(f'rules: {name}={value!r} must be >= 0')
    if self.max_aspect is not None and self.max_aspect < 1:
      raise ValueError(f'rules: max_aspect={self.max_aspect} is long : short side, >= 1')
    for low in (name for name in (*_SPAN, *_DOCUMENT) if name.startswith('min_')):
      high = low.replace('min_', 'max_')
      least, most = getattr(self, low), getattr(self, high, None)
      if least is not None and most is not None and least > most:
        raise ValueError(f'rules: {low}={least} is above {high}={most}')
    if self.place_images not in (None, *PLACES):
      raise ValueError(
        f'rules: place_images={self.place_images!r}{closest(self.place_images, PLACES)}'
      )
    if not 0 <= self.place_share <= 1:
      raise ValueError(f'rules: place_share={self.place_share} is no share')
    if not isinstance(self.seed, int) or isinstance(self.seed, bool):
      raise ValueError(f'rules: seed={self.seed!r} must be a whole number')

  def apply(
    self, document: Document, scorer: Scorer | None = None
  ) -> tuple[Document, list[BadDocument]]:
    """The document that is kept and what was taken out of it.

    `unique_images` isn't asked here: it needs all documents.

    Raises:
      BadDocument: the document is dropped; also 'not_image' and others of `media`.
    """
    wrong = self._wrong_spans(document, scorer)
    had_images = any(isinstance(document.spans[i], Image) for i in wrong)
    document, out = self.take_out(document, wrong)
    self.check(document, had_images)
    return self._place(document), out

  def take_out(
    self, document: Document, wrong: dict[int, tuple[str, str]]
  ) -> tuple[Document, list[BadDocument]]:
    """Takes spans, {index: (reason, message)}, out of a document.

    Raises:
      BadDocument: it can't do without.
    """
    out = [BadDocument(reason, message) for reason, message in wrong.values()]
    if not out:
      return document, out
    if not can_do_without(document):
      raise out[0]
    spans = tuple(s for i, s in enumerate(document.spans) if i not in wrong)
    return dataclasses.replace(document, spans=spans), out

  def check(self, document: Document, shortened: bool) -> None:
    """Asks the limits of a document; shortened: images were taken out of it.

    Raises:
      BadDocument: it is outside.
    """
    self.check_counts(counts_of(document), shortened)

  def check_counts(self, counts: dict[str, int], shortened: bool) -> None:
    """The same of a document whose `counts_of` alone are known."""
    images, words = counts['images'], counts['words']
    if shortened and not counts['media']:
      raise BadDocument('few_images', 'all were taken out')
    for name, value in (
      ('words', words),
      ('characters', counts['characters']),
      ('images', images),
      ('words_per_image', words / images if images else None),
    ):
      least = getattr(self, f'min_{name}', None)
      most = getattr(self, f'max_{name}', None)
      what = name.replace('_', ' ')
      if value is not None and least is not None and value < least:
        raise BadDocument(_DOCUMENT[f'min_{name}'], f'{value:g} {what}')
      if value is not None and most is not None and value > most:
        raise BadDocument(_DOCUMENT[f'max_{name}'], f'{value:g} {what}')

  def _wrong_spans(self, document, scorer) -> dict[int, tuple[str, str]]:
    wrong = {}
    for i, span in enumerate(document.spans):
      kind = kind_of(span)
      found = None
      if kind == 'image':
        found = self._wrong_size(span) or self._unlike(document.spans, i, scorer)
      elif kind == 'text':
        n = len(span.text.split())
        if self.min_span_words is not None and n < self.min_span_words:
          found = 'short_span', f'{n} words'
        if self.max_span_words is not None and n > self.max_span_words:
          found = 'long_span', f'{n} words'
      if found:
        wrong[i] = found
    return wrong

  def _wrong_size(self, image: Image) -> tuple[str, str] | None:
    if self.min_side is self.max_side is self.max_aspect is None:
      return None
    content = image.content
    encoded = isinstance(content, bytes)
    height, width = media.image_size(content) if encoded else content.shape[:2]
    short, long = sorted((height, width))
    for limit, reason, beyond in (
      (self.min_side, 'image_small', lambda limit: short < limit),
      (self.max_side, 'image_large', lambda limit: long > limit),
      (self.max_aspect, 'image_thin', lambda limit: long > limit * short),
    ):
      if limit is not None and beyond(limit):
        return reason, f'{height} x {width}'
    return None

  def _unlike(self, spans, i, scorer) -> tuple[str, str] | None:
    if self.min_similarity is None or scorer is None:
      return None
    texts = [span.text for span in spans[i:] if isinstance(span, Text)]
    texts = texts or [span.text for span in spans[i::-1] if isinstance(span, Text)]
    if not texts:
      return None
    score = float(scorer(media.pixels(spans[i]), texts[0]))
    if score >= self.min_similarity:
      return None
    return 'image_unlike_text', f'{score:.3g} to {texts[0][:40]!a}'

  def _place(self, document: Document) -> Document:
    if self.place_images is None or not can_do_without(document):
      return document
    texts = [span.text for span in document.spans if isinstance(span, Text)]
    if share_of(repr((self.seed, document.id, texts))) >= self.place_share:
      return document
    step = -1 if self.place_images == 'after' else 1  # the mirrored document's previous
    spans = tuple(_before_text(document.spans[::step]))[::step]
    return dataclasses.replace(document, spans=spans)


def _before_text(spans: tuple) -> Iterator[Any]:
  """The spans, each run of images in front of the text right before it."""
  text = None
  for span in spans:
    if not isinstance(span, Image):
      if text is not None:
        yield text
      text = span if isinstance(span, Text) else None
    if not isinstance(span, Text):
      yield span
  if text is not None:
    yield text


def can_do_without(document: Document) -> bool:
  """Whether spans can be taken out: no prompts, no branches."""
  return not any(
    span.branch or (isinstance(span, Text) and not span.trained)
    for span in document.spans
  )


def counts_of(document: Document) -> dict[str, int]:
  """Words and characters of all text, images, and media of any kind."""
  texts = [span.text for span in document.spans if isinstance(span, Text)]
  return {
    'words': sum(len(text.split()) for text in texts),
    'characters': sum(map(len, texts)),
    'images': sum(isinstance(span, Image) for span in document.spans),
    'media': len(document.spans) - len(texts),
  }


def build(options: dict[str, Any]) -> Rules:
  """Rules of plain options.

  Raises:
    ValueError: an unknown one (the closest is told), or a wrong value.
  """
  names = [field.name for field in dataclasses.fields(Rules)]
  for name in options:
    if name not in names:
      raise ValueError(f'unknown rule {name!r}{closest(name, names)}')
  return Rules(**options)
