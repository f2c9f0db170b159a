"""Pieces of sources: whole, in order, read anywhere."""

import json
import pickle

import pytest

from mmjax.data import source as source_lib
from mmjax.data import sources
from mmjax.data.document import BadDocument, Document, Text
from mmjax.data.source import Source, parse_range, ranges


class Words(Source):
  def pieces(self, splits=None):
    return ['ab', '', 'c']

  def read(self, piece, splits=None):
    for letter in piece:
      yield 'train', Document((Text(letter, True),))


def test_records_are_those_of_the_pieces_in_order():
  assert [d.spans[0].text for _, d in Words().records()] == ['a', 'b', 'c']
  assert Words().fingerprint() is None and Words().total() is None
  for call in (Source().pieces, lambda: Source().read('a')):
    with pytest.raises(NotImplementedError):
      call()


@pytest.mark.parametrize('total', [0, 1, 9, 10, 11])
def test_ranges_cover_all_once(total):
  found = [parse_range(piece) for piece in ranges('a b', total, 5)]
  assert [i for _, start, end in found for i in range(start, end)] == list(range(total))
  assert all(name == 'a b' for name, _, _ in found)
  for wrong in ('a', 'a 1:', '1:2'):
    with pytest.raises(ValueError, match='is no piece of this source'):
      parse_range(wrong)


def describe(records):
  return [
    (s, repr(d) if isinstance(d, BadDocument) else (d.id, d.meta, len(d.spans)))
    for s, d in records
  ]


def test_every_piece_can_be_read_alone_and_elsewhere(tmp_path, monkeypatch):
  monkeypatch.setattr('mmjax.data.jsonl._LINES', 3)
  monkeypatch.setattr('mmjax.data.html._PIECE', 2)
  with open(tmp_path / 'd.jsonl', 'w') as file:
    for i in range(10):
      spans = [{'text': 'a', 'trained': True}]
      line = {'spans': spans, 'split': ['train', 'test'][i % 2]}
      file.write(json.dumps(line) + '\n')
  for i in range(5):
    (tmp_path / f'{i}.html').write_text(f'<p>text {i}</p>')
  for spec, n, options in (
    (f'jsonl:{tmp_path}/d.jsonl', 4, {}),
    (f'html:{tmp_path}', 3, {'min_images': 0}),
  ):
    made = sources.build(spec, **options)
    pieces = made.pieces()
    assert len(pieces) == len(set(pieces)) == n
    assert pieces == sources.build(spec, **options).pieces()
    alone = [
      record
      for piece in reversed(pieces)
      for record in reversed(list(pickle.loads(pickle.dumps(made)).read(piece)))
    ]
    assert describe(reversed(alone)) == describe(made.records())
    for split in ('train', 'test'):
      want = [r for r in describe(made.records()) if r[0] == split]
      assert describe(made.records([split])) == want


def test_easy_vqa_in_pieces():
  pytest.importorskip('easy_vqa', reason='needs the package easy-vqa')
  made = sources.build('easy_vqa')
  assert len(made.pieces()) == 10 and len(made.pieces(['test'])) == 2
  ids = [
    document.id for piece in made.pieces(['test']) for _, document in made.read(piece)
  ]
  assert ids == [f'test/{i}' for i in range(1000)] and made.total(['test']) == 1000


def test_a_file_that_is_cut_meanwhile_is_told(tmp_path):
  (tmp_path / 'd.jsonl').write_text('{}\n' * 9)
  made = sources.build(f'jsonl:{tmp_path}/d.jsonl')
  (piece,) = made.pieces()
  (tmp_path / 'd.jsonl').write_text('{}\n')
  with pytest.raises(ValueError, match='d.jsonl: it was cut while it was read'):
    list(made.read(piece))


def test_all_sources_are_of_the_base():
  for name, cls in sources.SOURCES.items():
    assert issubclass(cls, source_lib.Source), name
    assert isinstance(cls.left_out, frozenset), name
