"""Tars as img2dataset writes them; made here."""

import gzip
import io
import json
import tarfile

import fsspec
import numpy as np
import pytest
from published import found, picture, reasons

from mmjax.data import sources
from mmjax.data.prepare import prepare
from mmjax.data.store import Dataset
from mmjax.data.webdataset import WebDataset


def tar(path, members):
  """A tar of (name, bytes, or a TarInfo's fields)."""
  with tarfile.open(path, 'w') as file:
    for name, content in members:
      member = tarfile.TarInfo(name)
      if isinstance(content, dict):
        for key, value in content.items():
          setattr(member, key, value)
        content = b''
      member.size = len(content)
      file.addfile(member, io.BytesIO(content))
  return path


def samples(begin, end):
  """What img2dataset writes of an image: the picture, its caption, what is known."""
  for i in range(begin, end):
    key = f'{i:09d}'
    known = {'caption': f'caption {i}', 'url': f'http://a/{i}', 'key': key, 'width': 8}
    yield f'{key}.jpg', picture(i, form='JPEG')
    yield f'{key}.txt', f'caption {i}'.encode()
    yield f'{key}.json', json.dumps(known).encode()


@pytest.fixture
def shards(tmp_path):
  for shard in range(3):
    tar(tmp_path / f'{shard:05d}.tar', samples(10 * shard, 10 * shard + 10))
  return tmp_path


def test_samples_of_shards(shards):
  spec = f'webdataset:{shards}/{{00000..00002}}.tar'
  good, bad = found(spec)
  assert list(good) == [f'{i // 10:05d}.tar/{i:09d}' for i in range(30)] and not bad
  want = [(picture(7, form='JPEG'), 0), ('caption 7', True, 0)]
  assert good['00000.tar/000000007'] == ('train', want)
  for text in ('json:caption', 'txt', 'json'):
    assert found(spec, text=text)[0] == good
  source = sources.build(spec)
  assert source.pieces() == [f'{shards}/{i:05d}.tar' for i in range(3)]
  again = [record.id for piece in source.pieces() for _, record in source.read(piece)]
  assert again == list(good)
  assert source.total() is None
  first = source.fingerprint()
  tar(shards / '00001.tar', samples(11, 21))
  assert source.fingerprint() != first
  assert WebDataset(f'{shards}/no').fingerprint() is None


def test_buckets_and_compression(shards):
  memory = fsspec.filesystem('memory')
  packed = gzip.compress((shards / '00001.tar').read_bytes())
  memory.pipe_file(f'{shards}/a/00001.tar.gz', packed)
  good, bad = found(f'webdataset:memory:/{shards}/a/*.tar.gz')
  assert list(good) == [f'00001.tar.gz/{i:09d}' for i in range(10, 20)] and not bad


def test_keys_end_at_the_first_dot_and_extensions_are_chosen(tmp_path):
  a, b, c = (picture(i) for i in range(3))
  tar(tmp_path / 'x.tar', [
    ('d.1', {'type': tarfile.DIRTYPE}),
    ('d.1/0.seg.png', a), ('d.1/0.JPG', b), ('d.1/0.txt', b' two \n'),
    ('d.1/0.other.png', c), ('d.1/1.cls', b'1'), ('d.1/1.png', a),
    ('__meta__', b'{}'), ('README', b''), ('.hidden', b''),
  ])  # fmt: skip
  (tmp_path / 'names.txt').write_text('cat\ndog\n')
  good, bad = found(f'webdataset:{tmp_path}/x.tar', classes=f'{tmp_path}/names.txt')
  assert {k: s for k, (_, s) in good.items()} == {
    'x.tar/d.1/0': [(b, 0), ('two', True, 0)],
    'x.tar/d.1/1': [(a, 0), ('dog', True, 0)],
  } and not bad
  records = sources.build(f'webdataset:{tmp_path}/x.tar').records()
  assert [r.meta for _, r in records] == [{}, {'label': '1'}]
  two = found(f'webdataset:{tmp_path}/x.tar', image='seg.png,other.png')
  assert two[0]['x.tar/d.1/0'][1] == [(a, 0), (c, 0), ('two', True, 0)]
  assert reasons(two[1]) == ['no_image']


