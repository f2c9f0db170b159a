"""Writing datasets: whole or not there, one writer at a time."""

import signal
import subprocess
import sys
import threading

import pytest

from mmjax.data import store
from mmjax.data.document import BadDocument, Document, Image, Text
from mmjax.data.store import Dataset
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.data.writer import InUse, Writer


def document(i):
  return Document((Text(f'q{i}'), Text('a' * i, trained=True)), str(i))


def write(path, n=7):
  with Writer(path, ByteTokenizer()) as writer:
    for i in range(n):
      writer.add('train', document(i))
    writer.add('test', document(n))
  return path


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
from mmjax.data.writer import Writer
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
  assert sorted(p.name for p in (tmp_path / 'd').iterdir() if p.is_dir()) == [
    'test',
    'train',
  ]


FULL_DISK = """
import resource, signal, sys
import numpy as np
from mmjax.data.document import Document, Image, Text
from mmjax.data.store import Dataset
from mmjax.data.writer import Writer
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
    writer = Writer(tmp_path / 'd', ByteTokenizer())
    started.set()
    try:
      with writer:
        result.append('entered')
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


def test_what_is_there_is_never_written_over(tmp_path):
  copy = write(tmp_path / 'd')
  with pytest.raises(InUse, match='is there already'):
    Writer(copy, ByteTokenizer())
  assert len(Dataset(copy, 'train')) == 7
  (copy.parent / 'file').write_text('')
  with pytest.raises(InUse, match='is there already'):
    Writer(copy.parent / 'file', ByteTokenizer())


def test_what_came_into_being_meanwhile_is_kept(tmp_path):
  with (
    pytest.raises(InUse, match='is there already'),
    Writer(tmp_path / 'd', ByteTokenizer()) as writer,
  ):
    writer.add('train', document(1))
    (tmp_path / 'd').mkdir()
    (tmp_path / 'd' / 'thesis.txt').write_text('')
  assert [p.name for p in tmp_path.rglob('*')] == ['d', 'thesis.txt']


def test_an_empty_directory_may_be_filled(tmp_path):
  assert len(Dataset(write(tmp_path), 'train')) == 7


@pytest.mark.parametrize('name', ['', '..', 'a/b', '/etc'])
def test_splits_have_plain_names(tmp_path, name):
  with Writer(tmp_path / 'd', ByteTokenizer()) as writer:
    writer.add('train', document(1))
    with pytest.raises(ValueError, match='no plain name'):
      writer.add(name, document(1))
