"""Video made ready: frames at set times, resized by rule, cut into patches.

  a film of 3.4 s at 25 frames/s, VideoRule(fps=2, tubelet=2)
  wanted at   0.0 0.5 | 1.0 1.5 | 2.0 2.5 | 3.0 3.0      the last is filled
  time        0         1         2         3
  patches     u8[4 * R * C, 2 * p * p * 3]

Wanted is the frame nearest to each time k / fps. Patches may be several frames deep
(tubelets: ViViT, 2103.15691; Qwen2-VL, 2409.12191).

A video's native size is (milliseconds, height, width), which is all that packing needs:
of files the time is that of their packets, which are read but not decoded, and the size
that of the first frame.
"""

import contextlib
import dataclasses
import functools
import io
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from mmjax.data import media
from mmjax.data.document import BadDocument, Video

RATES = (0.001, 1000.0)  # frames per second that can be meant
# Not all that FFmpeg knows: some of its formats (playlists) open other files.
_FORMATS = 'avi,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpegts,mpeg,ogg,gif,flv'
_MOST = 2**31 - 1  # sizes are kept in 32 bits

# Seconds since the first frame, and what makes its pixels u8[H, W, 3].
Frames = Iterator[tuple[Fraction, Callable[[], np.ndarray]]]


def native_size(span: Video, max_pixels: int = media.MAX_PIXELS) -> tuple[int, int, int]:
  """(milliseconds, height, width) of a video, rounded down.

  Of a file, what it says itself counts, not the span's rate.

  Raises:
    BadDocument: 'not_video', 'no_frames', 'truncated_video', 'bad_rate', 'zero_size',
      'too_many_pixels', 'too_long_video' or, of a sequence of images, what their
      decoding says.
    ValueError: the package for it isn't installed.
  """
  length, frames = _frames(span, max_pixels)
  with contextlib.closing(frames):
    _, pixels = next(frames, (None, None))
    if pixels is None:
      raise BadDocument('no_frames', 'no frame of it can be decoded')
    height, width, _ = pixels().shape
  return length, height, width


def _frames(span: Video, max_pixels: int) -> tuple[int, Frames]:
  """(milliseconds, frames) of a video."""
  if isinstance(span.frames, bytes):
    length, last, packets = _read(span.frames, max_pixels)
    return length, _decoded(packets, last, max_pixels)
  count = len(span.frames)
  if not count:
    raise BadDocument('no_frames', 'a video without frames')
  rate = _rate(span.fps)
  length = _length(count / rate)

  def pixels(i):
    return lambda: media.pixels(media.Image(span.frames[i]), max_pixels)

  return length, ((i / rate, pixels(i)) for i in range(count))


def _rate(fps: float) -> Fraction:
  if not RATES[0] <= fps <= RATES[1]:
    raise BadDocument(
      'bad_rate', f'{fps} frames per second; must be in {RATES[0]:g}..{RATES[1]:g}'
    )
  return Fraction(fps).limit_denominator(10**6)


def _length(seconds: Fraction) -> int:
  if seconds * 1000 > _MOST:
    raise BadDocument('too_long_video', f'{float(seconds):.0f} s')
  return max(1, math.floor(seconds * 1000))


def _read(data: bytes, max_pixels: int) -> tuple[int, Fraction, list[Any]]:
  """(milliseconds, seconds up to the last frame, packets) of a file's video stream."""
  av = _av()
  try:
    file = av.open(io.BytesIO(data), options={'format_whitelist': _FORMATS})
  except (av.FFmpegError, ValueError) as error:
    raise BadDocument(
      'not_video', f'{len(data)} bytes, no video file ({_line(error)})'
    ) from None
  # Not closed here: packets live as long as their file, and it as long as they.
  if not file.streams.video:
    raise BadDocument('no_frames', 'a file without a video stream')
  stream = file.streams.video[0]
  context = stream.codec_context
  if context is None:
    raise BadDocument('not_video', 'no decoder for its stream')
  _check_pixels(context.height, context.width, max_pixels)
  context.thread_count = 1  # loading is parallel over documents
  try:
    packets = [packet for packet in file.demux(stream) if packet.size]
  except av.FFmpegError as error:
    raise BadDocument('truncated_video', _line(error)) from None
  if not packets:
    raise BadDocument('no_frames', 'a video stream without frames')
  step = _step(stream)
  begins, seconds = _seconds(packets, stream, step)
  if len(packets) > 1 and len(packets) > RATES[1] * (seconds + step):
    raise BadDocument('bad_rate', f'{len(packets)} frames in {float(seconds):.3f} s')
  claimed = _claimed(file, stream)
  if seconds + 1.5 * step < claimed * 0.99:
    raise BadDocument(
      'truncated_video', f'{float(seconds):.2f} s of the {float(claimed):.2f} s it names'
    )
  return _length(seconds), max(begins) - min(begins), packets


