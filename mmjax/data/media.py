"""Media made ready: files decoded to pixels, resized by rule, cut into patches.

An image of R x C patches is one row of R * C patches of p * p * 3 values, in
reading order (ViT, 2010.11929), at its own aspect ratio if the rule says so
(NaViT, 2307.06304):

  native 70 x 50, p = 16        rule.grid(70, 50) = (1, 4, 3)
  -> resized to 64 x 48         rule.patches(pixels): u8[12, 768]

`grid` needs the native size alone, so packing is planned without reading pixels.
"""

import dataclasses
import io
import math

import numpy as np
import PIL.Image
import PIL.ImageOps

from mmjax.data.document import Audio, BadDocument, Image, Video

MAX_PIXELS = 2**26
# Not all that Pillow knows: some of its readers start other programs (EPS).
_FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM', 'JPEG2000')


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """Decodes an image file.

  Transparency is laid on white, the EXIF rotation is applied, palettes, CMYK
  and 16-bit grey become RGB; of an animation the first frame is taken.

  Args:
    data: the file's bytes (PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000).
    max_pixels: most pixels to decode; the header is asked before decoding.

  Returns:
    u8[H, W, 3].

  Raises:
    BadDocument: 'not_image', 'truncated_image', 'too_many_pixels', 'zero_size'
      or 'unsupported_image'.
  """
  image = _open(data)
  width, height = image.size
  if not width or not height:
    raise BadDocument('zero_size', f'an image of {height} x {width}')
  if width * height > max_pixels:
    raise BadDocument(
      'too_many_pixels', f'an image of {height} x {width}, more than {max_pixels} pixels'
    )
  try:
    image.load()
    return _rgb(PIL.ImageOps.exif_transpose(image))
  except BadDocument:
    raise
  except Exception as error:  # the same
    raise BadDocument('truncated_image', str(error)) from None


def image_size(data: bytes) -> tuple[int, int]:
  """(height, width) of an image file by its header, without decoding.

  Raises:
    BadDocument: 'not_image' or 'too_many_pixels'.
  """
  width, height = _open(data).size
  return height, width


def _open(data: bytes) -> PIL.Image.Image:
  try:
    return PIL.Image.open(io.BytesIO(data), formats=_FORMATS)
  except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
    raise BadDocument('too_many_pixels', str(error)) from None
  except Exception:  # Pillow's readers raise all sorts on garbage
    raise BadDocument('not_image', f'{len(data)} bytes, no image file') from None


def _rgb(image: PIL.Image.Image) -> np.ndarray:
  """Any mode of Pillow as u8[H, W, 3]."""
  if image.mode == 'I' or image.mode.startswith('I;16'):
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
      raise BadDocument('unsupported_image', 'grey values beyond 16 bits')
    return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
  if image.mode == 'F':
    raise BadDocument('unsupported_image', 'float pixels have no set range')
  if image.has_transparency_data:
    image = image.convert('RGBA')
    white = PIL.Image.new('RGBA', image.size, 'white')
    image = PIL.Image.alpha_composite(white, image)
  return np.array(image if image.mode == 'RGB' else image.convert('RGB'))


def pixels(image: Image, max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """The pixels u8[H, W, 3] of an Image span; raises as `decode_image` does."""
  if isinstance(image.content, bytes):
    return decode_image(image.content, max_pixels)
  array = image.content
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
  return array


def native_size(span: Image | Audio | Video, max_pixels: int = MAX_PIXELS):
  """The size of a media span as it comes, three numbers from which its grid follows.

  An image: (1, height, width), decoded to be sure of it. Sound: (samples, samples per
  second, 1), and video: (milliseconds, height, width), of files by their headers.
  """
  from mmjax.data import audio, video

  if isinstance(span, Image):
    height, width, _ = pixels(span, max_pixels).shape
    return 1, height, width
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

  Raises:
    ValueError: a value that makes no sense.
  """

  patch: int
  resize: str = 'fixed'
  size: int | None = None
  max_patches: int | None = None
  max_pixels: int = MAX_PIXELS

  def __post_init__(self):
    if self.resize not in ('fixed', 'longest', 'native'):
      raise ValueError(f"resize={self.resize!r}; choose 'fixed', 'longest' or 'native'")
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

  def patches(
    self, image: np.ndarray, grid: tuple[int, int, int] | None = None
  ) -> np.ndarray:
    """u8[H, W, 3] to u8[P, p*p*3], resized (bicubic, antialiased) where needed.

    grid: another than the image's own, to put it in another one's place.
    """
    height, width, _ = image.shape
    _, rows, cols = grid or self.grid(height, width)
    size = (cols * self.patch, rows * self.patch)
    if size != (width, height):
      resized = PIL.Image.fromarray(image).resize(size, PIL.Image.Resampling.BICUBIC)
      image = np.asarray(resized)
    return patchify(image, self.patch)
