"""Paths on a disk and in fsspec's memory, which stands for buckets."""

import os
import sys

import fsspec
import pytest

from mmjax.data import paths
from mmjax.data.document import BadDocument
from mmjax.data.folder import Folder


@pytest.fixture(params=['local', 'memory'])
def root(request, tmp_path):
  """A folder, on a disk and in memory, of files that hold their own names."""
  if request.param == 'local':
    folder = str(tmp_path / 'data')
  else:
    folder = f'memory://{tmp_path.name}/data'
  system = fsspec.filesystem('file' if request.param == 'local' else 'memory')
  for name in ('train-00000.tar', 'train-00001.tar', 'train-00003.tar', 'val/a.tar',
               'notes.txt', 'odd{1}.txt'):  # fmt: skip
    system.makedirs(os.path.dirname(f'{folder}/{name}'), exist_ok=True)
    system.pipe_file(f'{folder}/{name}', name.encode())
  return folder


def test_open_read_size_exists(root):
  file = f'{root}/val/a.tar'
  assert paths.read(file) == b'val/a.tar' and paths.size(file) == 9
  with paths.open_file(file) as opened:
    opened.seek(4)
    assert opened.read(1) == b'a'
  assert paths.read(file, 4, 3) == b'a.t' and paths.read(file, 6) == b'tar'
  assert paths.exists(file) and paths.exists(root)
  assert not paths.exists(f'{root}/b') and not paths.is_dir(file) and paths.is_dir(root)
  assert paths.parent(file) == f'{root}/val'
  with pytest.raises(FileNotFoundError):
    paths.read(f'{root}/b')


@pytest.mark.parametrize(
  'pattern, want',
  [
    ('train-00000.tar', ['train-00000.tar']),
    ('train-*.tar', ['train-00000.tar', 'train-00001.tar', 'train-00003.tar']),
    ('train-{00001..00003}.tar', [f'train-0000{i}.tar' for i in (1, 2, 3)]),
    ('{val/a,train-00000}.tar', ['val/a.tar', 'train-00000.tar']),
    ('{val,test}/*.tar', ['val/a.tar']),
    ('**/*.tar', [*(f'train-0000{i}.tar' for i in (0, 1, 3)), 'val/a.tar']),
    ('{train-00000,train-*}.tar', [f'train-0000{i}.tar' for i in (0, 1, 3)]),
    ('odd{1}.txt', ['odd{1}.txt']),  # a name that is there means itself
  ],
)
def test_patterns(root, pattern, want):
  found = paths.expand(f'{root}/{pattern}')
  assert found == [f'{root}/{name}' for name in want]
  assert [paths.relative(f, f'{root}/{pattern}') for f in found] == (
    want if '/' not in pattern or pattern[0] in '*{' else [want[0].rpartition('/')[2]]
  )


def test_patterns_that_mean_nothing(root):
  for pattern in ('no.tar', 'no*.tar', 'no-{00..99}.tar'):
    with pytest.raises(ValueError, match='no such file'):
      paths.expand(f'{root}/{pattern}')
  with pytest.raises(ValueError, match=r'is a folder; name files, as in .*/\*'):
    paths.expand(root)
  with pytest.raises(ValueError, match='more than 1,000,000 names'):
    paths.expand(f'{root}/{{0..9999999}}.tar')


def test_a_fingerprint_tells_of_changes(root):
  files = paths.expand(f'{root}/train-*.tar')
  before = paths.fingerprint(files)
  assert before == paths.fingerprint(files) != paths.fingerprint(files[1:])
  assert before != paths.fingerprint([*files, f'{root}/gone.tar'])
  system = fsspec.filesystem('memory' if '://' in root else 'file')
  system.pipe_file(files[1], b'x' * 15)
  assert paths.fingerprint(files) != before


def test_a_large_file_is_told_by_its_ends(tmp_path):
  file = str(tmp_path / 'a')
  content = bytearray(2**18)
  marks = set()
  for place in (None, 0, 2**17, 2**18 - 1):
    new = bytearray(content)
    if place is not None:
      new[place] = 1
    (tmp_path / 'a').write_bytes(new)
    marks.add((paths.fingerprint([file]), paths.fingerprint([file], whole=True)))
  assert len({ends for ends, _ in marks}) == 3 and len({whole for _, whole in marks}) == 4
  assert paths.fingerprint([str(tmp_path)]) is None


def test_no_name_leads_out_of_a_folder(root, tmp_path):
  assert paths.inside(root, 'val/./a.tar') == f'{root}/val/a.tar'
  assert paths.inside(root, 'b/../val/a.tar') == f'{root}/val/a.tar'
  for name in ('../a', 'val/../../a', '/etc/hostname', '..', 'a\0b'):
    with pytest.raises(BadDocument, match='path_outside'):
      paths.inside(root, name)
  for name in ('http://a/b.png', '//a/b.png', 'gs://a/b', 'data:image/png;base64,AA'):
    with pytest.raises(BadDocument, match='image_remote'):
      paths.inside(root, name)
  (tmp_path / 'secret').write_bytes(b'')
  (tmp_path / 'in').mkdir()
  (tmp_path / 'in' / 'link').symlink_to(tmp_path / 'secret')
  with pytest.raises(BadDocument, match='path_outside.*link'):
    paths.inside(tmp_path / 'in', 'link')


def test_what_cannot_be_read_is_told(monkeypatch):
  with pytest.raises(ValueError, match='no way to read ftp://; choose a local path, gs'):
    paths.open_file('ftp://a/b')
  assert paths.scheme('a/b://c') == ''
  for path, package in (('gs://a/b', 'gcsfs'), ('s3://a/b', 's3fs')):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf'needs the package {package}: .*mmjax\[cloud'):
      paths.expand(f'{path}/*.tar')


def test_images_of_a_folder_or_a_tar(root):
  import io
  import tarfile

  assert Folder(root).read('val/a.tar') == b'val/a.tar'
  packed = io.BytesIO()
  with tarfile.open(fileobj=packed, mode='w') as tar:
    for name in ('./a.jpg', 'b/c.jpg', 'link'):
      member = tarfile.TarInfo(name)
      member.size = len(name)
      if name == 'link':
        member.type, member.linkname, member.size = tarfile.SYMTYPE, '/etc/hostname', 0
      tar.addfile(member, io.BytesIO(name.encode()))
  system = fsspec.filesystem('memory' if '://' in root else 'file')
  system.pipe_file(f'{root}/images.tar', packed.getvalue())
  folder = Folder(f'{root}/images.tar')
  assert folder.read('a.jpg') == b'./a.jpg' and folder.read('b/c.jpg') == b'b/c.jpg'
  for one, name in ((folder, 'd.jpg'), (folder, 'link'), (Folder(root), 'd.jpg')):
    with pytest.raises(BadDocument, match='missing_file'):
      one.read(name)
  with pytest.raises(BadDocument, match='path_outside'):
    folder.read('../a.jpg')
  with pytest.raises(ValueError, match='no tar of images'):
    Folder(f'{root}/train-00000.tar').read('a')
  with pytest.raises(BadDocument, match='missing_file'):
    Folder(f'{root}/gone.tar').read('a')
