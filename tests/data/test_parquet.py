"""Parquet files laid out as on Hugging Face's hub; made here."""

import hashlib
import io
import json

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published import found, picture, reasons

from mmjax.data import sources
from mmjax.data.parquet import Parquet
from mmjax.data.prepare import prepare

FILE = pa.struct([('bytes', pa.binary()), ('path', pa.string())])  # datasets.Image
STRINGS = pa.list_(pa.string())
TURNS = pa.list_(pa.struct([('from', pa.string()), ('value', pa.string())]))
PARTS = pa.list_(
  pa.struct([('index', pa.int64()), ('text', pa.string()), ('type', pa.string())])
)
MESSAGES = pa.list_(pa.struct([('content', PARTS), ('role', pa.string())]))
CAULDRON = pa.list_(
  pa.struct([('user', pa.string()), ('assistant', pa.string()), ('source', pa.string())])
)
A, B = picture(1), picture(2)


def image(content, path=None):
  return {'bytes': content, 'path': path}


def write(path, columns, rows, group=1000):
  """columns: name -> type; rows: a tuple of values each."""
  table = pa.table({
    name: pa.array([row[i] for row in rows], kind)
    for i, (name, kind) in enumerate(columns.items())
  })  # fmt: skip
  path.parent.mkdir(exist_ok=True)
  pq.write_table(table, path, row_group_size=group)


def spans(tmp_path, columns, rows, **options):
  """Spans of the documents of one file, and the reasons of what was dropped."""
  write(tmp_path / 'x.parquet', columns, rows)
  good, bad = found(f'parquet:{tmp_path}/x.parquet', **options)
  return [s for _, s in good.values()], reasons(bad)


def test_captions_row_groups_and_splits(tmp_path):
  columns = {'image': FILE, 'caption': pa.string(), 'width': pa.int32()}
  rows = [(image(picture(i), f'{i}.png'), f'caption {i}', 8) for i in range(250)]
  write(tmp_path / 'data' / 'train-00000-of-00002.parquet', columns, rows[:100], 40)
  write(tmp_path / 'data' / 'train-00001-of-00002.parquet', columns, rows[100:200], 40)
  write(tmp_path / 'data' / 'validation-00000-of-00001.parquet', columns, rows[200:])
  spec = f'parquet:{tmp_path}/data/*.parquet'
  good, bad = found(spec)
  assert not bad
  ids = [f'train-0000{f}-of-00002.parquet#{i}' for f in range(2) for i in range(100)]
  ids += [f'validation-00000-of-00001.parquet#{i}' for i in range(50)]
  assert list(good) == ids
  for i, (split, plain) in enumerate(good.values()):
    assert split == ('train' if i < 200 else 'val')
    assert plain == [(picture(i), 0), (f'caption {i}', True, 0)]
  source = sources.build(spec)
  assert [p[-2:] for p in source.pieces()] == ['#0', '#1', '#2'] * 2 + ['#0']
  assert [p[-2:] for p in source.pieces(['val'])] == ['#0']
  assert (source.total(), source.total(['train']), source.total(['test'])) == (
    250,
    200,
    0,
  )
  assert Parquet(f'{tmp_path}/data/*', test_share=0.5).total(['test']) is None
  assert source.fingerprint() == sources.build(spec).fingerprint() is not None
  meta = prepare(spec, tmp_path / 'out', progress=False)
  assert {k: s['documents'] for k, s in meta['splits'].items()} == {
    'train': 200,
    'val': 50,
  }


