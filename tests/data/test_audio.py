"""Sound: the spectrogram against its definition, files of every kind, bad ones told."""

import io

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.batch import Item
from mmjax.data import audio, media
from mmjax.data.audio import AudioRule, audio_size, decode_audio, log_mel, mel_filters
from mmjax.data.document import Audio, BadDocument, Document, Text
from mmjax.data.example import to_example
from mmjax.data.tokenizer import ByteTokenizer
from tests.packages import package_file

SOUNDS = 'usr/share/asterisk/sounds/en_US_f_Allison/'
# By file, what its samples lose; None = heard to be the same.
FORMATS = {
  ('WAV', 'PCM_16'): 2**-15, ('WAV', 'PCM_U8'): 2**-7, ('WAV', 'FLOAT'): 0.0,
  ('FLAC', 'PCM_24'): 2**-23, ('AIFF', 'PCM_16'): 2**-15, ('OGG', 'VORBIS'): None,
  ('OGG', 'OPUS'): None, ('MP3', 'MPEG_LAYER_III'): None,
}  # fmt: skip


def tones(seconds=0.5, rate=16_000, *hertz):
  """f32[n], a chord that swells."""
  t = np.arange(int(seconds * rate)) / rate
  chord = sum(np.sin(2 * np.pi * f * t) for f in hertz or (440, 1330))
  return (0.2 * chord * np.linspace(0.2, 1, len(t))).astype(np.float32)


def encoded(wave, rate=16_000, form='WAV', subtype=None):
  file = io.BytesIO()
  soundfile.write(file, wave, rate, format=form, subtype=subtype)
  return file.getvalue()


def reason_of(function, *args):
  with pytest.raises(BadDocument) as error:
    function(*args)
  assert '\n' not in str(error.value)
  return error.value.reason


