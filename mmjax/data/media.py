"""Media made ready: files decoded to pixels, resized by rule, cut into patches.

An image of R x C patches is one row of R * C patches of p * p * 3 values, in
reading order (ViT, 2010.11929), at its own aspect ratio if the rule says so
(NaViT, 2307.06304):

  native 70 x 50, p = 16        rule.grid(70, 50) = (1, 4, 3)
  -> resized to 64 x 48         rule.patches(pixels): u8[12, 768]

`grid` needs the native size alone, so packing is planned without reading pixels.
"""

import dataclasses
import functools
import math

import numpy as np
import PIL.Image

from mmjax.data.decode import MAX_PIXELS, Least, decode_image, decode_scaled, image_size
from mmjax.data.document import Audio, BadDocument, Image, Video

__all__ = ['MAX_PIXELS', 'decode_image', 'image_size']


def pixels(image: Image, max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """The pixels u8[H, W, 3] of an Image span; raises as `decode_image` does."""
  return _scaled(image, None, max_pixels)[0]


def _scaled(image: Image, least: Least | None, max_pixels: int):
  """`decode_scaled` of an Image span, changed as the span says."""
  array = image.content
  if isinstance(array, bytes):
    array, native = decode_scaled(array, least, max_pixels)
  else:
    native = _check(array, max_pixels)
  return (array if image.change is None else image.change(array)), native


def _check(array: np.ndarray, max_pixels: int) -> tuple[int, int]:
  if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
    raise BadDocument(
      'bad_span', f'an image is u8[H, W, 3], not {array.dtype}{list(array.shape)}'
    )
  height, width, _ = array.shape
  if not height or not width:
    raise BadDocument('zero_size', f'an image of {height} x {width}')
  if height * width > max_pixels:
    raise BadDocument(
      'too_many_pixels', f'an image of {height} x {width}, more than {max_pixels} pixels'
    )
  return height, width


def native_size(span: Image | Audio | Video, max_pixels: int = MAX_PIXELS):
  """The size of a media span as it comes, three numbers from which its grid follows.

  An image: (1, height, width), decoded to be sure of it. Sound: (samples, samples per
  second, 1), and video: (milliseconds, height, width), of files by their headers.
  """
  from mmjax.data import audio, video

  if isinstance(span, Image):
    # All of the file is read, but no more pixels are made than must be.
    return 1, *_scaled(span, lambda height, width: (1, 1), max_pixels)[1]
  if isinstance(span, Audio):
    return audio.native_size(span)
  return video.native_size(span, max_pixels)


def patchify(image: np.ndarray, patch: int) -> np.ndarray:
  """Cuts [R*p, C*p, 3] into patches [R*C, p*p*3], in reading order.

  A patch is flattened as (row, column, channel).

  Raises:
    ValueError: a side that is no multiple of `patch`.
  """
  height, width, channels = image.shape
  if height % patch or width % patch:
    raise ValueError(f'an image of {height} x {width} has no whole patches of {patch}')
  R, C = height // patch, width // patch
  cut = image.reshape(R, patch, C, patch, channels).transpose(0, 2, 1, 3, 4)
  return cut.reshape(R * C, patch * patch * channels)


def unpatchify(patches: np.ndarray, rows: int, cols: int, patch: int) -> np.ndarray:
  """The image [rows*p, cols*p, 3] of patches [rows*cols, p*p*3]."""
  cut = patches.reshape(rows, cols, patch, patch, -1).transpose(0, 2, 1, 3, 4)
  return cut.reshape(rows * patch, cols * patch, -1)


@dataclasses.dataclass(frozen=True)
class ImageRule:
  """How an image becomes patches.

  patch: side of a patch in pixels.
  resize:
    'fixed'   to size x size, whatever the aspect ratio;
    'longest' the longest side to `size`, aspect ratio kept;
    'native'  as it is, scaled down only if it has more than `max_patches`.
    The latter two round both sides to whole patches, at least one.
  size: pixels, for 'fixed' and 'longest'.
  max_patches: most patches of one image; needed for 'native'.
  max_pixels: images above it are refused before decoding.
  resample: how images are made smaller,
    'bicubic' antialiased, equal to Pillow's bit by bit;
    'fast'    the same filter by SIMD (cykooz_resizer; `pip install mmjax[fast]`), of a
              JPEG that was decoded no larger than needed: several times as fast, and
              on photos within a few levels of the other;
    'area'    means over areas (OpenCV; `pip install mmjax[area]`), of the same JPEG.

  Raises:
    ValueError: a value that makes no sense.
  """

  patch: int
  resize: str = 'fixed'
  size: int | None = None
  max_patches: int | None = None
  max_pixels: int = MAX_PIXELS
  resample: str = 'bicubic'

  def __post_init__(self):
    if self.resize not in ('fixed', 'longest', 'native'):
      raise ValueError(f"resize={self.resize!r}; choose 'fixed', 'longest' or 'native'")
    if self.resample not in ('bicubic', 'fast', 'area'):
      raise ValueError(f"resample={self.resample!r}; choose 'bicubic', 'fast' or 'area'")
    if self.resample == 'area':
      _opencv()
    if self.resample == 'fast':
      _simd()
    need = 'max_patches' if self.resize == 'native' else 'size'
    for name in ('patch', need):
      value = getattr(self, name)
      if value is None or value < 1:
        raise ValueError(f'image rule: resize={self.resize!r} needs {name} >= 1: {value}')
    if self.max_patches is not None and self.max_patches < 1:
      raise ValueError(f'image rule: max_patches={self.max_patches} must be >= 1')
    if self.resize == 'fixed':
      if self.size % self.patch:
        raise ValueError(f'image rule: size {self.size} is no multiple of {self.patch}')
      count = (self.size // self.patch) ** 2
      if self.max_patches is not None and count > self.max_patches:
        raise ValueError(
          f'image rule: {self.size} x {self.size} makes {count} patches, more than '
          f'max_patches={self.max_patches}'
        )

  @property
  def channels(self) -> int:
    """Values per patch."""
    return self.patch * self.patch * 3

  def grid(self, height: int, width: int) -> tuple[int, int, int]:
    """(1, rows, columns) of patches of an image of that native size."""
    if self.resize == 'fixed':
      return (1, self.size // self.patch, self.size // self.patch)
    scale = 1.0 if self.resize == 'native' else self.size / max(height, width)
    rows = max(1, int(height * scale / self.patch + 0.5))
    cols = max(1, int(width * scale / self.patch + 0.5))
    limit = self.max_patches
    if limit is not None and rows * cols > limit:
      # Sides of area `limit` and this aspect ratio, rounded down; a side of one
      # patch can't shrink, so the other takes all of the limit at most.
      rows = min(max(1, math.isqrt(limit * height // width)), rows, limit)
      cols = min(max(1, math.isqrt(limit * width // height)), cols, limit // rows)
    return (1, rows, cols)

  def patches_of(self, image: Image) -> tuple[tuple[int, int, int], np.ndarray]:
    """The grid of an Image span and its patches u8[P, p*p*3].

    Raises:
      BadDocument: as `decode_image` does.
    """
    least = None
    if self.resample != 'bicubic':
      # Twice as much where a change may cut a part out.
      least = functools.partial(self._least, factor=1 if image.change is None else 2)
    array, native = _scaled(image, least, self.max_pixels)
    grid = self.grid(*native)
    return grid, self.patches(array, grid)

  def _least(self, height, width, factor):
    _, rows, cols = self.grid(height, width)
    return factor * rows * self.patch, factor * cols * self.patch

  def patches(
    self, image: np.ndarray, grid: tuple[int, int, int] | None = None
  ) -> np.ndarray:
    """u8[H, W, 3] to u8[P, p*p*3], resized where needed.

    grid: another than the image's own, to put it in another one's place.
    """
    height, width, _ = image.shape
    _, rows, cols = grid or self.grid(height, width)
    size = (cols * self.patch, rows * self.patch)
    if size != (width, height):
      image = self._resized(image, size)
    return patchify(image, self.patch)

  def _resized(self, image, size):
    if self.resample == 'fast':
      return _convolved(image, size)
    # What grows has no areas to take means of.
    if self.resample == 'area' and size[0] <= image.shape[1] and size[1] <= len(image):
      cv2 = _opencv()
      image = np.ascontiguousarray(image)
      return cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    bicubic = PIL.Image.Resampling.BICUBIC
    return np.asarray(PIL.Image.fromarray(image).resize(size, bicubic))


@functools.cache
def _opencv():
  try:
    import cv2
  except ImportError:
    raise ValueError(
      "image rule: resample='area' needs OpenCV; pip install mmjax[area]"
    ) from None
  cv2.setNumThreads(1)  # the loader's threads and processes are enough
  return cv2


def _convolved(image, size):
  """Bicubic by SIMD, antialiased; of u8[H, W, 3], to (width, height)."""
  simd, options = _simd()
  height, width, _ = image.shape
  source = simd.ImageData(width, height, simd.PixelType.U8x3, image.tobytes())
  made = simd.ImageData(*size, simd.PixelType.U8x3)
  simd.Resizer().resize(source, made, options)  # it isn't for two threads at once
  return np.frombuffer(made.get_buffer(), np.uint8).reshape(size[1], size[0], 3)


@functools.cache
def _simd():
  try:
    import cykooz_resizer as simd
  except ImportError:
    raise ValueError(
      "image rule: resample='fast' needs cykooz-resizer; pip install mmjax[fast]"
    ) from None
  # Catmull and Rom's cubic (a = -0.5) is what Pillow calls bicubic.
  return simd, simd.ResizeOptions(simd.ResizeAlg.convolution(simd.FilterType.catmull_rom))