@pytest.mark.parametrize(
  'columns, rows, want',
  [
    (  # Flickr30k: several captions
      {'image': FILE, 'caption': STRINGS, 'sentids': STRINGS},
      [(image(A), ['one', 'two '], ['0', '1'])],
      [[(A, 0), ('one', True, 1), ('two', True, 2)]],
    ),
    (  # a question with an answer
      {'question': pa.string(), 'answer': pa.string(), 'picture_file': FILE},
      [('Red?', 'yes', image(A))],
      [[(A, 0), ('Red?', False, 0), (' yes', True, 0)]],
    ),
    (  # LLaVA's turns; text alone has no image
      {'id': pa.string(), 'image': FILE, 'conversations': TURNS},
      [
        ('0', image(A), [{'from': 'human', 'value': 'Look: <image>\nWho?'},
                         {'from': 'gpt', 'value': 'Tom.'},
                         {'from': 'human', 'value': 'Sure?'},
                         {'from': 'gpt', 'value': 'Yes.'}]),
        ('1', None, [{'from': 'human', 'value': 'Hi'}, {'from': 'gpt', 'value': 'Ho'}]),
      ],
      [
        [('Look: ', False, 0), (A, 0), ('\nWho?', False, 0), (' Tom.', True, 0),
         ('Sure?', False, 0), (' Yes.', True, 0)],
        [('Hi', False, 0), (' Ho', True, 0)],
      ],
    ),
    (  # messages in parts, images by index
      {'messages': MESSAGES, 'images': pa.list_(FILE)},
      [([
        {'role': 'user', 'content': [
          {'index': None, 'text': 'Who?\n', 'type': 'text'},
          {'index': 1, 'text': None, 'type': 'image'},
          {'index': 0, 'text': None, 'type': 'image'}]},
        {'role': 'assistant', 'content': [
          {'index': None, 'text': 'Tom', 'type': 'text'}]},
      ], [image(A), image(B)])],
      [[('Who?\n', False, 0), (B, 0), (A, 0), ('Tom', True, 0)]],
    ),
    (  # a Sequence of {role, content} is kept as lists by name
      {'messages': pa.struct([('role', STRINGS), ('content', STRINGS)]),
       'images': pa.list_(FILE)},
      [({'role': ['user', 'assistant'], 'content': ['<image>Who?', 'Tom']}, [image(A)])],
      [[(A, 0), ('Who?', False, 0), (' Tom', True, 0)]],
    ),
    (  # The Cauldron
      {'images': pa.list_(FILE), 'texts': CAULDRON},
      [([image(A), image(B)], [{'user': 'Q1', 'assistant': 'A1', 'source': 's'},
                               {'user': 'Q2', 'assistant': 'A2', 'source': 's'}])],
      [[(A, 0), (B, 0), ('Q1', False, 0), (' A1', True, 0), ('Q2', False, 0),
        (' A2', True, 0)]],
    ),
  ],
)  # fmt: skip
def test_layouts(tmp_path, columns, rows, want):
  assert spans(tmp_path, columns, rows) == (want, [])


def test_roles_go_along(tmp_path):
  said = (('system', 'Be kind.'), ('human', '<image>Who?'), ('gpt', 'Tom'))
  turns = [{'from': role, 'value': value} for role, value in said]
  write(
    tmp_path / 'x.parquet', {'image': FILE, 'conversations': TURNS}, [(image(A), turns)]
  )
  ((_, document),) = sources.build(f'parquet:{tmp_path}/x.parquet').records()
  assert document.meta == {'roles': ['system', 'user', 'user', 'assistant']}


OBELICS = {'images': STRINGS, 'metadata': pa.string(), 'general_metadata': pa.string(),
           'texts': STRINGS}  # fmt: skip


def test_pages_of_obelics(tmp_path):
  url = 'https://cdn.example.com/a.jpg'
  rows = [
    ([url, None, None, 'https://b/b.jpg', None], json.dumps([]), '{}',
     [None, 'One.\n\nTwo.', ' ', None, 'Three.']),
    ([None, None], '[]', '{}', ['x', 'y']),
    ([None], '[]', '{}', ['x', 'y']),
  ]  # fmt: skip
  none, why = spans(tmp_path, OBELICS, rows)
  assert not none and why == ['bad_row'] + ['few_images'] * 2 + ['image_remote'] * 2
  folder = tmp_path / 'images'
  folder.mkdir()
  (folder / hashlib.sha256(url.encode()).hexdigest()).write_bytes(A)
  good, why = spans(tmp_path, OBELICS, rows, images=str(folder))
  assert good == [[(A, 0), ('One.\n\nTwo.\nThree.', True, 0)]]
  assert why == ['bad_row', 'few_images', 'missing_file']
  good, why = spans(tmp_path, OBELICS, rows, min_images=0)
  assert good[1] == [('x\ny', True, 0)] and why == ['bad_row'] + ['image_remote'] * 2
  # The same with the images in it, as after a download.
  columns = {**OBELICS, 'images': pa.list_(FILE)}
  rows = [([None, image(A)], '[]', '{}', ['x', None])]
  assert spans(tmp_path, columns, rows) == ([[('x', True, 0), (A, 0)]], [])


def test_images_by_path_and_plain_bytes(tmp_path):
  columns = {'image': pa.string(), 'text': pa.string()}
  (tmp_path / 'a.png').write_bytes(A)
  rows = [('a.png', 'x'), ('b.png', 'y'), ('../a.png', 'z'), ('', 'w')]
  good, why = spans(tmp_path, columns, rows, images=str(tmp_path))
  assert good == [[(A, 0), ('x', True, 0)]]
  assert why == ['missing_file', 'no_image', 'path_outside']
  assert spans(tmp_path, columns, rows[:1])[1] == ['missing_file']
  rows = [(image(None, 'a.png'), 'x'), (None, 'y')]
  columns = {'image': FILE, 'text': pa.string()}
  good, why = spans(tmp_path, columns, rows, images=str(tmp_path))
  assert good == [[(A, 0), ('x', True, 0)]] and why == ['no_image']
  columns = {'jpg': pa.binary(), 'en': pa.string(), 'de': pa.string()}
  got = spans(tmp_path, columns, [(A, 'cat', 'Katze')], text='de')
  assert got == ([[(A, 0), ('Katze', True, 0)]], [])
  got = spans(tmp_path, columns, [(A, 'cat', 'Katze')], text='de', image='none')
  assert got == ([[('Katze', True, 0)]], [])


