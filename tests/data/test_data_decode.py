"""The quick readers of images beside Pillow alone: the same pixels, the same reasons."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.ImageFilter
import PIL.ImageOps
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.data import decode, media
from mmjax.data.document import BadDocument, Image
from mmjax.data.media import ImageRule


def photo(height, width, seed=0):
  """Smooth shapes with noise on them, as photos have: u8[H, W, 3]."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
  image = PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.BICUBIC)
  return np.clip(image + rng.normal(0, 5, (height, width, 3)), 0, 255).astype(np.uint8)


def encoded(image, form, **options):
  file = io.BytesIO()
  image = image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)
  image.save(file, form, **options)
  return file.getvalue()


def pillow(data):
  """What Pillow alone makes of a file, or the reason why it makes nothing."""
  try:
    image = PIL.Image.open(io.BytesIO(data), formats=decode._FORMATS)
  except Exception:
    return 'not_image'
  try:
    image = PIL.ImageOps.exif_transpose(image)
  except Exception:
    return 'truncated_image'
  if image.has_transparency_data:
    white = PIL.Image.new('RGBA', image.size, 'white')
    image = PIL.Image.alpha_composite(white, image.convert('RGBA'))
  return np.asarray(image.convert('RGB'))


def ours(data, **options):
  try:
    return decode.decode_image(data, **options)
  except BadDocument as error:
    return error.reason


def exif(orientation):
  made = PIL.Image.Exif()
  made[0x0112] = orientation
  return made


IMAGE = PIL.Image.fromarray(photo(37, 53))
PALETTE = IMAGE.quantize(16)
FILES = {
  'jpeg': encoded(IMAGE, 'JPEG', quality=90),
  'jpeg of full colour': encoded(IMAGE, 'JPEG', subsampling=0),
  'jpeg 4:2:2': encoded(IMAGE, 'JPEG', subsampling=1),
  'jpeg in passes': encoded(IMAGE, 'JPEG', progressive=True),
  'jpeg that stays RGB': encoded(IMAGE, 'JPEG', keep_rgb=True),
  'jpeg with restarts': encoded(IMAGE, 'JPEG', restart_marker_rows=1),
  'jpeg grey': encoded(IMAGE.convert('L'), 'JPEG'),
  'jpeg CMYK': encoded(IMAGE.convert('CMYK'), 'JPEG'),
  'png': encoded(IMAGE, 'PNG'),
  'png grey': encoded(IMAGE.convert('L'), 'PNG'),
  'png grey and alpha': encoded(IMAGE.convert('LA'), 'PNG'),
  'png alpha': encoded(np.dstack([IMAGE, np.arange(53) * np.ones((37, 1))])
                       .astype(np.uint8), 'PNG'),
  'png one bit': encoded(IMAGE.convert('1'), 'PNG'),
  'png palette': encoded(PALETTE, 'PNG'),
  'png palette of 8 bits': encoded(IMAGE.quantize(200), 'PNG'),
  'png palette, one colour clear': encoded(PALETTE, 'PNG', transparency=3),
  'png, one colour clear': encoded(IMAGE, 'PNG', transparency=IMAGE.getpixel((4, 4))),
  'png turned': encoded(IMAGE, 'PNG', exif=exif(6)),
  'png animated': encoded(IMAGE, 'PNG', save_all=True,
                          append_images=[PIL.ImageOps.invert(IMAGE)]),
  'gif animated': encoded(PALETTE, 'GIF', save_all=True,
                          append_images=[PALETTE.rotate(180)]),
  'webp animated': encoded(IMAGE, 'WEBP', lossless=True, save_all=True,
                           append_images=[PIL.ImageOps.invert(IMAGE)]),
  'two pictures in one jpeg': encoded(IMAGE, 'MPO', save_all=True, append_images=[IMAGE]),
}  # fmt: skip
for n in range(1, 9):
  FILES[f'jpeg turned {n}'] = encoded(IMAGE, 'JPEG', exif=exif(n))


