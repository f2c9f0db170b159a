"""Video: which frames are taken and when, files of every kind, bad ones told."""

import io
import math
from fractions import Fraction

import av
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.data import document as document_lib
from mmjax.data import media, video
from mmjax.data.document import BadDocument, Document, Text, Video
from mmjax.data.example import to_example
from mmjax.data.media import ImageRule, unpatchify
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.data.video import VideoRule
from tests.packages import package_file

# Container: codec and pixels that lose nothing, where it has such.
LOSSLESS = {
  'avi': ('png', 'rgb24'),
  'mov': ('png', 'rgb24'),
  'matroska': ('ffv1', 'bgr0'),
}
LOSSY = {
  'mp4': ('libx264', 'yuv420p'), 'webm': ('libvpx-vp9', 'yuv420p'),
  'gif': ('gif', 'rgb8'), 'mpegts': ('mpeg2video', 'yuv420p'),
}  # fmt: skip
EXAMPLES = 'usr/share/doc/opencv-doc/examples/data'


def film(n, height=16, width=24):
  """u8[n, H, W, 3] of one grey each, 10 apart; the first pixel is another."""
  frames = np.repeat(np.arange(n, dtype=np.uint8) * 10, height * width * 3)
  frames = frames.reshape(n, height, width, 3)
  frames[:, :4, :4] = 255
  return frames


def encoded(frames, form='avi', fps=10, turned=0):
  codec, pixels = (LOSSLESS | LOSSY)[form]
  file = io.BytesIO()
  with av.open(file, 'w', format=form) as out:
    stream = out.add_stream(codec, rate=Fraction(fps))
    stream.height, stream.width = frames[0].shape[:2]
    stream.pix_fmt = pixels
    if turned:
      stream.set_display_rotation(turned)
    for frame in frames:
      out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, 'rgb24')))
    out.mux(stream.encode())
  return file.getvalue()


def sound_alone():
  file = io.BytesIO()
  with av.open(file, 'w', format='matroska') as out:
    stream = out.add_stream('pcm_s16le', rate=8000, layout='mono')
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), 's16', 'mono')
    frame.sample_rate = 8000
    out.mux(stream.encode(frame))
    out.mux(stream.encode())
  return file.getvalue()


def image(pixels, form='PNG'):
  file = io.BytesIO()
  PIL.Image.fromarray(pixels).save(file, form)
  return file.getvalue()


def greys(patches, rule):
  """Which frame each patch's frames show: [T * R * C, tubelet]."""
  return patches.reshape(len(patches), rule.tubelet, -1)[..., -1] // 10


def reason_of(function, *args):
  with pytest.raises(BadDocument) as error:
    function(*args)
  assert '\n' not in str(error.value)
  return error.value.reason


def rule(**fields):
  return VideoRule(
    **dict(patch=8, resize='native', max_patches=6, max_frames=99) | fields
  )


@pytest.mark.parametrize('form', LOSSLESS)
@pytest.mark.parametrize('fps', [10, Fraction(30_000, 1001)])
def test_a_file_is_the_array_of_its_frames(form, fps):
  frames, ours = film(13), rule(fps=float(fps))
  array = Video(frames, float(fps))
  span = Video(encoded(frames, form, fps), 0)
  size = media.native_size(span)
  assert size == media.native_size(array) == (math.floor(13_000 / fps), 16, 24)
  np.testing.assert_array_equal(ours.patches(span), ours.patches(array))
  assert ours.grid(*size) == (13, 2, 3)


@pytest.mark.parametrize('form', LOSSY)
def test_lossy_files_show_about_the_same(form):
  span = Video(encoded(film(13), form), 0)
  assert media.native_size(span) == (1300, 16, 24)
  got, want = (rule(fps=5).patches(s) for s in (span, Video(film(13), 10)))
  shown, meant = (x.reshape(7, -1)[:, -600:].mean(1) for x in (got, want))
  assert np.corrcoef(shown, meant)[0, 1] > 0.99 and shown[-1] - shown[0] > 100