def test_columns_that_are_missing_are_told_with_those_there_are(tmp_path):
  write(tmp_path / 'a.parquet', {'img': FILE, 'alt': pa.string()}, [(image(A), 'x')])
  spec = f'parquet:{tmp_path}/*.parquet'
  for options, match in (
    ({}, r'no column of texts \(.*caption.*\); there are: img, alt'),
    ({'text': 'alt', 'image': 'pic'}, "no column 'pic'; there are: img, alt"),
    ({'text': 'alt', 'prompt': 'q'}, "no column 'q'; there are: img, alt"),
  ):
    with pytest.raises(ValueError, match=match):
      found(spec, **options)
  write(tmp_path / 'c.parquet', {'caption': pa.string(), 'n': pa.int32()}, [('x', 1)])
  with pytest.raises(ValueError, match=r'no column of images .*; there are: caption, n'):
    found(f'parquet:{tmp_path}/c.parquet')
  # One file of several doesn't stop the others.
  good, bad = found(spec, text='alt')
  assert list(good) == ['a.parquet#0'] and reasons(bad) == ['missing_column']
  assert "no column 'alt'; there are: caption, n" in bad[0].message


def test_what_cannot_be_used_is_counted(tmp_path):
  columns = {'image': FILE, 'question': pa.string(), 'answers': STRINGS}
  rows = [(image(A), 'q', []), (image(A), 'q', [' ']), (image(A), 'q', ['a', 'b'])]
  good, why = spans(tmp_path, columns, rows)
  assert (
    good == [[(A, 0), ('q', False, 0), (' a', True, 0)]] and why == ['empty_text'] * 2
  )
  columns['question'] = STRINGS
  rows = [(image(A), ['q'], ['a', 'b']), (image(A), ['q', 'r'], ['a', 'b'])]
  good, why = spans(tmp_path, columns, rows)
  assert why == ['bad_row'] and [s[-1] for s in good[0][1:]] == [1, 1, 2, 2]
  columns = {'images': pa.list_(FILE), 'conversations': TURNS}

  def turn(text):
    return [{'from': 'human', 'value': text}, {'from': 'gpt', 'value': 'y'}]

  rows = [
    ([image(A)], turn('<image><image>')),
    ([image(A)], turn('x')),
    ([], turn('<image>')),
  ]
  assert spans(tmp_path, columns, rows) == ([], ['image_marks'] * 3)


def test_broken_and_vanished_files(tmp_path):
  columns, rows = {'image': FILE, 'text': pa.string()}, [(image(A), 'x')] * 4
  for name in ('a', 'b', 'c', 'd'):
    write(tmp_path / f'{name}.parquet', columns, rows, 2)
  (tmp_path / 'b.parquet').write_bytes((tmp_path / 'b.parquet').read_bytes()[:-20])
  whole = (tmp_path / 'c.parquet').read_bytes()
  (tmp_path / 'c.parquet').write_bytes(b'PAR1' + b'\xff' * (len(whole) // 3)
                                       + whole[4 + len(whole) // 3 :])  # fmt: skip
  source = sources.build(f'parquet:{tmp_path}/*.parquet')
  pieces = source.pieces()
  assert len(pieces) == 7 and source.total() == 12
  (tmp_path / 'd.parquet').unlink()
  records = [record for piece in pieces for _, record in source.read(piece)]
  bad = [r.reason for r in records if hasattr(r, 'reason')]
  assert bad.count('bad_file') in (2, 3) and bad.count('missing_file') == 2
  assert {r.id.split('#')[0] for r in records if hasattr(r, 'id')} >= {'a.parquet'}
  with pytest.raises(ValueError, match='no such file'):
    found(f'parquet:{tmp_path}/no')


def test_reads_from_buckets(tmp_path):
  file = io.BytesIO()
  pq.write_table(pa.table({'text': ['x'], 'image': pa.array([image(A)], FILE)}), file)
  fsspec.filesystem('memory').pipe_file(f'{tmp_path}/b/val/0.parquet', file.getvalue())
  good, bad = found(f'parquet:memory:/{tmp_path}/b/*/{{0..1}}.parquet')
  assert good == {'val/0.parquet#0': ('val', [(A, 0), ('x', True, 0)])} and not bad
