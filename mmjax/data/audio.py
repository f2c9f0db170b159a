"""Sound made ready: files decoded to samples, brought to one rate, cut into patches.

  8 kHz, 4.01 s        samples at 16 kHz       log-mel, hop 160 = 10 ms    patch = 4
  f32[32080]   soxr -> f32[64160]           -> f32[404, 80]             -> f32[101, 320]

The log-mel spectrogram is Whisper's (2212.04356, section 2.2): power of a windowed
Fourier transform through triangles on Slaney's mel scale, log10, no deeper than 8 below
its peak, (x + 4) / 4. A last patch that isn't full is filled with silence.

A sound's native size is (samples, samples per second, 1), of files by their header
alone: with it, packing is planned without decoding.
"""

import dataclasses
import functools
import io

import numpy as np

from mmjax.data.document import Audio, BadDocument

RATES = (1_000, 768_000)  # samples per second that can be meant
_FORMATS = ('WAV', 'WAVEX', 'RF64', 'W64', 'FLAC', 'OGG', 'MP3', 'AIFF', 'AU', 'CAF')
_MOST = 2**31 - 1  # sizes are kept in 32 bits


def decode_audio(data: bytes) -> tuple[np.ndarray, int]:
  """Decodes a sound file (WAV, FLAC, OGG with Vorbis or Opus, MP3, AIFF, AU, CAF).

  Returns:
    (f32[n] in [-1, 1], several channels averaged; samples per second).

  Raises:
    BadDocument: as `audio_size`, and 'truncated_audio' for what can't be read to its end.
    ValueError: the packages for it aren't installed.
  """
  with _open(data) as file:
    samples, rate = _size(file, data)
    try:
      wave = file.read(dtype='float32', always_2d=True)
    except Exception as error:  # libsndfile's, by their text alone
      raise BadDocument('truncated_audio', _line(error)) from None
    if len(wave) < samples:
      raise BadDocument(
        'truncated_audio', f'{len(wave)} of the {samples} samples of its header'
      )
  return wave[:samples].mean(axis=1), rate


def audio_size(data: bytes) -> tuple[int, int]:
  """(samples, samples per second) of a sound file by its header, without decoding.

  Raises:
    BadDocument: 'not_audio', 'zero_length', 'bad_rate', 'truncated_audio' or
      'too_long_audio' (more than 2**31 samples).
    ValueError: the packages for it aren't installed.
  """
  with _open(data) as file:
    return _size(file, data)


def native_size(span: Audio) -> tuple[int, int, int]:
  """(samples, samples per second, 1) of a sound; raises as `audio_size` does.

  Of a file, what its header says counts, not the span's rate.
  """
  if isinstance(span.wave, bytes):
    return (*audio_size(span.wave), 1)
  if span.wave.ndim != 1 or span.wave.dtype not in (np.float32, np.int16):
    raise BadDocument(
      'bad_span', f'sound is f32 or i16[n], not {span.wave.dtype}{list(span.wave.shape)}'
    )
  return (*_checked(len(span.wave), span.rate), 1)


def samples(span: Audio) -> tuple[np.ndarray, int]:
  """(f32[n], samples per second) of a sound, be it an array or a file.

  Raises:
    BadDocument: as `native_size` and `decode_audio`, and 'not_finite' for NaN or Inf.
  """
  if isinstance(span.wave, bytes):
    wave, rate = decode_audio(span.wave)
  else:
    wave, rate = span.wave, native_size(span)[1]
    if wave.dtype == np.int16:
      wave = wave.astype(np.float32) / 32768
  if not np.isfinite(wave).all():
    count = np.count_nonzero(~np.isfinite(wave))
    raise BadDocument('not_finite', f'{count} of {len(wave)} samples are NaN or infinite')
  return wave, rate


def _open(data: bytes):
  soundfile = _package('soundfile')
  try:
    file = soundfile.SoundFile(_File(data))
  except Exception as error:  # libsndfile's, by their text alone
    raise BadDocument(
      'not_audio', f'{len(data)} bytes, no sound file ({_line(error)})'
    ) from None
  if file.format not in _FORMATS:
    file.close()
    raise BadDocument('not_audio', f'{file.format}; choose among: {", ".join(_FORMATS)}')
  return file


