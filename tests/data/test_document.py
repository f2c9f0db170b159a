"""Documents: what is written is read again; what is broken is named."""

import pickle

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmjax.data import document as lib
from mmjax.data.document import Audio, BadDocument, Document, Image, Text, Video
from mmjax.data.media import decode_image

text = st.text(st.characters(exclude_categories=['Cs']))
spans = st.one_of(
  st.builds(Text, text, st.booleans()),
  st.builds(Image, st.binary()),
  st.builds(Audio, st.binary(), st.floats(0, 1e6)),
  st.builds(Video, st.binary(), st.floats(0, 1e3)),
  st.builds(Video, st.lists(st.binary(), max_size=3).map(tuple), st.floats(0, 1e3)),
)


def fields(span):
  return (type(span), *vars(span).values())


@given(st.lists(spans), text, st.dictionaries(text, st.one_of(text, st.lists(text))))
def test_decode_gives_back_what_encode_took(some, name, meta):
  document = Document(tuple(some), name, meta)
  again = lib.decode(lib.encode(document))
  assert (again.id, again.meta) == (name, meta)
  assert list(map(fields, again.spans)) == list(map(fields, some))


def test_arrays_keep_values_type_and_shape(rng):
  image = rng.integers(0, 256, (5, 7, 3), np.uint8)
  wave = rng.normal(size=9).astype(np.float32)
  pcm = np.arange(-4, 4).astype('>i2')  # another byte order
  frames = rng.integers(0, 256, (2, 3, 4, 3), np.uint8)
  document = Document(
    (Image(image), Audio(wave, 16000), Audio(pcm, 8000), Video(frames, 25))
  )
  a, b, c, d = lib.decode(lib.encode(document)).spans
  np.testing.assert_array_equal(decode_image(a.content), image)
  for got, want in ((b.wave, wave), (c.wave, pcm), (d.frames, frames)):
    np.testing.assert_array_equal(got, want)
    assert got.dtype == want.dtype.newbyteorder('<')
  assert (b.rate, d.fps) == (16000, 25)


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.mark.parametrize(
  'span, reason',
  [
    ('text', 'unknown_span'),
    (Image(np.zeros((4, 4, 3), np.float32)), 'bad_span'),
    (Image(np.zeros((4, 4), np.uint8)), 'bad_span'),
    (Image(np.zeros((0, 4, 3), np.uint8)), 'zero_size'),
    (Audio(np.zeros(4, np.complex64), 1), 'bad_span'),
    (Video(np.zeros((4, 4, 3), np.uint8), 1), 'bad_span'),
    (Text('\ud800'), 'not_unicode'),
    (Text({1, 2}), 'bad_span'),
  ],
)
def test_encode_refuses(span, reason):
  with pytest.raises(BadDocument) as error:
    lib.encode(Document((span,)))
  assert error.value.reason == reason
  assert '\n' not in str(error.value)


def record(**changes):
  tree = {'version': 2, 'id': '', 'meta': {}, 'spans': [['text', 0, 'a', True]]}
  return msgpack.packb({**tree, **changes})


def test_record_is_readable_before_it_is_broken():
  assert lib.decode(record()).spans == (Text('a', True),)


@pytest.mark.parametrize(
  'data, reason',
  [
    (b'', 'unreadable_record'),
    (b'junk', 'unreadable_record'),
    (record()[:-3], 'unreadable_record'),
    (record() + b'more', 'unreadable_record'),
    (msgpack.packb([1]), 'unreadable_record'),
    (record(version=1), 'unknown_version'),
    (record(spans=7), 'unreadable_record'),
    (record(spans=[['smell', 0, b'']]), 'unknown_span'),
    (record(spans=[[]]), 'unreadable_record'),
    (record(spans=[['text', 0]]), 'unreadable_record'),
    (record(spans=[['text', '0', 'a', True]]), 'unreadable_record'),
    (record(spans=[['video', 0, [b'a', 7], 1.0]]), 'unreadable_record'),
    (record(spans=[['audio', {'dtype': '|O', 'shape': [1], 'data': b''}, 1]]),
     'unreadable_record'),
    (record(spans=[['audio', {'dtype': '<f4', 'shape': [3], 'data': b'1234'}, 1]]),
     'unreadable_record'),
  ],
)  # fmt: skip
def test_decode_refuses(data, reason):
  with pytest.raises(BadDocument) as error:
    lib.decode(data)
  assert error.value.reason == reason
  assert '\n' not in str(error.value)


def test_bad_document_survives_a_worker_process():
  error = pickle.loads(pickle.dumps(BadDocument('too_long', 'document 3')))
  assert (error.reason, str(error)) == ('too_long', 'too_long: document 3')
