"""Image files made pixels: the common ones by quick readers, all others by Pillow.

  header                     format, mode, size, rotation; too large is refused here
                             (by Pillow, but for JPEGs in which nothing is unusual)
  JPEG, colour or grey       libjpeg-turbo (simplejpeg), at 1/2, 1/4 or 1/8 if asked
  PNG, 8 bits, opaque        libspng (pyspng)
  all else                   Pillow

The quick readers are strict, and whatever they complain of goes to Pillow, which has
the last word. So they change nothing but the speed: the pixels are the same, and so
are the reasons for which a file is refused.
"""

import io
import math
import struct
import zlib
from collections.abc import Callable

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import pyspng
import simplejpeg

from mmjax.data.document import BadDocument

MAX_PIXELS = 2**26
# Not all that Pillow knows: some of its readers start other programs (EPS).
_FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM', 'JPEG2000')
# The array as it is to be seen, by EXIF orientation (Exif 2.32, 4.6.4).
_TURNS = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.swapaxes(0, 1),
  6: lambda x: x[::-1].swapaxes(0, 1),
  7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
  8: lambda x: x[:, ::-1].swapaxes(0, 1),
}

# Of a JPEG: a segment's marker and length; its frame (bits, height, width, layers).
_SEGMENT = struct.Struct('>BBH').unpack_from
_FRAME = struct.Struct('>BHHB').unpack_from
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; Huffman's all
_TABLES = (0xC4, 0xDB, 0xDD, 0xFE)  # Huffman's, quantisation, restarts; a comment
_SCAN = 0xDA
# By kind, the name that an application's segment has to have, and its least length.
_NAMED = {0xE0: (b'JFIF\0', 16), 0xE2: (b'ICC_PROFILE\0', 16), 0xEE: (b'Adobe', 14)}

Least = Callable[[int, int], tuple[int, int]]


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
  return decode_scaled(data, None, max_pixels)[0]


def decode_scaled(
  data: bytes, least: Least | None, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, tuple[int, int]]:
  """Decodes an image file, a JPEG no larger than is needed.

  A JPEG is a sum of 8 x 8 cosines per block, so that its half, quarter or eighth
  is had without ever making the whole. All of the file is read all the same.

  Args:
    data: the file's bytes.
    least: from the native (height, width) to the (height, width) that the pixels
      must have at least. None = the native size.
    max_pixels: most native pixels.

  Returns:
    u8[H, W, 3], and the native (height, width), rotated as the image is to be seen.

  Raises:
    BadDocument: as `decode_image` does.
  """
  size = _plain_jpeg(data)
  if size and math.prod(size) <= min(max_pixels, MAX_PIXELS):
    quick = _jpeg(data, size, 1, least)
    if quick is not None:
      return quick
  image = _open(data)
  width, height = image.size
  if not width or not height:
    raise BadDocument('zero_size', f'an image of {height} x {width}')
  if width * height > max_pixels:
    raise BadDocument(
      'too_many_pixels', f'an image of {height} x {width}, more than {max_pixels} pixels'
    )
  quick = _quick_jpeg(image, data, least) or _quick_png(image, data)
  if quick is not None:
    return quick
  try:
    image.load()
    pixels = _rgb(PIL.ImageOps.exif_transpose(image))
  except BadDocument:
    raise
  except Exception as error:  # Pillow's readers raise all sorts on garbage
    raise BadDocument('truncated_image', str(error)) from None
  return pixels, pixels.shape[:2]


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
  except Exception:  # the same
    raise BadDocument('not_image', f'{len(data)} bytes, no image file') from None


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
  """(height, width) of a JPEG that Pillow opens without doubt and that isn't turned.

  Segments up to the first scan (T.81, B.1.1.3: marker, length, content), of the kinds
  that say nothing of rotation (EXIF, XMP), of more images or of Pillow's own errors.
  None = ask Pillow, which takes ten times as long to find the same.
  """
  if data[:2] != b'\xff\xd8':
    return None
  at, size, end = 2, None, len(data) - 18
  while at < end:
    mark, kind, length = _SEGMENT(data, at)
    if mark != 0xFF or length < 2:
      return None
    if kind in _FRAMES:
      bits, *found, layers = _FRAME(data, at + 4)
      if bits != 8 or layers not in (1, 3) or length != 8 + 3 * layers or 0 in found:
        return None
      size = tuple(found)
    elif kind in _NAMED:
      name, least = _NAMED[kind]
      if length < least or not data.startswith(name, at + 4):
        return None
    elif kind == _SCAN:
      return size
    elif kind not in _TABLES:
      return None
    at += 2 + length
  return None


def _quick_jpeg(image: PIL.Image.Image, data: bytes, least: Least | None):
  """What `decode_scaled` returns, or None if Pillow should decide."""
  if image.format != 'JPEG' or image.mode not in ('RGB', 'L'):
    return None
  try:
    turn = image.getexif().get(PIL.ExifTags.Base.Orientation, 1)
  except Exception:  # broken EXIF
    return None
  return _jpeg(data, image.size[::-1], turn, least)


def _jpeg(data: bytes, size: tuple[int, int], turn: int, least: Least | None):
  """The same for a JPEG of which (height, width) and EXIF orientation are known."""
  height, width = size
  turned = turn in (5, 6, 7, 8)
  native = (width, height) if turned else (height, width)
  rows, cols = least(*native) if least else native
  if turned:
    rows, cols = cols, rows
  # Factors between these are slower than the whole: they have no SIMD.
  fits = [f for f in (8, 4, 2) if -(-height // f) >= rows and -(-width // f) >= cols]
  factor = max(fits, default=1)
  try:
    pixels = simplejpeg.decode_jpeg(
      data, 'RGB', min_height=-(-height // factor), min_width=-(-width // factor)
    )
  except Exception:  # ValueError, for warnings too
    return None
  return np.ascontiguousarray(_TURNS.get(turn, _TURNS[1])(pixels)), native


def _quick_png(image: PIL.Image.Image, data: bytes):
  """The same for PNG."""
  # 8 bits by the header, since Pillow's modes don't tell.
  if image.format != 'PNG' or image.mode not in ('RGB', 'L', 'P') or data[24] != 8:
    return None
  try:
    if not _plain_png(data):
      return None
    pixels = pyspng.load(data, 'RGB')
  except Exception:  # struct.error, ValueError, RuntimeError
    return None
  return pixels, pixels.shape[:2]


def _plain_png(data: bytes) -> bool:
  """Whether all checksums are right and no chunk speaks of alpha or rotation.

  libspng, as it comes, asks for no checksum; and what turns an image may stand
  behind its pixels (PNG 3, 4.2: length, kind, data, CRC-32).
  """
  view, at, kind = memoryview(data), 8, b''
  while kind != b'IEND':
    length, kind = struct.unpack_from('>I4s', data, at)
    start, at = at + 8, at + 12 + length
    if zlib.crc32(view[start - 4 : at - 4]) != struct.unpack_from('>I', data, at - 4)[0]:
      return False
    if kind in (b'tRNS', b'eXIf'):
      return False
    if kind in (b'tEXt', b'zTXt', b'iTXt'):
      word = data[start : start + 32].lower()
      if b'exif' in word or b'xmp' in word:
        return False
  return True


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