class _File(io.BytesIO):
  """Bytes to be read by C: what can't be raised there stays where it is."""

  def seek(self, offset, whence=0):
    try:
      return super().seek(offset, whence)
    except ValueError:
      return self.tell()


def _line(error) -> str:
  return ' '.join(str(getattr(error, 'error_string', error)).split())


def _package(name: str):
  try:
    return __import__(name)
  except ImportError:
    raise ValueError(f"sound needs {name}: pip install 'mmjax[media]'") from None


def _size(file, data: bytes) -> tuple[int, int]:
  lacks = _missing(data)
  if lacks:
    raise BadDocument('truncated_audio', f'{lacks} bytes or more are missing')
  return _checked(file.frames, file.samplerate)


def _checked(count: int, rate: float) -> tuple[int, int]:
  if count < 1:
    raise BadDocument('zero_length', 'sound without a sample')
  if count > _MOST:
    raise BadDocument('too_long_audio', f'{count} samples')
  if not RATES[0] <= rate <= RATES[1] or rate != int(rate):
    raise BadDocument(
      'bad_rate', f'{rate} samples per second; must be whole, {RATES[0]} to {RATES[1]}'
    )
  return int(count), int(rate)


def _missing(data: bytes) -> int:
  """How many bytes a WAV, AIFF or OGG file lacks; libsndfile takes them as shorter ones.

  FLAC and MP3 say how many samples there should be, which is found on decoding.
  """
  if data[:4] in (b'RIFF', b'FORM'):
    size = int.from_bytes(data[4:8], 'little' if data[:1] == b'R' else 'big')
    # Writers into a pipe leave the largest number there is, about.
    return max(0, size + 8 - len(data)) if size < _MOST - 128 else 0
  if data[:4] == b'OggS':
    page = data.rfind(b'OggS')
    head = data[page : page + 27]
    if len(head) < 27 or not head[5] & 4:  # not the page that ends the stream
      return 1
    table = data[page + 27 : page + 27 + head[26]]
    return max(0, page + 27 + head[26] + sum(table) - len(data))
  return 0


def resample(wave: np.ndarray, rate: int, to: int) -> np.ndarray:
  """f32[n] at `rate` samples per second to f32[ceil(n * to / rate)] (soxr, HQ)."""
  if rate == to:
    return wave
  length = -(-len(wave) * to // rate)
  made = _package('soxr').resample(wave, rate, to)[:length]
  return np.pad(made, (0, length - len(made)))


@functools.lru_cache(16)
def mel_filters(bins: int, window: int, rate: int) -> np.ndarray:
  """Triangles on Slaney's mel scale, each of area one in Hz, f64[bins, window // 2 + 1].

  That scale is linear up to 1,000 Hz (15 mel) and logarithmic from there on, a factor
  of 6.4 in 27 mel (Auditory Toolbox, 1998), as in librosa and Whisper.
  """
  top = rate / 2
  end = top * 3 / 200 if top < 1000 else 15 + np.log(top / 1000) / (np.log(6.4) / 27)
  mel = np.linspace(0, end, bins + 2)
  hz = np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))
  low, middle, high = hz[:-2, None], hz[1:-1, None], hz[2:, None]
  at = np.linspace(0, top, window // 2 + 1)[None]
  rising, falling = (at - low) / (middle - low), (high - at) / (high - middle)
  filters = np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)
  filters.flags.writeable = False
  return filters


