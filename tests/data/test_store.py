"""Prepared datasets: whole or not there, and clear about what is wrong."""

import json
import os
import pathlib
import pickle
import shutil
import threading

import numpy as np
import pytest

from mmjax.data import store
from mmjax.data.document import Audio, BadDocument, Document, Image, Text
from mmjax.data.store import Dataset
from mmjax.data.tokenizer import ByteTokenizer, train_bpe
from mmjax.data.writer import Writer


def document(i):
  image = np.full((2 + i % 3, 4, 3), i, np.uint8)
  media = (Image(image), Audio(np.zeros(i, np.float32), 8000))[: i % 3]
  return Document(
    (*media, Text(f'q{i}'), Text('a' * i, trained=True)), str(i), {'n': 'x'}
  )


def write(path, n=7, **options):
  with Writer(path, ByteTokenizer(), {'source': 'test'}, **options) as writer:
    for i in range(n):
      writer.add('train', document(i))
    writer.add('test', document(n))
  return path


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  return write(tmp_path_factory.mktemp('store') / 'd')


@pytest.fixture
def copy(made, tmp_path):
  shutil.copytree(made, tmp_path / 'd')
  return tmp_path / 'd'


@pytest.mark.parametrize('shard_bytes', [1, 300, 2**28])
def test_documents_come_back_in_order(tmp_path, shard_bytes):
  data = Dataset(write(tmp_path / 'd', shard_bytes=shard_bytes), 'train')
  shards = len(data.meta['splits']['train']['shards'])
  assert shards == 7 if shard_bytes == 1 else shards < 7
  assert len(data) == 7
  for i in (3, 0, 6, *range(7)):
    assert data[i].id == str(i)
    assert data[i].spans[-2:] == document(i).spans[-2:]
  for i in (-1, 7):
    with pytest.raises(IndexError, match='of 7'):
      data[i]


def test_the_index_holds_the_lengths(made):
  index = Dataset(made, 'train').index
  assert len(index) == 7
  np.testing.assert_array_equal(index.text_tokens, [3 + i for i in range(7)])
  np.testing.assert_array_equal(index.targets, [1 + i for i in range(7)])
  np.testing.assert_array_equal(np.diff(index.item_offsets), [i % 3 for i in range(7)])
  for i in range(7):
    items = slice(index.item_offsets[i], index.item_offsets[i + 1])
    want = [(0, [1, 2 + i % 3, 4]), (1, [i, 8000, 1])][: i % 3]
    assert list(index.item_kind[items]) == [kind for kind, _ in want]
    assert index.item_size[items].tolist() == [size for _, size in want]


def test_counts_are_in_the_meta(made):
  meta = store.read_meta(made)
  counts = {k: v for k, v in meta['splits']['train'].items() if k != 'shards'}
  want = dict(documents=7, spans=20, text_tokens=42, targets=28, image=4, audio=2)
  assert counts == want
  assert meta['source'] == 'test' and meta['dropped'] == {}


def test_a_dataset_pickles_and_reads_on_many_threads(made):
  data = Dataset(made, 'train')
  assert data[2].id == '2'  # opened
  again = pickle.loads(pickle.dumps(data))
  seen = []
  threads = [
    threading.Thread(target=lambda i=i: seen.append(again[i].id)) for i in range(7)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(seen) == list('0123456')


def refuses(path, match, split='train', **options):
  with pytest.raises(ValueError, match=match) as error:
    Dataset(path, split, **options)
  assert '\n' not in str(error.value)


def shard(path):
  return path / 'train' / 'documents-00000.array_record'


def test_what_is_missing_is_named(copy, tmp_path):
  refuses(tmp_path / 'nowhere', 'no dataset at .*nowhere')
  refuses(copy, "no split 'dev'; there are: train, test", split='dev')
  shard(copy).rename(tmp_path / 'away')
  refuses(copy, 'array_record is missing')
  (tmp_path / 'away').rename(shard(copy))
  (copy / 'train' / 'index.npz').unlink()
  refuses(copy, 'index.npz is missing or damaged')
  Dataset(copy, 'test')


def test_what_is_damaged_is_named(copy):
  shutil.copy(copy / 'test' / 'index.npz', copy / 'train' / 'index.npz')
  refuses(copy, 'index.npz is of other documents')
  (copy / 'train' / 'index.npz').write_bytes(b'junk')
  refuses(copy, 'index.npz is')
  os.truncate(shard(copy), 100)
  refuses(copy, 'has 100 bytes, not')
  meta = json.loads((copy / 'meta.json').read_text())
  (copy / 'meta.json').write_text(json.dumps({**meta, 'version': 9}))
  refuses(copy, 'version 9; this code reads 2')
  (copy / 'meta.json').write_text('[]')
  refuses(copy, 'version')
  (copy / 'meta.json').write_text('{')
  refuses(copy, 'meta.json is damaged')


def test_an_index_holds_no_code(copy):
  path = copy / 'train' / 'index.npz'
  arrays = dict(np.load(path))
  np.savez(path, **{**arrays, 'targets': np.array([print] * 7, object)})
  refuses(copy, 'index.npz is damaged')


def test_the_tokenizer_must_be_the_one_of_the_data(copy):
  refuses(copy, 'this run was begun with abc', tokenizer_hash='abc')
  assert Dataset(copy, 'train', ByteTokenizer().hash).tokenizer.vocab_size == 257
  train_bpe(['a'], 300).save(copy)
  refuses(copy, 'its meta.json names')


def test_an_unreadable_record_is_one_bad_document(copy):
  data = bytearray(shard(copy).read_bytes())
  at = data.index(b'q3')  # inside a record
  data[at : at + 2] = b'??'
  shard(copy).write_bytes(data)
  dataset = Dataset(copy, 'train')
  bad = []
  for i in range(len(dataset)):
    try:
      assert dataset[i].id == str(i)
    except BadDocument as error:
      assert error.reason == 'unreadable_record'
      assert f'document {i}' in str(error) and str(copy) in str(error)
      bad.append(i)
  assert bad == [3]


def test_a_record_of_another_format_is_named(copy, monkeypatch):
  monkeypatch.setattr(store.document_lib, 'VERSION', 3)
  with pytest.raises(
    BadDocument, match=r'unknown_version: .*train, document 0: format 2'
  ):
    Dataset(copy, 'train')[0]


def test_no_pickle_in_the_room():
  room = pathlib.Path(store.__file__).parent
  for file in room.glob('*.py'):
    assert 'import pickle' not in file.read_text(), file