def chunk(kind, data):
  return struct.pack('>I', len(data)) + kind + data + struct.pack(
    '>I', zlib.crc32(kind + data)
  )  # fmt: skip


def png(header, rows, extra=b''):
  """A PNG of these header fields (width, height, bits, colour, ...) and raw rows."""
  parts = [
    chunk(b'IHDR', struct.pack('>IIBBBBB', *header)),
    chunk(b'IDAT', zlib.compress(rows)),
    extra,
    chunk(b'IEND', b''),
  ]
  return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


_RGB16 = np.arange(6 * 4 * 3, dtype='>u2').reshape(4, 18) * 900
FILES['png 16 bits'] = png(
  (6, 4, 16, 2, 0, 0, 0), b''.join(b'\0' + row.tobytes() for row in _RGB16)
)
_TURN = b'MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0'
FILES['png turned after its pixels'] = png(
  (2, 3, 8, 2, 0, 0, 0), 3 * b'\0abcdef', chunk(b'eXIf', _TURN)
)


@pytest.mark.parametrize('name', FILES)
def test_each_file_is_as_pillow_has_it(name):
  # Of both, the inverse DCT is libjpeg-turbo's: not a level between them.
  np.testing.assert_array_equal(decode.decode_image(FILES[name]), pillow(FILES[name]))
  want = pillow(FILES[name]).shape[:2]
  assert media.native_size(Image(FILES[name])) == (1, *want)


@pytest.mark.parametrize(
  'name', ['jpeg', 'jpeg in passes', 'jpeg grey', 'png', 'png palette of 8 bits']
)
def test_common_files_need_no_pillow(name, monkeypatch):
  want = pillow(FILES[name])
  if name.startswith('jpeg'):
    monkeypatch.setattr(decode, '_open', None)
  monkeypatch.setattr(PIL.Image.Image, 'convert', None)
  monkeypatch.setattr(decode, '_rgb', None)
  np.testing.assert_array_equal(decode.decode_image(FILES[name]), want)