def plain_log_mel(wave, bins, rate=16_000, window=400, hop=160):
  """The definition, written plainly: mirrored ends, a sum over samples per frequency."""

  def mel(f):
    return f * 3 / 200 if f < 1000 else 15 + 27 * np.log(f / 1000) / np.log(6.4)

  def hertz(m):
    return m * 200 / 3 if m < 15 else 1000 * 6.4 ** ((m - 15) / 27)

  edges = [hertz(m) for m in np.linspace(0, mel(rate / 2), bins + 2)]
  half = window // 2
  triangles = np.zeros((bins, half + 1))
  for b, (low, top, high) in enumerate(zip(edges, edges[1:], edges[2:])):
    for k in range(half + 1):
      f = k * rate / window
      share = min((f - low) / (top - low), (high - f) / (high - top))
      triangles[b, k] = max(share, 0) * 2 / (high - low)
  mirrored = np.concatenate([wave[half:0:-1], wave, wave[-2 : -half - 2 : -1]])
  n = np.arange(window)
  fourier = np.exp(-2j * np.pi * np.arange(half + 1)[:, None] * n / window)
  out = []
  for i in range(len(wave) // hop):
    frame = mirrored[i * hop : i * hop + window] * np.sin(np.pi * n / window) ** 2
    out.append(triangles @ np.abs(fourier @ frame) ** 2)
  out = np.log10(np.maximum(out, 1e-10))
  return (np.maximum(out, out.max() - 8) + 4) / 4


@pytest.mark.parametrize('bins', [80, 128])
def test_log_mel_follows_its_definition(bins):
  wave = tones(0.05) + 0.01 * np.random.default_rng(0).normal(size=800)
  got = log_mel(wave.astype(np.float32), bins)
  assert got.shape == (5, bins) and got.dtype == np.float32
  np.testing.assert_allclose(got, plain_log_mel(wave, bins), atol=1e-5)


@pytest.mark.parametrize('bins', [80, 128])
def test_log_mel_is_whispers(bins):
  transformers = pytest.importorskip(
    'transformers', reason="needs transformers: pip install 'mmjax[parity]'"
  )
  pytest.importorskip('torch')
  wave = np.pad(tones(2.0, 16_000, 200, 3000), (0, 28 * 16_000))
  extract = transformers.WhisperFeatureExtractor(feature_size=bins)
  want = extract(wave, sampling_rate=16_000, return_tensors='np').input_features[0]
  np.testing.assert_allclose(log_mel(wave, bins), want.T, atol=1e-4)


@pytest.mark.parametrize('bins', [80, 128])
def test_mel_filters_are_those_that_whisper_ships(bins):
  file = package_file(
    'openai_whisper-20250625',
    'whisper/assets/mel_filters.npz',
    'openai-whisper==20250625',
  )
  with np.load(file) as filters:
    want = filters[f'mel_{bins}']
  np.testing.assert_allclose(mel_filters(bins, 400, 16_000), want, atol=1e-7)


@pytest.mark.parametrize('form, loses', FORMATS.items())
def test_files_decode_to_their_samples_and_are_measured_by_header(form, loses):
  wave = tones()
  data = encoded(wave, 16_000, *form)
  got, rate = decode_audio(data)
  assert (len(got), rate) == audio_size(data) == (8000, 16_000)
  if loses is None:
    assert np.corrcoef(got[800:-800], wave[800:-800])[0, 1] > 0.99
  else:
    np.testing.assert_allclose(got, wave, atol=loses)
  assert media.native_size(Audio(data, 0)) == (8000, 16_000, 1)


def test_channels_are_averaged():
  left, right = tones(), tones(0.5, 16_000, 700)
  got, _ = decode_audio(encoded(np.stack([left, right], 1), subtype='FLOAT'))
  np.testing.assert_allclose(got, (left + right) / 2, atol=1e-7)


def test_integers_are_shares_of_their_range():
  got, _ = audio.samples(Audio(np.array([0, 16384, -32768], np.int16), 8000))
  assert got.tolist() == [0, 0.5, -1] and got.dtype == np.float32


@pytest.mark.parametrize('rate', [8000, 11_025, 22_050, 44_100, 48_000])
def test_a_sound_is_the_same_at_any_rate(rate):
  rule = AudioRule(hop=160, patch=2)
  want = rule.patches(Audio(tones(), 16_000))
  got = rule.patches(Audio(tones(0.5, rate), rate))
  assert got.shape == want.shape == (25, 160)
  # Where there is something to hear; what lies below differs by the filter.
  loud = want > want.max() - 0.75
  loud[[0, -1]] = False
  assert loud.sum() > 100
  np.testing.assert_allclose(got[loud], want[loud], atol=0.02)


@given(
  count=st.integers(1, 4000),
  rate=st.integers(1000, 50_000),
  to=st.sampled_from([8000, 16_000]),
  hop=st.integers(16, 200),
  patch=st.integers(1, 5),
  features=st.sampled_from(['log_mel', 'raw']),
  pad=st.booleans(),
)
@settings(max_examples=40)
def test_patches_are_as_many_as_planned(count, rate, to, hop, patch, features, pad):
  rule = AudioRule(
    to, features, bins=4, window=64, hop=hop, patch=patch, max_seconds=4, pad=pad
  )
  span = Audio(np.sin(np.arange(count)).astype(np.float32), rate)
  T, *rest = rule.grid(*media.native_size(span))
  got = rule.patches(span)
  assert got.shape == (T, rule.channels) and rest == [1, 1]
  assert got.dtype == rule.dtype == 'float32' and np.isfinite(got).all()
  # No more silence than fills the last patch.
  least = max(count / rate * to, 4 * to * pad)
  assert (T - 1) * hop * patch < least <= T * hop * patch


def test_raw_patches_are_the_samples():
  wave = tones(0.01)
  got = AudioRule(features='raw', hop=32, patch=2).patches(Audio(wave, 16_000))
  np.testing.assert_array_equal(got.ravel(), np.pad(wave, (0, 32)))


def test_a_padded_sound_is_as_whisper_takes_it():
  wave = tones()
  got = AudioRule(pad=True, max_seconds=2.0).patches(Audio(wave, 16_000))
  np.testing.assert_array_equal(got, log_mel(np.pad(wave, (0, 24_000))))


def spoken(wave):
  return Document((Audio(wave, 16_000), Text('a', True)))


@pytest.mark.parametrize('ticks, want', [(None, [0, 1, 2, 3]), (25, [0, 2, 4, 6])])
def test_positions_tell_the_time(ticks, want):
  rule = AudioRule(hop=160, patch=8, ticks=ticks)  # 80 ms a patch
  made = to_example(
    spoken(tones(0.3)),
    tokenizer=ByteTokenizer(),
    rules={'audio': rule},
    slots=lambda item: item.grid,
  )
  assert made.media['audio'].positions.tolist() == [[t, 0, 0] for t in want]
  assert made.positions[:4].tolist() == [[t, 0, 0] for t in want]
  assert made.positions[4].tolist() == [want[-1] + 1] * 3
  np.testing.assert_allclose(rule.seconds(made.media['audio'].positions[:, 0]),
                             [0, 0.08, 0.16, 0.24])  # fmt: skip


def test_slots_of_several_patches_stand_where_their_first_does():
  made = to_example(
    spoken(tones(0.32)),
    tokenizer=ByteTokenizer(),
    rules={'audio': AudioRule(patch=4, ticks=25)},
    slots=lambda item: (item.grid[0] // 2, 1, 1),
  )
  assert made.positions[:4, 0].tolist() == [0, 2, 4, 6]
  assert Item('audio', (8, 1, 1)).grid[0] == len(made.media['audio'].values)


def holes(value):
  wave = tones()
  wave[7] = value
  return encoded(wave, subtype='FLOAT')


def claiming(rate):
  data = bytearray(encoded(tones()))
  data[24:28] = rate.to_bytes(4, 'little')
  return bytes(data)


def cut(share, *form):
  data = encoded(tones(8), 16_000, *form)
  return data[: int(share * len(data))]


BAD = {
  'nothing at all': (b'', 'not_audio'),
  'no sound file': (b'GIF89a' * 40, 'not_audio'),
  'a picture': (b'\x89PNG\r\n\x1a\n' + bytes(90), 'not_audio'),
  'another format': (encoded(tones(), form='VOC', subtype='PCM_16'), 'not_audio'),
  'a header alone': (encoded(tones())[:30], 'not_audio'),
  'no samples': (encoded(tones(0)), 'zero_length'),
  'NaN': (holes(np.nan), 'not_finite'),
  'infinite': (holes(-np.inf), 'not_finite'),
  'one sample a second': (claiming(1), 'bad_rate'),
  'billions of samples a second': (claiming(2_000_000_000), 'bad_rate'),
  'half a WAV': (cut(0.5), 'truncated_audio'),
  'half an AIFF': (cut(0.5, 'AIFF'), 'truncated_audio'),
  'half a FLAC': (cut(0.5, 'FLAC'), 'truncated_audio'),
  'half a Vorbis': (cut(0.5, 'OGG', 'VORBIS'), 'truncated_audio'),
  'most of an Opus': (cut(0.99, 'OGG', 'OPUS'), 'truncated_audio'),
  'half an MP3': (cut(0.5, 'MP3', 'MPEG_LAYER_III'), 'truncated_audio'),
  'too long': (encoded(tones(2.5)), 'too_long_audio'),
  'no samples in an array': (np.zeros(0, np.float32), 'zero_length'),
  'NaN in an array': (np.full(800, np.nan, np.float32), 'not_finite'),
  'two axes': (np.zeros((2, 800), np.float32), 'bad_span'),
  'f64': (np.zeros(800), 'bad_span'),
}


@pytest.mark.parametrize('wave, reason', BAD.values(), ids=BAD)
def test_bad_sound_is_told_by_reason(wave, reason):
  assert reason_of(AudioRule(max_seconds=2.0).patches, Audio(wave, 16_000)) == reason


@pytest.mark.parametrize('rate', [0, 7, 8000.5, 1e7, float('nan')])
def test_absurd_rates_of_arrays_are_told(rate):
  assert reason_of(media.native_size, Audio(tones(), rate)) == 'bad_rate'


def test_a_wave_file_written_into_a_pipe_may_not_know_its_length():
  data = bytearray(encoded(tones()))
  data[4:8] = b'\xff\xff\xff\xff'
  assert audio_size(bytes(data)) == (8000, 16_000)


@given(st.binary(max_size=200), st.sampled_from([b'', b'RIFF', b'OggS', b'fLaC', b'ID3']))
@settings(max_examples=40)
def test_garbage_is_a_bad_document(data, magic):
  with pytest.raises(BadDocument):
    decode_audio(magic + data)


@pytest.mark.parametrize(
  'fields, message',
  [
    (dict(features='mfcc'), "features='mfcc'; choose 'log_mel' or 'raw'"),
    (dict(bins=0), 'bins=0 must be >= 1'),
    (dict(window=0), 'window=0 must be >= 1'),
    (dict(hop=0), 'hop=0 must be >= 1'),
    (dict(patch=0), 'patch=0 must be >= 1'),
    (dict(rate=10), 'rate=10 is not in 1000..768000'),
    (dict(max_seconds=0), 'max_seconds=0 and ticks=None must be > 0'),
    (dict(ticks=-1), 'ticks=-1 must be > 0'),
  ],
)
def test_a_rule_that_makes_no_sense_is_refused(fields, message):
  with pytest.raises(ValueError, match=f'audio rule: .*{message}'):
    AudioRule(**fields)


@pytest.mark.parametrize('name', ['soundfile', 'soxr'])
def test_missing_packages_are_named(monkeypatch, name):
  monkeypatch.setitem(__import__('sys').modules, name, None)
  with pytest.raises(ValueError, match=rf"{name}: pip install 'mmjax\[media\]'"):
    AudioRule().patches(Audio(encoded(tones(0.5, 8000), 8000), 0))


def test_spoken_prompts_of_asterisk_become_patches():
  folder = package_file(
    'asterisk-core-sounds-en-wav', SOUNDS, 'nothing: it is a package of Debian'
  )
  rule = AudioRule(patch=4)
  files = sorted(folder.glob('*.wav'))[:20]
  assert files
  for path in files:
    span = Audio(path.read_bytes(), 0)
    count, rate, _ = media.native_size(span)
    got = rule.patches(span)
    assert rate == 8000
    assert len(got) == -(-count * 2 // 640) == rule.grid(count, rate)[0]
    # Nothing to hear above 4 kHz, where half the bands of 80 end at bin 60.
    frames = got.reshape(-1, 80)
    assert frames[:, :50].max() > frames[:, 65:].max() + 0.25