def log_mel(
  wave: np.ndarray,
  bins: int = 80,
  *,
  rate: int = 16_000,
  window: int = 400,
  hop: int = 160,
) -> np.ndarray:
  """Whisper's log-mel spectrogram, f32[n // hop, bins] of f32[n].

  Frame i is centred on sample i * hop; the wave is mirrored at its ends. Whisper pads
  sound to 30 s before, which moves nothing but the frames at the end.

  Args:
    wave: at `rate` samples per second.
    bins: mel bands; Whisper has 80, its large-v3 128.
    window: of the Fourier transform, in samples.
    hop: samples from frame to frame.
  """
  count = len(wave) // hop
  padded = np.pad(wave.astype(np.float64), window // 2, 'reflect')
  frames = np.lib.stride_tricks.sliding_window_view(padded, window)[: count * hop : hop]
  hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
  power = np.abs(np.fft.rfft(frames * hann[None], axis=1)) ** 2
  log = np.log10(np.maximum(power @ mel_filters(bins, window, rate).T, 1e-10))
  log = np.maximum(log, log.max(initial=-np.inf) - 8)
  return ((log + 4) / 4).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class AudioRule:
  """How a sound becomes patches: one after the other in time, a grid of (T, 1, 1).

  rate: samples per second that it is brought to.
  features: 'log_mel' (a frame is `bins` values) or 'raw' (a frame is `hop` samples).
  bins, window: of the spectrogram, see `log_mel`.
  hop: samples from frame to frame.
  patch: frames per patch.
  max_seconds: longer sounds are refused.
  pad: fills all with silence up to max_seconds, as Whisper does.
  ticks: how many units of the time axis of positions are a second; None = a unit per
    patch. The same number for sound and video puts both on one clock (25, that is 40 ms,
    in Qwen2.5-Omni, 2503.20215).

  Raises:
    ValueError: a value that makes no sense.
  """

  rate: int = 16_000
  features: str = 'log_mel'
  bins: int = 80
  window: int = 400
  hop: int = 160
  patch: int = 1
  max_seconds: float = 30.0
  pad: bool = False
  ticks: float | None = None

  dtype = 'float32'  # of the patches

  def __post_init__(self):
    if self.features not in ('log_mel', 'raw'):
      raise ValueError(
        f"audio rule: features={self.features!r}; choose 'log_mel' or 'raw'"
      )
    for name in ('bins', 'window', 'hop', 'patch'):
      if getattr(self, name) < 1:
        raise ValueError(f'audio rule: {name}={getattr(self, name)} must be >= 1')
    if not RATES[0] <= self.rate <= RATES[1]:
      raise ValueError(f'audio rule: rate={self.rate} is not in {RATES[0]}..{RATES[1]}')
    if self.max_seconds <= 0 or (self.ticks is not None and self.ticks <= 0):
      raise ValueError(
        f'audio rule: max_seconds={self.max_seconds} and ticks={self.ticks} must be > 0'
      )

  @property
  def channels(self) -> int:
    """Values per patch."""
    return self.patch * (self.bins if self.features == 'log_mel' else self.hop)

  def grid(self, count: int, rate: int, _: int = 1) -> tuple[int, int, int]:
    """(patches, 1, 1) of a sound of `count` samples, `rate` per second.

    Raises:
      BadDocument: 'zero_length', 'bad_rate' or 'too_long_audio'.
    """
    count, rate = _checked(count, rate)
    if count > self.max_seconds * rate:
      raise BadDocument(
        'too_long_audio', f'{count / rate:.1f} s, more than {self.max_seconds:g} s'
      )
    length = -(-count * self.rate // rate)
    if self.pad:
      length = max(length, int(self.max_seconds * self.rate))
    return -(-length // (self.hop * self.patch)), 1, 1

  def times(self, *size: int) -> np.ndarray:
    """Where on the time axis each patch of a sound of that native size begins, i32[T]."""
    seconds = np.arange(self.grid(*size)[0]) * (self.hop * self.patch / self.rate)
    return np.round(seconds * self._ticks).astype(np.int32)

  def seconds(self, times: np.ndarray) -> np.ndarray:
    """Seconds since the sound's beginning, of positions on the time axis."""
    return times / self._ticks

  @property
  def _ticks(self) -> float:
    return self.ticks or self.rate / (self.hop * self.patch)

  def patches(self, span: Audio) -> np.ndarray:
    """The patches of a sound, f32[T, C]; a patch is flattened as (frame, bin)."""
    wave, rate = samples(span)
    length = self.grid(len(wave), rate)[0] * self.hop * self.patch
    wave = resample(wave, rate, self.rate)
    wave = np.pad(wave, (0, length - len(wave)))
    if self.features == 'log_mel':
      options = dict(rate=self.rate, window=self.window, hop=self.hop)
      wave = log_mel(wave, self.bins, **options)
    return np.ascontiguousarray(wave, np.float32).reshape(-1, self.channels)