def _step(stream) -> Fraction:
  """Seconds from frame to frame, on average."""
  return 1 / stream.average_rate if stream.average_rate else Fraction(1, 25)


def _seconds(packets, stream, step: Fraction) -> tuple[list[Fraction], Fraction]:
  """(when each packet begins, how long all take)."""
  begins, ends = [], []
  for i, packet in enumerate(packets):
    ticks = packet.dts if packet.pts is None else packet.pts
    begins.append(i * step if ticks is None else ticks * stream.time_base)
    takes = packet.duration * stream.time_base if packet.duration else step
    ends.append(begins[-1] + takes)
  return begins, max(ends) - min(begins)


def _claimed(file, stream) -> Fraction:
  """How long a file says that its video is; 0 where it doesn't."""
  if stream.duration:
    return stream.duration * stream.time_base
  alone = len(file.streams) == 1  # else it may be the sound that is so long
  return Fraction(file.duration or 0, 1_000_000) if alone else Fraction(0)


def _decoded(packets, last: Fraction, max_pixels: int) -> Frames:
  """The frames of packets in the order they are shown."""
  av = _av()
  stream = packets[0].stream
  count, first, at = 0, None, Fraction(0)
  try:
    for packet in (*packets, None):
      for frame in stream.codec_context.decode(packet):
        time = (
          count * _step(stream) if frame.pts is None else frame.pts * stream.time_base
        )
        first = time if first is None else first
        count, at = count + 1, time - first
        _check_pixels(frame.height, frame.width, max_pixels)
        yield at, functools.partial(_upright, frame)
  except av.FFmpegError as error:
    raise BadDocument(
      'truncated_video', f'after {count} frames: {_line(error)}'
    ) from None
  if count and at < last - 1:
    raise BadDocument(
      'truncated_video', f'frames end at {float(at):.2f} s of {float(last):.2f} s'
    )


def _upright(frame) -> np.ndarray:
  """The pixels u8[H, W, 3] of a frame, turned as the file says."""
  return np.rot90(frame.to_ndarray(format='rgb24'), round(frame.rotation / 90))


def _check_pixels(height: int, width: int, max_pixels: int) -> None:
  if height * width > max_pixels:
    raise BadDocument(
      'too_many_pixels', f'frames of {height} x {width}, more than {max_pixels} pixels'
    )


def _line(error) -> str:
  return ' '.join(str(error).split())


def _av():
  try:
    import av
  except ImportError:
    raise ValueError("video needs av: pip install 'mmjax[media]'") from None
  return av


def _nearest(frames: Frames, wanted: list[Fraction]) -> Frames:
  """The frame nearest to each of the ascending times; the earlier of two as near."""
  before, todo = None, iter(wanted)
  t = next(todo, None)
  for now in frames:
    while t is not None and t < now[0]:
      yield before if before and t - before[0] <= now[0] - t else now
      t = next(todo, None)
    if t is None:
      return
    before = now
  while t is not None and before:
    yield before
    t = next(todo, None)