@pytest.mark.parametrize('name', ['jpeg', 'jpeg in passes', 'jpeg grey', 'png'])
def test_cut_files_are_refused_wherever_they_are_cut(name):
  data = FILES[name]
  for end in [*range(0, len(data), 23), *range(len(data) - 16, len(data))]:
    got, want = ours(data[:end]), pillow(data[:end])
    np.testing.assert_array_equal(got, want, str(end))
    for least in (lambda h, w: (1, 1), lambda h, w: (h // 2, w // 2)):
      try:
        decode.decode_scaled(data[:end], least)
        assert not isinstance(want, str), end
      except BadDocument as error:
        assert error.reason == want


@settings(max_examples=150)
@given(
  st.sampled_from(
    ['jpeg', 'jpeg turned 6', 'png', 'png palette of 8 bits', 'png turned']
  ),
  st.floats(0, 1),
  st.binary(min_size=1, max_size=4),
)
@pytest.mark.filterwarnings('ignore')  # Pillow warns of broken EXIF
def test_damaged_files_are_as_pillow_has_them(name, place, junk):
  data = FILES[name]
  at = int(place * (len(data) - len(junk)))
  data = data[:at] + junk + data[at + len(junk) :]
  try:
    got = decode.decode_image(data, 10**6)
  except BadDocument as error:
    if error.reason in ('too_many_pixels', 'zero_size', 'unsupported_image'):
      return
    got = error.reason
  np.testing.assert_array_equal(got, pillow(data))


def segment(kind, content):
  return struct.pack('>BBH', 0xFF, kind, 2 + len(content)) + content


# What may stand in a JPEG in front of its pixels; Pillow has a word on each.
SEGMENTS = {
  'a comment': segment(0xFE, b'by hand'),
  'a profile': segment(0xE2, b'ICC_PROFILE\0\1\1' + bytes(128)),
  'a profile cut off': segment(0xE2, b'ICC_PROFILE\0'),
  'JFIF cut off': segment(0xE0, b'JFIF\0'),
  'Adobe': segment(0xEE, b'Adobe\0\x64\0\0\0\0\1'),
  'Adobe cut off': segment(0xEE, b'Adobe'),
  'Photoshop': segment(0xED, b'Photoshop 3.0\x00' + b'8BIM\x03\xed\0'),
  'EXIF, turned': segment(0xE1, b'Exif\0\0' + _TURN),
  'XMP, turned': segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0 tiff:Orientation="6" '),
  'a table too short': segment(0xDB, bytes(20)),
  'another frame': segment(0xC0, struct.pack('>BHHB', 8, 5, 7, 1) + b'\1\x11\0'),
  'a frame of 12 bits': segment(0xC1, struct.pack('>BHHB', 12, 37, 53, 1) + b'\1\x11\0'),
  'a length too short': b'\xff\xfe\0\1',
  'filling': b'\xff\xff\xff',
  'junk': b'junk',
}


@pytest.mark.parametrize('name', SEGMENTS)
@pytest.mark.parametrize('at', [2, 20])  # before and after JFIF's
@pytest.mark.filterwarnings('ignore')  # Pillow warns of broken EXIF
def test_segments_of_jpegs_are_as_pillow_has_them(name, at):
  data = FILES['jpeg'][:at] + SEGMENTS[name] + FILES['jpeg'][at:]
  np.testing.assert_array_equal(ours(data), pillow(data))


def test_a_hundred_megapixels_are_refused_by_their_header():
  jpeg = bytearray(FILES['jpeg'])
  at = jpeg.index(b'\xff\xc0') + 5  # start of frame: height, width
  jpeg[at : at + 4] = struct.pack('>HH', 10_000, 10_000)
  for data in (bytes(jpeg), png((10_000, 10_000, 8, 2, 0, 0, 0), b'')):
    assert ours(data) == 'too_many_pixels'
    with pytest.raises(BadDocument, match='too_many_pixels'):
      media.native_size(Image(data))


def test_no_bytes_are_no_image():
  assert ours(b'') == 'not_image'


@pytest.mark.parametrize('turn', range(1, 9))
def test_scaled_pixels_are_no_fewer_than_asked_and_the_size_is_the_native_one(turn):
  data = encoded(photo(210, 330), 'JPEG', quality=90, exif=exif(turn))
  want = pillow(data)
  for share, factor in ((1, 1), (2, 2), (3, 2), (4, 4), (9, 8), (99, 8)):
    least = tuple(side // share for side in want.shape[:2])
    pixels, native = decode.decode_scaled(data, lambda *_, least=least: least)
    assert native == want.shape[:2]
    assert pixels.shape[:2] == tuple(-(-side // factor) for side in native)
    # The means of whole squares (the last ones hang over where a side is uneven).
    rows, cols = (side // factor for side in native)
    if turn in (1, 6):
      x, X = (-cols, -cols * factor) if turn == 6 else (0, 0)
      whole = want[: rows * factor, X:][:, : cols * factor].astype(float)
      mean = whole.reshape(rows, factor, cols, factor, 3).mean((1, 3))
      assert np.abs(mean - pixels[:rows, x:][:, :cols]).mean() < 3


def test_other_files_are_never_scaled():
  for name in ('png', 'gif animated', 'jpeg CMYK'):
    pixels, native = decode.decode_scaled(FILES[name], lambda h, w: (1, 1))
    assert pixels.shape == (37, 53, 3) and native == (37, 53)


RULES = [
  dict(patch=14, size=112),
  dict(patch=16, resize='longest', size=160),
  dict(patch=16, resize='native', max_patches=70),
]


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('turn', [1, 6])
@pytest.mark.parametrize('resample', ['area', 'fast'])
def test_quick_filters_are_within_two_levels_of_bicubic_on_photos(rule, turn, resample):
  """Means of two levels, and one value of a hundred ten levels away or more."""
  rng = np.random.default_rng(0)
  for height, width in rng.integers(150, 700, (4, 2)):
    image = PIL.Image.fromarray(photo(height, width))
    image = image.filter(PIL.ImageFilter.GaussianBlur(0.7))  # as lenses do
    span = Image(encoded(image, 'JPEG', quality=90, exif=exif(turn)))
    grid, fast = ImageRule(**rule, resample=resample).patches_of(span)
    want_grid, want = ImageRule(**rule).patches_of(span)
    assert grid == want_grid
    gap = np.abs(fast.astype(int) - want)
    assert gap.mean() < 2 and np.quantile(gap, 0.99) < 10


@pytest.mark.parametrize('rule', RULES)
def test_bicubic_is_pillows_bit_by_bit(rule):
  made = ImageRule(**rule)
  for height, width in ((200, 311), (31, 500), (20, 15)):
    data = encoded(photo(height, width), 'JPEG')
    grid, patches = made.patches_of(Image(data))
    assert grid == made.grid(height, width)
    size = (grid[2] * made.patch, grid[1] * made.patch)
    want = PIL.Image.fromarray(pillow(data)).resize(size, PIL.Image.BICUBIC)
    np.testing.assert_array_equal(
      media.unpatchify(patches, *grid[1:], made.patch), np.asarray(want)
    )


@settings(max_examples=60)
@given(
  st.sampled_from(RULES),
  st.integers(1, 400),
  st.integers(1, 400),
  st.booleans(),
  st.sampled_from(['area', 'fast']),
)
def test_grids_know_nothing_of_scaled_decoding(rule, height, width, turned, resample):
  flat = PIL.Image.new('RGB', (width, height), (9, 99, 199))
  data = encoded(flat, 'JPEG', exif=exif(8 if turned else 1))
  made = ImageRule(**rule, resample=resample)
  native = (width, height) if turned else (height, width)
  grid, patches = made.patches_of(Image(data))
  assert grid == made.grid(*native) == made.grid(*media.native_size(Image(data))[1:])
  assert patches.shape == (grid[1] * grid[2], made.channels)
  assert np.abs(patches.reshape(-1, 3) - [9, 99, 199]).max() <= 3


def test_what_grows_is_bicubic_by_area_too():
  image = photo(20, 300)
  rule = dict(patch=8, size=64)
  np.testing.assert_array_equal(
    ImageRule(**rule, resample='area').patches(image), ImageRule(**rule).patches(image)
  )


@pytest.mark.parametrize('shape', [(300, 211), (20, 300), (90, 70)])
def test_fast_is_bicubic_within_a_few_levels_where_nothing_is_scaled(shape):
  image = photo(*shape)
  fast = ImageRule(8, size=64, resample='fast').patches(image)
  want = ImageRule(8, size=64).patches(image)
  gap = np.abs(fast.astype(int) - want)
  assert gap.max() <= 4 and gap.mean() < 0.5


def test_fast_is_the_same_on_every_processor():
  simd, options = media._simd()
  source = simd.ImageData(53, 37, simd.PixelType.U8x3, IMAGE.tobytes())
  want = media._convolved(np.asarray(IMAGE), (40, 24)).tobytes()
  resizer = simd.Resizer()
  best = resizer.cpu_extensions
  for extensions in {simd.CpuExtensions.none, best}:
    resizer.cpu_extensions = extensions
    made = simd.ImageData(40, 24, simd.PixelType.U8x3)
    resizer.resize(source, made, options)
    assert made.get_buffer() == want


@pytest.mark.parametrize(
  'resample, module, find',
  [('area', 'cv2', media._opencv), ('fast', 'cykooz_resizer', media._simd)],
)
def test_a_filter_without_its_library_names_the_extra(
  monkeypatch, resample, module, find
):
  find.cache_clear()
  monkeypatch.setitem(__import__('sys').modules, module, None)
  with pytest.raises(ValueError, match=rf'pip install mmjax\[{resample}\]'):
    ImageRule(8, size=8, resample=resample)
  find.cache_clear()


def test_a_wrong_filter_is_told():
  with pytest.raises(
    ValueError, match="resample='cubic'; choose 'bicubic', 'fast' or 'area'"
  ):
    ImageRule(8, size=8, resample='cubic')