def test_lists_of_captions_and_dialogues_in_json(tmp_path):
  turns = [{'from': 'human', 'value': '<image>\nWho?'}, {'from': 'gpt', 'value': 'Tom.'}]
  trees = [
    {'captions': ['a', ' ', 'b']},
    {'conversations': turns},
    {'text': ['']},
    [],
    {},
  ]
  members = [('0.png', b'')]
  for i, tree in enumerate(trees):
    members += [(f'{i}.png', b'p'), (f'{i}.json', json.dumps(tree).encode())]
  tar(tmp_path / 'x.tar', members[1:])
  good, bad = found(f'webdataset:{tmp_path}/x.tar')
  assert good['x.tar/0'][1] == [(b'p', 0), ('a', True, 1), ('b', True, 2)]
  want = [(b'p', 0), ('\nWho?', False, 0), (' Tom.', True, 0)]
  assert good['x.tar/1'][1] == want
  assert reasons(bad) == ['bad_json', 'empty_text', 'no_text']


def test_what_cannot_be_used_is_counted(tmp_path):
  link = {'type': tarfile.SYMTYPE, 'linkname': '/etc/hostname'}
  p = picture(1)
  members = [
    ('../../out.png', p), ('../../out.txt', b'x'), ('/abs.png', p), ('/abs.txt', b'x'),
    ('ln.png', link), ('ln.txt', b'x'), ('hard.png', {**link, 'type': tarfile.LNKTYPE}),
    ('hard.txt', b'x'), ('fifo.png', {'type': tarfile.FIFOTYPE}),
    ('big.png', b'0' * 5000), ('noimage.txt', b'x'), ('notext.png', p),
    ('empty.png', p), ('empty.txt', b' \n'),
    ('latin.png', p), ('latin.txt', 'é'.encode('latin-1')), ('json.png', p),
    ('json.json', b'{'), ('utf.png', p), ('utf.json', b'{"caption": "\xe9"}'),
    ('twice.png', p), ('twice.png', p), ('twice.txt', b'x'),
    ('bom.png', p), ('bom.txt', '\ufeffé'.encode()),
  ]  # fmt: skip
  tar(tmp_path / 'x.tar', members)
  options = dict(max_bytes=4000)
  good, bad = found(f'webdataset:{tmp_path}/x.tar', **options)
  assert {k: s[1] for k, (_, s) in good.items()} == {'x.tar/bom': ('é', True, 0)}
  assert reasons(bad) == sorted(
    ['path_outside'] * 2 + ['not_a_file'] * 3 + ['too_large', 'no_image', 'no_text']
    + ['empty_text', 'not_unicode', 'not_unicode', 'bad_json', 'bad_sample']
  )  # fmt: skip
  good, bad = found(f'webdataset:{tmp_path}/x.tar', encoding='latin-1', **options)
  assert good['x.tar/latin'][1][1] == ('é', True, 0)
  found(f'webdataset:{tmp_path}/x.tar', text='cls')
  with pytest.raises(ValueError, match="no encoding 'klingon'"):
    WebDataset('a', encoding='klingon')
  with pytest.raises(ValueError, match='no file of class names'):
    tar(tmp_path / 'c.tar', [('0.png', p), ('0.cls', b'0')])
    found(f'webdataset:{tmp_path}/c.tar', classes='/nowhere')
  (tmp_path / 'names').write_text('a')
  tar(tmp_path / 'c.tar', [('0.png', p), ('0.cls', b'1')])
  _, bad = found(f'webdataset:{tmp_path}/c.tar', classes=f'{tmp_path}/names')
  assert reasons(bad) == ['bad_sample']