@dataclasses.dataclass(frozen=True)
class VideoRule:
  """How a video becomes patches, a grid of (T, rows, columns).

  patch, resize, size, max_patches, max_pixels: of each frame, see `media.ImageRule`.
  fps: frames per second that are wanted, the first at 0 s.
  tubelet: frames per patch.
  max_frames: most frames of one video.
  longer: of a video with more of them, 'refuse' it, or 'spread' as many tubelets as there
    may be evenly over it.
  max_seconds: longer videos are refused.
  ticks: how many units of the time axis of positions are a second; None = fps / tubelet,
    so that tubelets without gaps count 0, 1, 2 (as in Qwen2-VL). See `audio.AudioRule`.

  Raises:
    ValueError: a value that makes no sense.
  """

  patch: int
  resize: str = 'fixed'
  size: int | None = None
  max_patches: int | None = None
  max_pixels: int = media.MAX_PIXELS
  fps: float = 1.0
  tubelet: int = 1
  max_frames: int = 32
  longer: str = 'refuse'
  max_seconds: float = 600.0
  ticks: float | None = None

  dtype = 'uint8'  # of the patches

  def __post_init__(self):
    try:
      self._image  # noqa: B018
    except ValueError as error:
      raise ValueError(f'video rule: {error}') from None
    if self.longer not in ('refuse', 'spread'):
      raise ValueError(f"video rule: longer={self.longer!r}; choose 'refuse' or 'spread'")
    if not RATES[0] <= self.fps <= RATES[1]:
      raise ValueError(f'video rule: fps={self.fps} is not in {RATES[0]:g}..{RATES[1]:g}')
    if not 1 <= self.tubelet <= self.max_frames:
      raise ValueError(
        f'video rule: tubelet={self.tubelet} is not in 1..max_frames={self.max_frames}'
      )
    if self.max_seconds <= 0 or (self.ticks is not None and self.ticks <= 0):
      raise ValueError(
        f'video rule: max_seconds={self.max_seconds} and ticks={self.ticks} must be > 0'
      )

  @functools.cached_property
  def _image(self) -> media.ImageRule:
    return media.ImageRule(
      self.patch, self.resize, self.size, self.max_patches, self.max_pixels
    )

  @property
  def channels(self) -> int:
    """Values per patch."""
    return self._image.channels * self.tubelet

  def grid(self, length: int, height: int, width: int) -> tuple[int, int, int]:
    """(tubelets, rows, columns) of a video of that native size.

    Raises:
      BadDocument: 'no_frames', 'too_long_video' or 'too_many_frames'.
    """
    return (len(self._tubelets(length)), *self._image.grid(height, width)[1:])

  def _tubelets(self, length: int) -> np.ndarray:
    """Which tubelets are taken, counted at the wanted rate without gaps."""
    if length < 1:
      raise BadDocument('no_frames', 'a video that takes no time')
    if length > self.max_seconds * 1000:
      raise BadDocument(
        'too_long_video', f'{length / 1000:.1f} s, more than {self.max_seconds:g} s'
      )
    count = -(-self._frames(length) // self.tubelet)
    most = self.max_frames // self.tubelet
    if count <= most:
      return np.arange(count)
    if self.longer == 'refuse':
      raise BadDocument(
        'too_many_frames', f'{length / 1000:.1f} s at {self.fps:g} frames per second,'
        f' more than {self.max_frames} frames'
      )  # fmt: skip
    return np.round(np.linspace(0, count - 1, most)).astype(np.int64)

  def _frames(self, length: int) -> int:
    """How many frames are wanted of a video of that many milliseconds."""
    return math.ceil(length * _rate(self.fps) / 1000)

  def times(self, length: int, height: int, width: int) -> np.ndarray:
    """Where on the time axis each tubelet of a video of that size begins, i32[T]."""
    seconds = self._tubelets(length) * (self.tubelet / self.fps)
    return np.round(seconds * self._ticks).astype(np.int32)

  def seconds(self, times: np.ndarray) -> np.ndarray:
    """Seconds since the video's beginning, of positions on the time axis."""
    return times / self._ticks

  @property
  def _ticks(self) -> float:
    return self.ticks or self.fps / self.tubelet

  def patches(self, span: Video) -> np.ndarray:
    """The patches of a video, u8[P, C]; flattened as (frame, row, column, channel).

    Raises:
      BadDocument: as `native_size` and `grid`.
    """
    length, frames = _frames(span, self.max_pixels)
    tubelets, last = self._tubelets(length), self._frames(length) - 1
    places = np.minimum(tubelets[:, None] * self.tubelet + np.arange(self.tubelet), last)
    wanted = [int(k) / _rate(self.fps) for k in places.ravel()]
    made, grid, before = [], None, None
    with contextlib.closing(frames):
      for now in _nearest(frames, wanted):
        if now is before:  # a rate above the video's own
          made.append(made[-1])
          continue
        pixels, before = now[1](), now
        grid = grid or self._image.grid(*pixels.shape[:2])
        made.append(self._image.patches(np.ascontiguousarray(pixels), grid))
    if not made:
      raise BadDocument('no_frames', 'no frame of it can be decoded')
    cut = np.stack(made).reshape(len(tubelets), self.tubelet, *made[0].shape)
    return cut.transpose(0, 2, 1, 3).reshape(-1, self.channels)
