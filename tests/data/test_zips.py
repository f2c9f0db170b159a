"""Zips are read where they are; what they claim is not believed."""

import io
import stat
import zipfile

import fsspec
import pytest

from mmjax.data import zips
from mmjax.data.document import BadDocument
from mmjax.data.folder import Folder
from mmjax.data.llava import json_lines


def zipped(*files, method=zipfile.ZIP_DEFLATED):
  """A zip of (name or ZipInfo, content)."""
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w', method) as archive:
    for name, content in files:
      archive.writestr(name, content)
  return out.getvalue()


def link(name):
  info = zipfile.ZipInfo(name)
  info.external_attr = (stat.S_IFLNK | 0o777) << 16
  return info


@pytest.fixture(params=['local', 'memory'])
def place(request, tmp_path):
  """Puts bytes to a new path, on a disk or in memory."""

  def put(content, name):
    path = f'{tmp_path}/{name}'
    if request.param == 'memory':
      path = f'memory://{tmp_path.name}/{name}'
    fsspec.filesystem('memory' if '://' in path else 'file').pipe_file(path, content)
    return path

  return put


def test_lines_of_all_files_inside(place):
  path = place(
    zipped(('a.jsonl', '{"x": 1}\n\n[2]'), ('notes.txt', 'no'), ('b/c.jsonl', '{\n3\n')),
    'docs.jsonl.zip',
  )
  found = list(json_lines(path))
  assert found[:2] == [(1, {'x': 1}), (3, [2])] and found[3] == (5, 3)
  assert found[2][0] == 4 and found[2][1].reason == 'bad_json'


def reasons(path):
  return [x.reason if isinstance(x, BadDocument) else x for x in zips.lines(path)]


def test_what_cannot_be_used_is_told(place, monkeypatch):
  path = place(
    zipped(('../a.jsonl', '1'), (link('l.jsonl'), '/etc/hostname'), ('b.jsonl', '2')),
    'a.zip',
  )
  assert reasons(path) == ['path_outside', b'2']
  assert reasons(place(b'', 'b.zip')) == reasons(place(b'PK no', 'c.zip')) == ['bad_zip']
  # A bit of the content, which is stored, is another one.
  whole = zipped(('a.jsonl', '1\n' * 9), ('b.jsonl', '2'), method=zipfile.ZIP_STORED)
  assert reasons(place(whole.replace(b'1\n' * 9, b'1\n' * 8 + b'0\n'), 'd.zip'))[-2:] == [
    'bad_zip',
    b'2',
  ]
  locked = bytearray(zipped(('a.jsonl', '1')))
  for mark, flags in ((b'PK\3\4', 6), (b'PK\1\2', 8)):
    locked[locked.index(mark) + flags] |= 1
  assert reasons(place(bytes(locked), 'e.zip')) == ['bad_zip']
  monkeypatch.setattr(zips, 'MOST_LINE', 100)
  large = place(
    zipped(('a.jsonl', '1\n' + 'x' * 10_000 + '\n' + '2' * 99 + '\n3')), 'f.zip'
  )
  assert reasons(large) == [b'1\n', 'too_large', b'2' * 99 + b'\n', b'3']
  monkeypatch.setattr(zips, 'MOST_LINES', 100)
  assert reasons(large) == ['too_large']
  with pytest.raises(FileNotFoundError):
    list(zips.lines(large + 'x'))


def test_a_line_without_end_takes_no_memory(tmp_path, monkeypatch):
  """A bomb: 20 MB of one letter in 20 kB."""
  import tracemalloc

  (tmp_path / 'a.zip').write_bytes(zipped(('a.jsonl', 'x' * 20_000_000)))
  monkeypatch.setattr(zips, 'MOST_LINE', 2**20)
  tracemalloc.start()
  assert reasons(str(tmp_path / 'a.zip')) == ['too_large']
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2**23


def test_images_of_a_zip(place, monkeypatch):
  path = place(
    zipped(('./a.jpg', 'one'), ('b/c.jpg', 'three'), (link('l.jpg'), '/etc/hostname')),
    'images.zip',
  )
  folder = Folder(path)
  assert folder.read('a.jpg') == b'one' and folder.read('b/../b/c.jpg') == b'three'
  for name in ('d.jpg', 'l.jpg', 'b'):
    with pytest.raises(BadDocument, match='missing_file'):
      folder.read(name)
  with pytest.raises(BadDocument, match='path_outside'):
    folder.read('../a.jpg')
  with pytest.raises(BadDocument, match=r"too_large: .*'b/c.jpg': 5 bytes"):
    zips.read(path, 'b/c.jpg', most=4)
  broken = zipped(('a.jpg', 'one'), method=zipfile.ZIP_STORED).replace(b'one', b'two', 1)
  with pytest.raises(BadDocument, match='bad_zip'):
    Folder(place(broken, 'broken.zip')).read('a.jpg')
  with pytest.raises(ValueError, match='no zip'):
    Folder(place(b'no', 'no.zip')).read('a.jpg')
  with pytest.raises(BadDocument, match='missing_file'):
    Folder(path.replace('images', 'gone')).read('a.jpg')
