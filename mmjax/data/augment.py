"""Augmentation: what may change from epoch to epoch without changing what is true.

  image  question  answer      ->      image (mirrored)  question  answer

Each is a frozen dataclass with one `map`, a pure function of the document and a
generator seeded with (seed, document, epoch); so a resumed run sees the same.
None changes how many slots, targets or patches a document needs: the pack plan
is made from lengths alone.

What happens to an image is drawn here and done later, when it is decoded
(`Image.change`): what comes out, whatever its shape, is resized to the grid of the
native size. So a crop is a view of the pixels, and they are resized once.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps

from mmjax.data.document import Document, Image, Text
from mmjax.names import closest, pick

_SIDES = re.compile(r'\b(left|right)(\b|-|most|hand|ward)', re.IGNORECASE)
_WHITE, _GREY = (255, 255, 255), (128, 128, 128)


@dataclasses.dataclass(frozen=True)
class Mirror:
  """Mirrors all images of every other document, left to right.

  Never where a text of the document speaks of left or right.
  """

  def map(self, document: Document, rng: np.random.Generator) -> Document:
    texts = [span.text for span in document.spans if isinstance(span, Text)]
    if rng.random() < 0.5 or any(map(_SIDES.search, texts)):
      return document
    return _each_image(document, lambda: _mirror)


def _mirror(image):
  return image[:, ::-1]


@dataclasses.dataclass(frozen=True)
class Crop:
  """Random resized crop (GoogLeNet, 1409.4842, section 6) of each image.

  scale: least and most share of the area that is kept.
  ratio: least and most factor by which the aspect ratio is stretched.
  """

  scale: tuple[float, float] = (0.5, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)

  def __post_init__(self):
    _check_range('crop', 'scale', self.scale, 1)
    _check_range('crop', 'ratio', self.ratio, np.inf)

  def map(self, document: Document, rng: np.random.Generator) -> Document:
    return _each_image(document, lambda: self._draw(rng))

  def _draw(self, rng):
    area, stretch = rng.uniform(*self.scale), np.exp(rng.uniform(*np.log(self.ratio)))
    share = np.minimum([np.sqrt(area * stretch), np.sqrt(area / stretch)], 1)
    return functools.partial(_crop, share=share, place=rng.uniform(size=2))


def _crop(image, share, place):
  size = np.array(image.shape[:2])
  kept = np.maximum((share * size + 0.5).astype(int), 1)
  y, x = (place * (size - kept + 1)).astype(int)
  return image[y : y + kept[0], x : x + kept[1]]


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
    return _each_image(document, lambda: self._draw(rng))

  def _draw(self, rng):
    angle = np.deg2rad(self.turn) * rng.uniform(-1, 1)
    both, one = self.scale ** rng.uniform(-1, 1), self.stretch ** rng.uniform(-1, 1)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    back = turn @ np.diag([one / both, 1 / (one * both)])  # from new to old places
    return functools.partial(_warp, back=back, move=self.move * rng.uniform(-1, 1, 2))


def _warp(image, back, move):
  size = np.array(image.shape[1::-1])
  middle = (size - 1) / 2
  offset = middle - back @ (middle + move * size)
  return np.asarray(_affine(PIL.Image.fromarray(image), back, offset, _WHITE))


def _affine(image, back, offset, fill):
  """The image whose pixel at x is the old one's at `back @ x + offset`."""
  return image.transform(
    image.size,
    PIL.Image.Transform.AFFINE,
    (*back[0], offset[0], *back[1], offset[1]),
    PIL.Image.Resampling.BILINEAR,
    fillcolor=fill,
  )


@dataclasses.dataclass(frozen=True)
class Colour:
  """Changes each image's colours a little.

  gain: most of each channel, as a factor; saturation, contrast: most, as factors.
  """

  gain: float = 1.15
  saturation: float = 1.6
  contrast: float = 1.25

  def map(self, document: Document, rng: np.random.Generator) -> Document:
    return _each_image(document, lambda: self._draw(rng))

  def _draw(self, rng):
    gain = np.diag(self.gain ** rng.uniform(-1, 1, 3))
    keep = self.saturation ** rng.uniform(-1, 1)
    mix = keep * np.eye(3) + (1 - keep) / 3  # with the mean of the channels
    return functools.partial(_paint, mix=self.contrast ** rng.uniform(-1, 1) * mix @ gain)


