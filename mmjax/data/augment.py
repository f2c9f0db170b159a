"""Augmentation: what may change from epoch to epoch without changing what is true.

  image  question  answer      ->      image (mirrored)  question  answer

Each is a frozen dataclass with one `map`, a pure function of the document and a
generator seeded with (seed, document, epoch); so a resumed run sees the same.
None changes how many slots, targets or patches a document needs: the pack plan
is made from lengths alone.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np
import PIL.Image

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
    return _each_image(document, lambda image: image[:, ::-1])


@dataclasses.dataclass(frozen=True)
class Warp:
  """Moves, scales, stretches and turns each image a little; what comes in is white.

  move: most, as a share of the side; scale: most of both sides, as a factor, and
  stretch of one side beside the other; turn: most, in degrees.
  """

  move: float = 0.1
  scale: float = 1.25
  stretch: float = 1.1
  turn: float = 12.0

  def map(self, document: Document, rng: np.random.Generator) -> Document:
    return _each_image(document, lambda image: self._warp(image, rng))

  def _warp(self, image, rng):
    size = np.array(image.shape[1::-1])
    angle = np.deg2rad(self.turn) * rng.uniform(-1, 1)
    both, one = self.scale ** rng.uniform(-1, 1), self.stretch ** rng.uniform(-1, 1)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    back = turn @ np.diag([one / both, 1 / (one * both)])  # from new to old places
    middle = (size - 1) / 2
    offset = middle - back @ (middle + self.move * size * rng.uniform(-1, 1, 2))
    made = PIL.Image.fromarray(image).transform(
      tuple(size.tolist()),
      PIL.Image.Transform.AFFINE,
      (*back[0], offset[0], *back[1], offset[1]),
      PIL.Image.Resampling.BILINEAR,
      fillcolor=(255, 255, 255),
    )
    return np.asarray(made)


@dataclasses.dataclass(frozen=True)
class Colour:
  """Changes each image's colours a little.

  gain: most of each channel, as a factor; saturation, contrast: most, as factors.
  """

  gain: float = 1.15
  saturation: float = 1.6
  contrast: float = 1.25

  def map(self, document: Document, rng: np.random.Generator) -> Document:
    return _each_image(document, lambda image: self._paint(image, rng))

  def _paint(self, image, rng):
    # Darkness, so that white, which is mostly ground, stays white.
    dark = 255 - image.astype(np.float32)
    dark *= (self.gain ** rng.uniform(-1, 1, 3)).astype(np.float32)
    grey = dark.mean(-1, keepdims=True)
    dark = grey + np.float32(self.saturation ** rng.uniform(-1, 1)) * (dark - grey)
    dark *= np.float32(self.contrast ** rng.uniform(-1, 1))
    return (255.5 - np.clip(dark, 0, 255)).astype(np.uint8)


def _each_image(document: Document, change: Callable) -> Document:
  spans = tuple(
    dataclasses.replace(span, content=change(media.pixels(span)))
    if isinstance(span, Image)
    else span
    for span in document.spans
  )
  return dataclasses.replace(document, spans=spans)


AUGMENTATIONS = {'mirror': Mirror, 'warp': Warp, 'colour': Colour}


def build(names: Sequence[str]) -> tuple[Mirror | Warp | Colour, ...]:
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