def test_image_files_are_frames_too():
  frames = film(5)
  files = Video(tuple(map(image, frames)), 2)
  want = rule(fps=2).patches(Video(frames, 2))
  np.testing.assert_array_equal(rule(fps=2).patches(files), want)
  assert media.native_size(files) == (2500, 16, 24)
  document = Document((files, Text('a', True, 1)), 'x')
  (kept, _) = document_lib.decode(document_lib.encode(document)).spans
  assert (kept.frames, kept.fps, kept.branch) == (files.frames, 2, 0)


def test_frames_of_other_sizes_take_the_place_of_the_first():
  files = Video((image(film(1)[0]), image(film(1, 30, 20)[0])), 1)
  assert rule().patches(files).shape == (12, 192)


@given(
  n=st.integers(1, 25),
  fps=st.sampled_from([0.5, 1, 7, 10, 23.976, 25, 29.97, 60]),
  wanted=st.sampled_from([0.2, 1, 2, 3.3, 10, 23.976, 30]),
  tubelet=st.integers(1, 3),
  most=st.integers(3, 9),
)
@settings(max_examples=60)
def test_taken_is_the_frame_nearest_to_each_wanted_time(n, fps, wanted, tubelet, most):
  ours = rule(
    fps=wanted, tubelet=tubelet, max_frames=most, longer='spread', resize='fixed', size=8
  )
  span = Video(film(n, 8, 8), fps)
  size = media.native_size(span)
  T, rows, cols = ours.grid(*size)
  patches = ours.patches(span)
  assert patches.shape == (T * rows * cols, ours.channels)
  assert T * tubelet <= max(most, tubelet) and patches.dtype == ours.dtype == 'uint8'
  seconds = ours.seconds(ours.times(*size))
  assert seconds[0] == 0 and (np.diff(seconds) > 0).all()
  wholes = math.ceil(math.floor(1000 * n / fps) * wanted / 1000 - 1e-9)
  for start, shown in zip(seconds, greys(patches, ours).tolist()):
    for j, frame in enumerate(shown):
      t = min(start + j / wanted, (wholes - 1) / wanted)
      off = np.abs(np.arange(n) / fps - t)
      assert off[frame] <= off.min() + 1e-6
  if most >= wholes + tubelet:  # none is left out
    assert len(seconds) == -(-wholes // tubelet)


@given(n=st.integers(1, 25), fps=st.sampled_from([0.3, 1, 7, 23.976, 29.97, 59.94, 240]))
def test_the_own_rate_takes_each_frame_once(n, fps):
  ours = rule(fps=fps)
  patches = ours.patches(Video(film(n, 8, 8), fps))
  assert greys(patches, ours)[:, 0].tolist() == list(range(n))


def test_a_patch_holds_its_frames_one_after_the_other():
  frames = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), np.uint8)
  ours = rule(fps=4, tubelet=2)
  patches = ours.patches(Video(frames, 4)).reshape(2, 6, 2, 192)
  for k, frame in enumerate([0, 1, 2, 2]):  # the last is filled by the last
    got = unpatchify(patches[k // 2, :, k % 2], 2, 3, 8)
    np.testing.assert_array_equal(got, frames[frame])


def test_frames_are_resized_as_images_are():
  frames = np.random.default_rng(0).integers(0, 256, (2, 30, 50, 3), np.uint8)
  fields = dict(patch=8, resize='longest', size=32)
  ours, images = VideoRule(**fields, fps=1), ImageRule(**fields)
  assert ours.grid(2000, 30, 50) == (2, *images.grid(30, 50)[1:])
  want = np.concatenate([images.patches(frame) for frame in frames])
  np.testing.assert_array_equal(ours.patches(Video(frames, 1)), want)


@pytest.mark.parametrize(
  'turned, corner', [(90, (-1, 0)), (180, (-1, -1)), (-90, (0, -1))]
)
def test_a_film_taken_upright_stands_upright(turned, corner):
  span = Video(encoded(film(2), 'mov', turned=turned), 0)
  size = (16, 24) if turned == 180 else (24, 16)
  assert media.native_size(span)[1:] == size
  _, frames = video._frames(span, 10**6)
  pixels = next(frames)[1]()
  assert pixels.shape == (*size, 3)
  corners = {(y, x) for y in (0, -1) for x in (0, -1) if pixels[y, x, 0] == 255}
  assert corners == {corner}


def places(span, ours, slots=lambda item: item.grid):
  made = to_example(
    Document((Text('ab'), span, Text('c', True))),
    tokenizer=ByteTokenizer(),
    rules={'video': ours},
    slots=slots,
  )
  return made.media['video'].positions, made.positions


def test_positions_count_tubelets_or_ticks():
  span = Video(film(6), 2)  # 3 s
  bank, stream = places(span, rule(fps=2, tubelet=2))
  assert bank[::6].tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0]]
  assert bank[5].tolist() == [0, 1, 2]
  np.testing.assert_array_equal(stream[2:-2], bank + 2)
  assert stream[-2:].tolist() == [[5] * 3, [6] * 3]
  bank, stream = places(span, rule(fps=2, tubelet=2, ticks=25))
  assert bank[::6, 0].tolist() == [0, 25, 50]
  np.testing.assert_array_equal(stream[2:-2], bank + 2)
  assert stream[-2:].tolist() == [[53] * 3, [54] * 3]
  assert rule(fps=2, tubelet=2, ticks=25).seconds(bank[::6, 0]).tolist() == [0, 1, 2]
  # One slot for two tubelets stands where the first does.
  _, stream = places(span, rule(fps=2, ticks=10), lambda item: (item.grid[0] // 2, 1, 1))
  assert stream[2:5, 0].tolist() == [2, 12, 22]


def test_spread_frames_keep_their_times():
  span = Video(film(25), 5)  # 5 s
  ours = rule(fps=5, max_frames=4, longer='spread')
  bank, _ = places(span, ours)
  assert bank[::6, 0].tolist() == [0, 8, 16, 24]
  assert greys(ours.patches(span), ours)[::6, 0].tolist() == [0, 8, 16, 24]
  np.testing.assert_allclose(ours.seconds(bank[::6, 0]), [0, 1.6, 3.2, 4.8])


def cut(share, form):
  noise = np.random.default_rng(0).integers(0, 256, (13, 40, 40, 3), np.uint8)
  data = encoded(noise, form)
  return data[: int(share * len(data))]


def damaged():
  """A film with nothing but zeros for its later frames."""
  data = bytearray(encoded(film(13)))
  data[len(data) // 2 : -600] = bytes(len(data) - 600 - len(data) // 2)
  return bytes(data)


BAD = {
  'nothing at all': (b'', 'not_video'),
  'no film': (b'RIFF' * 90, 'not_video'),
  'a playlist': (b'#EXTM3U\n#EXTINF:9,\nother.ts\n#EXT-X-ENDLIST\n', 'not_video'),
  'a list of files': (b"ffconcat version 1.0\nfile 'other.avi'\n", 'not_video'),
  'sound alone': (sound_alone(), 'no_frames'),
  'half an AVI': (cut(0.5, 'avi'), 'truncated_video'),
  'most of an AVI': (cut(0.9, 'avi'), 'truncated_video'),
  'half an MKV': (cut(0.5, 'matroska'), 'truncated_video'),
  'most of a WebM': (cut(0.9, 'webm'), 'truncated_video'),
  'an index cut short': (cut(0.9, 'mp4'), 'not_video'),
  'thousands of frames a second': (encoded(film(9), 'mov', 5000), 'bad_rate'),
  'half a MOV': (cut(0.5, 'mov'), 'not_video'),
  'damaged frames': (damaged(), 'truncated_video'),
  'too many pixels': (encoded(film(2, 80, 80)), 'too_many_pixels'),
  'too long': (Video(film(8), 1), 'too_long_video'),
  'too many frames': (Video(film(13), 3), 'too_many_frames'),
  'an array of no frames': (film(0), 'no_frames'),
  'a sequence of no images': ((), 'no_frames'),
  'frames without pixels': (film(2)[:, :0], 'zero_size'),
  'frames too large': (film(2, 80, 80), 'too_many_pixels'),
  'f32 frames': (film(2).astype(np.float32), 'bad_span'),
  'no images': (Video((image(film(1)[0]), b'junk'), 2), 'not_image'),
  'a cut image': (
    Video((image(film(1)[0]), image(film(1)[0])[:60]), 2),
    'truncated_image',
  ),
  'no rate': (Video(film(2), 0), 'bad_rate'),
  'an absurd rate': (Video(film(2), 1e6), 'bad_rate'),
  'NaN for a rate': (Video(film(2), float('nan')), 'bad_rate'),
  'images that take years': (Video((b'',) * 9000, 0.001), 'too_long_video'),
}


@pytest.mark.parametrize('frames, reason', BAD.values(), ids=BAD)
def test_bad_video_is_told_by_reason(frames, reason):
  span = frames if isinstance(frames, Video) else Video(frames, 5)
  ours = rule(fps=2, max_pixels=4000, max_seconds=7, max_frames=8)
  assert reason_of(ours.patches, span) == reason


def test_a_playlist_opens_no_other_file(tmp_path, monkeypatch):
  (tmp_path / 'other.avi').write_bytes(encoded(film(2)))
  monkeypatch.chdir(tmp_path)
  list_ = b"ffconcat version 1.0\nfile 'other.avi'\n"
  assert reason_of(media.native_size, Video(list_, 1)) == 'not_video'


@given(
  st.binary(max_size=300), st.sampled_from([b'', b'GIF89a', b'\x1aE\xdf\xa3', b'FLV'])
)
@settings(max_examples=30)
def test_garbage_is_a_bad_document(data, magic):
  with pytest.raises(BadDocument):
    rule().patches(Video(magic + data, 1))


@pytest.mark.parametrize(
  'fields, message',
  [
    (dict(patch=0), 'native. needs patch >= 1'),
    (dict(resize='crop'), "resize='crop'; choose"),
    (dict(longer='cut'), "longer='cut'; choose 'refuse' or 'spread'"),
    (dict(fps=0), 'fps=0 is not in 0.001..1000'),
    (dict(tubelet=0), 'tubelet=0 is not in 1..max_frames=99'),
    (dict(tubelet=3, max_frames=2), 'tubelet=3 is not in 1..max_frames=2'),
    (dict(max_seconds=0), 'max_seconds=0 and ticks=None must be > 0'),
    (dict(ticks=0), 'ticks=0 must be > 0'),
  ],
)
def test_a_rule_that_makes_no_sense_is_refused(fields, message):
  with pytest.raises(ValueError, match=f'video rule: .*{message}'):
    rule(**fields)


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'av', None)
  with pytest.raises(ValueError, match=r"av: pip install 'mmjax\[media\]'"):
    rule().patches(Video(b'', 0))


def test_the_films_of_opencv_become_patches():
  folder = package_file('opencv-doc', EXAMPLES, 'nothing: it is a package of Debian')
  span = Video((folder / 'tree.avi').read_bytes(), 0)
  assert media.native_size(span) == (29_600, 240, 320)
  ours = VideoRule(16, size=32, fps=1, tubelet=2)
  assert ours.patches(span).shape == (15 * 4, 1536)
  walkers = Video((folder / 'vtest.avi').read_bytes(), 0)
  assert media.native_size(walkers) == (79_500, 576, 768)  # 795 frames, 10 a second
  few = VideoRule(16, size=32, fps=10, max_frames=16, longer='spread')
  assert few.grid(79_500, 576, 768) == (16, 2, 2)
