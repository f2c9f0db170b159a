"""What all sources of published layouts have in common."""

import pickle

import published
import pytest
from published import plain
from test_coco import captions
from test_llava import entry
from test_mmc4 import page
from test_mmc4 import write as write_pages
from test_parquet import FILE, image
from test_parquet import write as write_parquet
from test_vqa2 import vqa
from test_webdataset import samples, tar

from mmjax.data import sources
from mmjax.data.document import BadDocument
from mmjax.data.source import Files, Source, share_of, split_of


def llava(root):
  (root / 'a.png').write_bytes(published.picture(1))
  entries = [entry(i, f'<image>{i}', 'x', image='a.png') for i in range(600)]
  published.write_json(root / 'x.json', [*entries, entry(9, 'no mark', 'x')])
  return f'llava:{root}/x.json', {}


def mmc4(root):
  pages = [page(['x', 'y'], [('a.jpg', i % 2), ('no.jpg', 0)]) for i in range(40)]
  spec, images = write_pages(root, pages)
  return spec, {'images': images}


def parquet(root):
  import pyarrow as pa

  columns = {'image': FILE, 'text': pa.string()}
  rows = [(image(published.picture(i)), f'text {i}') for i in range(40)]
  write_parquet(root / 'x.parquet', columns, [*rows, (None, 'x')], 15)
  return f'parquet:{root}/x.parquet', {}


def webdataset(root):
  for i in range(3):
    tar(root / f'{i}.tar', [*samples(20 * i, 20 * i + 20), ('x.jpg', b'')])
  return f'webdataset:{root}/{{0..3}}.tar', {}


def coco(root):
  captions(root, 'train', 40)
  return f'coco:{root}/annotations/captions_train2017.json', {}


def vqa2(root):
  q, a = vqa(root, images=40)
  return f'vqa2:{q},{a}', {}


ALL = [llava, mmc4, parquet, webdataset, coco, vqa2]


def same(records):
  return [
    (split, r.reason, r.message) if isinstance(r, BadDocument) else
    (split, r.id, r.meta, plain(r))
    for split, r in records
  ]  # fmt: skip


@pytest.mark.parametrize('make', ALL)
def test_pieces_are_independent_and_a_share_is_held_out(make, tmp_path):
  spec, options = make(tmp_path)
  source = sources.build(spec, **options)
  assert isinstance(source, Files) and isinstance(source, Source)
  records = same(source.records())
  total = source.total()
  # Read alone, backwards, by another process's copy.
  pieces = source.pieces()
  other = pickle.loads(pickle.dumps(source))
  alone = [same(other.read(piece)) for piece in reversed(pieces)]
  assert [r for some in reversed(alone) for r in some] == records
  assert pieces == sources.build(spec, **options).pieces()
  assert source.fingerprint() == sources.build(spec, **options).fingerprint()
  documents = [r for r in records if len(r) == 4]
  assert total in (None, len(records))

  # What is held out is the same document, and no other.
  parts = sources.build(spec, **options, test_share=0.3)
  both = [same(parts.records([split])) for split in ('train', 'test')]
  found = [[r for r in some if len(r) == 4] for some in both]
  assert all({r[0] for r in some} == {s} for some, s in zip(found, ('train', 'test')))
  assert sorted(r[1] for some in found for r in some) == sorted(r[1] for r in documents)
  assert 0.1 < len(found[1]) / len(documents) < 0.5
  assert sorted(same(parts.records())) == sorted(both[0] + both[1])
  assert same(parts.records(['val'])) == [] == parts.pieces(['val'])


@pytest.mark.parametrize(
  'path, split',
  [
    ('a/train-00000-of-00005-abc.parquet', 'train'),
    ('a/validation-00000-of-00001.parquet', 'val'),
    ('a/captions_val2017.json', 'val'),
    ('a/v2_mscoco_test2015_annotations.json', 'test'),
    ('gs://b/TEST/0.tar', 'test'),
    ('val2017/0.tar', 'val'),
    ('test/train.json', 'train'),  # the file's name says more than its folder's
    ('trained_models/contest.tar', 'train'),
    ('my_test_folder/0.tar', 'train'),
    ('latest/evaluate.json', 'train'),
    ('0.tar', 'train'),
  ],
)
def test_splits_by_name(path, split):
  assert split_of(path) == split


def test_shares():
  assert 0 <= share_of('a') < 1 and share_of('a') == share_of('a') != share_of('b')
  with pytest.raises(NotImplementedError):
    next(Files.found(None, '', None))
