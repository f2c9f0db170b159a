"""Prepared datasets: whole or not there, and clear about what is wrong."""

import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from mmjax.data import store
from mmjax.data.document import Audio, BadDocument, Document, Image, Text
from mmjax.data.store import Dataset, InUse, Writer
from mmjax.data.tokenizer import ByteTokenizer, train_bpe


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
    want = [(0, [1, 2 + i % 3, 4]), (1, [i, 1, 1])][: i % 3]
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


def test_drops_are_counted_by_reason(tmp_path):
  with Writer(tmp_path / 'd', ByteTokenizer()) as writer:
    writer.add('train', document(1))
    for spans in ((), (Text('a'),), (Text(''),), (Image(b'junk'), Text('a', True))):
      with pytest.raises(BadDocument) as error:
        writer.add('train', Document(spans, 'odd'))
      writer.drop(error.value, 'odd')
  meta = store.read_meta(tmp_path / 'd')
  assert meta['dropped'] == {'empty': 2, 'not_image': 1, 'nothing_trained': 1}
  assert meta['dropped_first']['not_image'] == 'odd: 4 bytes, no image file'
  assert meta['splits']['train']['documents'] == 1


def test_a_bad_document_leaves_no_trace(tmp_path):
  with Writer(tmp_path / 'd', ByteTokenizer()) as writer:
    with pytest.raises(BadDocument, match='not_unicode'):
      writer.add('train', Document((Text('a', True),), '\ud800'))
    writer.add('train', document(3))
  data = Dataset(tmp_path / 'd', 'train')
  assert [data[i].id for i in range(len(data))] == ['3']


def test_half_a_dataset_is_never_seen(tmp_path):
  with (
    pytest.raises(KeyboardInterrupt),
    Writer(tmp_path / 'd', ByteTokenizer()) as writer,
  ):
    writer.add('train', document(1))
    raise KeyboardInterrupt
  assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal
from mmjax.data.store import Writer
from mmjax.data.document import Document, Text
from mmjax.data.tokenizer import ByteTokenizer
with Writer({path!r}, ByteTokenizer()) as writer:
  writer.add('old', Document((Text('abc', True),)))
  os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_cleared(tmp_path):
  code = KILLED.format(path=str(tmp_path / 'd'))
  done = subprocess.run([sys.executable, '-c', code], check=False)
  assert done.returncode == -signal.SIGKILL
  assert [p.name for p in tmp_path.iterdir()] == ['.d.partial']
  write(tmp_path / 'd')
  assert [p.name for p in tmp_path.iterdir()] == ['d']
  assert list(store.read_meta(tmp_path / 'd')['splits']) == ['train', 'test']


FULL_DISK = """
import resource, signal, sys
import numpy as np
from mmjax.data.document import Document, Image, Text
from mmjax.data.store import Dataset, Writer
from mmjax.data.tokenizer import ByteTokenizer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # no file gets larger
rng = np.random.default_rng(0)
path, n = sys.argv[1], int(sys.argv[2])
try:
  with Writer(path, ByteTokenizer()) as writer:
    for i in range(n):
      image = rng.integers(0, 256, (64, 64, 3), np.uint8)
      writer.add('train', Document((Image(image), Text('a', True))))
except OSError as error:
  print('OSError', error)
else:
  print('written', len(Dataset(path, 'train')))
"""


@pytest.mark.parametrize('n, said', [(3, 'written 3'), (100, 'OSError'), (16, 'OSError')])
def test_a_full_disk_leaves_nothing_behind(tmp_path, n, said):
  command = [sys.executable, '-c', FULL_DISK, str(tmp_path / 'd'), str(n)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.stdout.startswith(said), done.stderr
  assert [p.name for p in tmp_path.iterdir()] == (['d'] if said == 'written 3' else [])


def test_a_second_writer_waits_for_the_first(tmp_path):
  started, result = threading.Event(), []

  def second():
    started.set()
    try:
      write(tmp_path / 'd')
    except InUse as error:
      result.append(str(error))

  thread = threading.Thread(target=second)
  with Writer(tmp_path / 'd', ByteTokenizer()) as writer:
    thread.start()
    started.wait()
    thread.join(0.2)
    assert thread.is_alive() and not result  # it waits
    writer.add('train', document(1))
  thread.join(20)
  assert 'is there already' in result[0]
  assert len(Dataset(tmp_path / 'd', 'train')) == 1


def test_what_is_there_is_never_written_over(copy):
  with pytest.raises(InUse, match='is there already'):
    Writer(copy, ByteTokenizer())
  assert len(Dataset(copy, 'train')) == 7
  (copy.parent / 'file').write_text('')
  with pytest.raises(InUse, match='is there already'):
    Writer(copy.parent / 'file', ByteTokenizer())


def test_an_empty_directory_may_be_filled(tmp_path):
  assert len(Dataset(write(tmp_path), 'train')) == 7


@pytest.mark.parametrize('name', ['', '..', 'a/b', '/etc'])
def test_splits_have_plain_names(tmp_path, name):
  with Writer(tmp_path / 'd', ByteTokenizer()) as writer:
    writer.add('train', document(1))
    with pytest.raises(ValueError, match='no plain name'):
      writer.add(name, document(1))


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
  refuses(copy, 'version 9; this code reads 1')
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
  monkeypatch.setattr(store.document_lib, 'VERSION', 2)
  with pytest.raises(
    BadDocument, match=r'unknown_version: .*train, document 0: format 1'
  ):
    Dataset(copy, 'train')[0]


def test_no_pickle_in_the_room():
  room = pathlib.Path(store.__file__).parent
  for file in room.glob('*.py'):
    assert 'import pickle' not in file.read_text(), file