@pytest.mark.parametrize('where', ['header', 'content', 'boundary', 'garbage', 'empty'])
def test_a_cut_tar_gives_what_is_whole_and_is_counted(shards, where):
  path = shards / '00001.tar'
  whole = path.read_bytes()
  with tarfile.open(path) as file:
    begin = file.getmembers()[22].offset  # of 17's caption, after 17's picture
  cut = dict(header=begin + 100, content=begin + 600, boundary=begin, garbage=begin,
             empty=0)[where]  # fmt: skip
  path.write_bytes(whole[:cut] + (b'\xff' * 512 * 4 if where == 'garbage' else b''))
  good, bad = found(f'webdataset:{shards}/*.tar')
  kept = [i for i in range(30) if not (10 if where == 'empty' else 17) <= i < 20]
  assert list(good) == [f'{i // 10:05d}.tar/{i:09d}' for i in kept]
  assert reasons(bad) == ['cut_tar'] and str(path) in bad[0].message
  assert ("'000000017', its last sample" in bad[0].message) == (where != 'empty')


def test_a_shard_that_vanishes(shards):
  source = sources.build(f'webdataset:{shards}/*.tar')
  pieces = source.pieces()
  (shards / '00001.tar').unlink()
  records = [r for piece in pieces for _, r in source.read(piece)]
  assert len(records) == 21 and records[10].reason == 'missing_file'
  _, bad = found(f'webdataset:{shards}/{{00000..00003}}.tar')
  assert reasons(bad) == ['missing_file'] * 2
  with pytest.raises(ValueError, match='no such file'):
    found(f'webdataset:{shards}/{{00007..00009}}.tar')


def test_a_shard_that_vanishes_between_two_preparations(shards, tmp_path):
  for i, files in enumerate(('{00000..00002}.tar', '*.tar')):
    spec, out = f'webdataset:{shards}/{files}', tmp_path / f'out{i}'
    whole = prepare(spec, out, progress=False)
    gone = (shards / '00001.tar').read_bytes()
    (shards / '00001.tar').unlink()
    with pytest.raises(ValueError, match="was prepared with fingerprint='.*remove it"):
      prepare(spec, out, progress=False)  # what is there is of other data
    less = prepare(spec, tmp_path / f'new{i}', progress=False)
    assert less['dropped'] == ({'missing_file': 1} if '{' in spec else {})
    (shards / '00001.tar').write_bytes(gone)
    assert prepare(spec, out, progress=False) == whole
    assert less['splits']['train']['documents'] < whole['splits']['train']['documents']


def test_splits_by_name_option_and_share(shards):
  for i, split in enumerate(('train', 'val', 'test')):
    (shards / f'{i:05d}.tar').rename(shards / f'cc-{split}-{i}.tar')
  spec = f'webdataset:{shards}/*.tar'
  good, _ = found(spec)
  assert {k[:6]: s for k, (s, _) in good.items()} == {
    'cc-tra': 'train', 'cc-val': 'val', 'cc-tes': 'test'
  }  # fmt: skip
  assert len(sources.build(spec).pieces(['val'])) == 1
  assert {s for s, _ in found(spec, splits=['val'])[0].values()} == {'val'}
  assert {s for s, _ in found(spec, split='one')[0].values()} == {'one'}
  # Of training alone a share is held out.
  held = found(spec, test_share=1.0)[0]
  assert [s for s, _ in held.values()].count('val') == 10
  held = found(f'webdataset:{shards}/cc-train-0.tar', test_share=0.3)[0]
  test = {k for k, (s, _) in held.items() if s == 'test'}
  assert 0 < len(test) < 10
  only = found(f'webdataset:{shards}/cc-train-0.tar', ['test'], test_share=0.3)[0]
  assert set(only) == test
  # Elsewhere, and beside other shards, a document is of the same split.
  (shards / 'train').mkdir()
  (shards / 'cc-train-0.tar').rename(shards / 'train' / 'cc-train-0.tar')
  held = found(f'webdataset:{shards}/train/*.tar', test_share=0.3)[0]
  assert {k for k, (s, _) in held.items() if s == 'test'} == test
  for option in (dict(test_share=2), dict(split='a/b')):
    with pytest.raises(ValueError, match='source webdataset: (test_share=2|split=)'):
      WebDataset('a', **option)


def test_prepares(shards):
  meta = prepare(f'webdataset:{shards}/*.tar', shards / 'out', progress=False)
  assert meta['splits']['train']['documents'] == 30 and not meta['dropped']
  dataset = Dataset(shards / 'out', 'train')
  assert dataset[5].id == '00000.tar/000000005'
  assert np.all(dataset.index.item_size == [1, 6, 8])
