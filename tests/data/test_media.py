"""Images: decoding of all that comes, and the geometry of patches."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.data import media
from mmjax.data.document import Audio, BadDocument, Image, Video
from mmjax.data.media import ImageRule, decode_image

sides = st.integers(1, 90)


def encoded(image, form='PNG', **options):
  file = io.BytesIO()
  image.save(file, form, **options)
  return file.getvalue()


def noise(height, width, channels=3):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (height, width, channels), np.uint8)


def png_claiming(height, width):
  """A PNG whose header names another size than its pixels have."""
  data = bytearray(encoded(PIL.Image.new('RGB', (8, 8))))
  data[16:24] = struct.pack('>II', width, height)
  data[29:33] = struct.pack('>I', zlib.crc32(bytes(data[12:29])))
  return bytes(data)


def reason_of(data, **options):
  with pytest.raises(BadDocument) as error:
    decode_image(data, **options)
  assert '\n' not in str(error.value)
  return error.value.reason


@pytest.mark.parametrize('form', ['PNG', 'BMP', 'PPM', 'TIFF'])
def test_lossless_files_decode_to_their_pixels(form):
  image = noise(5, 9)
  got = decode_image(encoded(PIL.Image.fromarray(image), form))
  np.testing.assert_array_equal(got, image)
  assert got.dtype == np.uint8


def test_every_mode_becomes_rgb():
  grey = noise(4, 6, 1)[..., 0]
  want = np.repeat(grey[..., None], 3, axis=2)
  np.testing.assert_array_equal(decode_image(encoded(PIL.Image.fromarray(grey))), want)
  # 16 bits: 0 stays 0, 65535 becomes 255, and the rest is rounded.
  for off in (-128, 0, 128):
    deep = PIL.Image.fromarray(np.clip(grey * 257.0 + off, 0, 65535).astype(np.uint16))
    np.testing.assert_array_equal(decode_image(encoded(deep)), want)
  palette = PIL.Image.new('P', (1, 1), 3)
  palette.putpalette([0, 0, 0] * 3 + [9, 8, 7])
  np.testing.assert_array_equal(decode_image(encoded(palette)), [[[9, 8, 7]]])
  ink = PIL.Image.new('CMYK', (2, 2), (255, 0, 0, 0))
  np.testing.assert_array_equal(decode_image(encoded(ink, 'TIFF'))[0, 0], [0, 255, 255])
  one_bit = PIL.Image.new('1', (2, 2), 1)
  assert decode_image(encoded(one_bit)).min() == 255


def test_transparency_lies_on_white():
  image = noise(4, 4, 4)
  alpha = image[..., 3:].astype(np.float64) / 255
  want = image[..., :3] * alpha + 255 * (1 - alpha)
  got = decode_image(encoded(PIL.Image.fromarray(image)))
  np.testing.assert_allclose(got, want, atol=1)
  palette = PIL.Image.new('P', (2, 1), 0)  # black, and transparent
  assert decode_image(encoded(palette, transparency=0)).min() == 255


def test_exif_rotation_is_applied():
  image = noise(3, 5)
  exif = PIL.Image.Exif()
  exif[0x0112] = 6  # turn by 90 degrees clockwise to view
  got = decode_image(encoded(PIL.Image.fromarray(image), exif=exif))
  np.testing.assert_array_equal(got, np.rot90(image, -1))


def test_first_frame_of_an_animation():
  frames = [PIL.Image.new('RGB', (2, 2), c) for c in ('red', 'blue')]
  data = encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:])
  np.testing.assert_array_equal(decode_image(data)[0, 0], [255, 0, 0])


@pytest.mark.parametrize('form', ['PNG', 'JPEG', 'GIF', 'BMP', 'WEBP'])
def test_truncated_files_are_refused(form):
  data = encoded(PIL.Image.fromarray(noise(64, 64)), form)
  assert decode_image(data).shape == (64, 64, 3)
  # WebP is decoded when opened, so half of one isn't known for an image.
  want = 'not_image' if form == 'WEBP' else 'truncated_image'
  assert reason_of(data[: len(data) // 2]) == want
  assert reason_of(data[:7]) == 'not_image'


@given(st.binary(max_size=64), st.sampled_from(['PNG', 'JPEG', 'GIF', 'TIFF']), st.data())
def test_garbage_never_raises_anything_else(junk, form, data):
  whole = encoded(PIL.Image.fromarray(noise(6, 6)), form)
  at = data.draw(st.integers(0, len(whole)))
  for some in (junk, whole[:at] + junk, whole[:at] + junk + whole[at + len(junk) :]):
    try:
      assert decode_image(some, max_pixels=10**6).shape[2] == 3
    except BadDocument as error:
      assert error.reason


def test_other_bytes_are_no_image():
  # Pillow would read PostScript, by starting another program.
  program = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n'
  for data in (b'', b'hello', program, b'\x89PNG\r\n\x1a\n'):
    assert reason_of(data) == 'not_image'


def test_bombs_are_refused_from_their_header():
  data = encoded(PIL.Image.new('RGB', (40, 30)))
  assert decode_image(data, max_pixels=1200).shape == (30, 40, 3)
  assert reason_of(data, max_pixels=1199) == 'too_many_pixels'
  # These claim more than there is; decoding would say 'truncated_image'.
  for side in (8300, 10000, 60000):
    assert reason_of(png_claiming(side, side)) == 'too_many_pixels'


def test_zero_size_is_refused():
  assert reason_of(png_claiming(0, 8)) in ('zero_size', 'not_image')
  for shape in ((0, 4, 3), (4, 0, 3)):
    with pytest.raises(BadDocument, match='zero_size'):
      media.pixels(Image(np.zeros(shape, np.uint8)))


def test_pixels_with_no_set_range_are_refused():
  floats = PIL.Image.fromarray(np.ones((2, 2), np.float32))
  assert reason_of(encoded(floats, 'TIFF')) == 'unsupported_image'
  wide = PIL.Image.fromarray(np.full((2, 2), 70000, np.int32))
  assert reason_of(encoded(wide, 'TIFF')) == 'unsupported_image'


def test_arrays_are_checked_like_files():
  image = noise(4, 5)
  assert media.pixels(Image(image)) is image
  with pytest.raises(BadDocument, match='too_many_pixels'):
    media.pixels(Image(image), max_pixels=19)
  with pytest.raises(BadDocument, match='bad_span'):
    media.pixels(Image(image[..., 0]))


def test_native_sizes():
  png = encoded(PIL.Image.fromarray(noise(4, 5)))
  assert media.native_size(Image(png)) == (1, 4, 5)
  assert media.native_size(Audio(np.zeros(7, np.float32), 8000)) == (7, 8000, 1)
  assert media.native_size(Video(noise(2, 3, 3)[None], 4)) == (250, 2, 3)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_patches_are_the_squares_of_the_image_in_reading_order(rows, cols, patch):
  image = noise(rows * patch, cols * patch)
  patches = media.patchify(image, patch)
  assert patches.shape == (rows * cols, patch * patch * 3)
  for i in range(rows * cols):
    r, c = divmod(i, cols)
    square = image[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
    np.testing.assert_array_equal(patches[i], square.ravel())
  np.testing.assert_array_equal(media.unpatchify(patches, rows, cols, patch), image)


def test_patchify_refuses_uneven_sides():
  with pytest.raises(ValueError, match='5 x 4 has no whole patches of 2'):
    media.patchify(noise(5, 4), 2)


rules = st.one_of(
  st.builds(
    lambda p, n: ImageRule(p, 'fixed', p * n), st.integers(1, 9), st.integers(1, 4)
  ),
  st.builds(
    lambda p, s, m: ImageRule(p, 'longest', s, m),
    st.integers(1, 9),
    sides,
    st.none() | st.integers(1, 30),
  ),
  st.builds(
    lambda p, m: ImageRule(p, 'native', max_patches=m),
    st.integers(1, 9),
    st.integers(1, 30),
  ),
)


@settings(max_examples=300)
@given(rules, sides, sides)
def test_grid_foretells_the_patches(rule, height, width):
  t, rows, cols = rule.grid(height, width)
  assert t == 1 and rows >= 1 and cols >= 1
  assert rows * cols <= (rule.max_patches or rows * cols)
  patches = rule.patches(noise(height, width))
  assert patches.shape == (rows * cols, rule.channels)
  assert patches.dtype == np.uint8


@settings(max_examples=1000)
@given(
  st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 32), st.integers(1, 400)
)
def test_native_keeps_size_and_aspect(height, width, patch, limit):
  _, rows, cols = ImageRule(patch, 'native', max_patches=limit).grid(height, width)
  # Sides in whole patches, halves rounded up.
  nearest = [max(1, (2 * side + patch) // (2 * patch)) for side in (height, width)]
  if nearest[0] * nearest[1] <= limit:
    assert [rows, cols] == nearest
    return
  assert rows <= nearest[0] and cols <= nearest[1]  # never scaled up
  assert rows * cols <= limit < (rows + 1) * (cols + 1)  # the budget is used
  if min(rows, cols) > 1:
    assert rows / (cols + 1) <= height / width <= (rows + 1) / cols


def test_native_of_whole_patches_is_the_image_itself():
  image = noise(32, 48)
  patches = ImageRule(16, 'native', max_patches=6).patches(image)
  np.testing.assert_array_equal(media.unpatchify(patches, 2, 3, 16), image)


@pytest.mark.parametrize(
  'height, width, grid', [(50, 100, (1, 2, 4)), (7, 900, (1, 1, 4))]
)
def test_longest_side_has_the_size(height, width, grid):
  assert ImageRule(16, 'longest', 64).grid(height, width) == grid


@pytest.mark.parametrize(
  'fields, message',
  [
    (dict(patch=8, resize='crop', size=8), "choose 'fixed', 'longest' or 'native'"),
    (dict(patch=8), 'needs size'),
    (dict(patch=0, size=8), 'needs patch'),
    (dict(patch=8, resize='native'), 'needs max_patches'),
    (dict(patch=8, size=20), 'no multiple of 8'),
    (dict(patch=8, size=64, max_patches=63), 'makes 64 patches'),
    (dict(patch=8, resize='longest', size=64, max_patches=0), 'must be >= 1'),
  ],
)
def test_wrong_rules_are_one_line(fields, message):
  with pytest.raises(ValueError, match=message) as error:
    ImageRule(**fields)
  assert '\n' not in str(error.value)
