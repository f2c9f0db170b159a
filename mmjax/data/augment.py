"""Augmentation: what may change from epoch to epoch without changing what is true.

  image  question  answer      ->      image (mirrored)  question  answer

Each is a frozen dataclass with one `map`, a pure function of the document and a
generator seeded with (seed, document, epoch); so a resumed run sees the same.
None changes how many slots, targets or patches a document needs: the pack plan
is made from lengths alone.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from mmjax.data import media
from mmjax.data.document import Document, Image, Text
from mmjax.names import closest

_SIDES = re.compile(r'\b(left|right)(\b|-|most|hand|ward)', re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Mirror:
  """Mirrors all images of every other document, left to right.

  Never where a text of the document speaks of left or right.
  """

  def map(self, document: Document, rng: np.random.Generator) -> Document:
    texts = [span.text for span in document.spans if isinstance(span, Text)]
    if rng.random() < 0.5 or any(map(_SIDES.search, texts)):
      return document
    spans = tuple(
      dataclasses.replace(span, content=media.pixels(span)[:, ::-1])
      if isinstance(span, Image)
      else span
      for span in document.spans
    )
    return dataclasses.replace(document, spans=spans)


AUGMENTATIONS = {'mirror': Mirror}


def build(names: Sequence[str]) -> tuple[Mirror, ...]:
  """The augmentations of these names.

  Raises:
    ValueError: an unknown name.
  """
  for name in names:
    if name not in AUGMENTATIONS:
      raise ValueError(f'unknown augmentation {name!r}{closest(name, AUGMENTATIONS)}')
  return tuple(AUGMENTATIONS[name]() for name in names)


def apply(augmentations, document: Document, *seed: int) -> Document:
  """Maps a document through all of them; `seed` is any number of integers >= 0."""
  if augmentations:
    rng = np.random.default_rng(seed)
    for augmentation in augmentations:
      document = augmentation.map(document, rng)
  return document