def _paint(image, mix):
  # Of darkness, so that white, which is mostly ground, stays white.
  rows = np.c_[mix, 255 * (1 - mix.sum(1))]
  return np.asarray(PIL.Image.fromarray(image).convert('RGB', tuple(rows.ravel())))


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """So many operations of 14, drawn anew for each image (RandAugment, 1909.13719).

  The operations are Pillow's, as in the paper's own code; their ranges those of
  AutoAugment (1805.09501, table 6). What comes in is grey.

  count: operations, one after the other.
  strength: share of each operation's range, in [0, 1].
  """

  count: int = 2
  strength: float = 0.3

  def __post_init__(self):
    if self.count < 1 or not 0 <= self.strength <= 1:
      raise ValueError(
        f'randaugment: count={self.count} must be >= 1 and strength={self.strength}'
        ' in [0, 1]'
      )

  def map(self, document: Document, rng: np.random.Generator) -> Document:
    return _each_image(document, lambda: self._draw(rng))

  def _draw(self, rng):
    names = [_NAMES[i] for i in rng.integers(len(_NAMES), size=self.count)]
    amounts = (self.strength * rng.choice([-1, 1], self.count)).tolist()
    return functools.partial(_operate, operations=tuple(zip(names, amounts)))


def _operate(image, operations):
  made = PIL.Image.fromarray(image)
  for name, amount in operations:
    made = OPERATIONS[name](made, amount)
  return np.asarray(made)


def _enhance(kind):
  return lambda image, x: kind(image).enhance(1 + 0.9 * x)


def _move(row, column, share):
  """Part (row, column) of the affine map, around the middle; column 2 moves."""

  def move(image, x):
    middle, back, offset = (np.array(image.size) - 1) / 2, np.eye(2), np.zeros(2)
    if column == 2:
      offset[row] = share * x * image.size[row]
    else:
      back[row, column] = share * x
    return _affine(image, back, offset + middle - back @ middle, _GREY)

  return move


# By name: from an image and an amount in [-1, 1] to an image. 0 is nothing.
OPERATIONS = {
  'identity': lambda image, x: image,
  'autocontrast': lambda image, x: PIL.ImageOps.autocontrast(image),
  'equalize': lambda image, x: PIL.ImageOps.equalize(image),
  'rotate': lambda image, x: image.rotate(
    30 * x, PIL.Image.Resampling.BILINEAR, fillcolor=_GREY
  ),
  'solarize': lambda image, x: PIL.ImageOps.solarize(image, 256 - int(256 * abs(x))),
  'posterize': lambda image, x: PIL.ImageOps.posterize(image, 8 - int(4 * abs(x))),
  'colour': _enhance(PIL.ImageEnhance.Color),
  'contrast': _enhance(PIL.ImageEnhance.Contrast),
  'brightness': _enhance(PIL.ImageEnhance.Brightness),
  'sharpness': _enhance(PIL.ImageEnhance.Sharpness),
  'shear_x': _move(0, 1, 0.3),
  'shear_y': _move(1, 0, 0.3),
  'move_x': _move(0, 2, 0.45),
  'move_y': _move(1, 2, 0.45),
}
_NAMES = tuple(OPERATIONS)


def _each_image(document: Document, draw: Callable[[], Callable]) -> Document:
  spans = tuple(
    dataclasses.replace(span, change=_after(span.change, draw()))
    if isinstance(span, Image)
    else span
    for span in document.spans
  )
  return dataclasses.replace(document, spans=spans)


def _after(first, second):
  return second if first is None else functools.partial(_both, first, second)


def _both(first, second, image):
  return second(first(image))


def _check_range(name, field, value, most):
  if len(value) != 2 or not 0 < value[0] <= value[1] <= most:
    raise ValueError(
      f'{name}: {field}={tuple(value)} must be two numbers, 0 < least <= most <= {most}'
    )


AUGMENTATIONS = {
  'mirror': Mirror,
  'crop': Crop,
  'warp': Warp,
  'colour': Colour,
  'randaugment': RandAugment,
}


def build(augmentations: Sequence[str | Mapping[str, Any]]) -> tuple[Any, ...]:
  """The augmentations of these names, or `{'name': name, field: value, ...}`.

  Raises:
    ValueError: an unknown name, field or value.
  """
  made = []
  for one in augmentations:
    fields = {'name': one} if isinstance(one, str) else dict(one)
    name = fields.pop('name', None)
    kind = pick('augmentation', name, AUGMENTATIONS)
    known = [f.name for f in dataclasses.fields(kind)]
    for field in fields:
      if field not in known:
        raise ValueError(f'augmentation {name!r} has no {field!r}{closest(field, known)}')
    made.append(kind(**fields))
  return tuple(made)


def apply(augmentations, document: Document, *seed: int) -> Document:
  """Maps a document through all of them; `seed` is any number of integers >= 0."""
  if augmentations:
    rng = np.random.default_rng(seed)
    for augmentation in augmentations:
      document = augmentation.map(document, rng)
  return document
