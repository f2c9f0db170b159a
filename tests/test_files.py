import importlib.util
import pathlib

import pytest

from mmjax import files
from mmjax.data import prepare, prepare_mixture, store, writer
from mmjax.eval import compare, rerun
from mmjax.train import config, datasets, loop, replay

QUICKSTART = pathlib.Path(__file__).parents[1] / 'configs' / 'quickstart.py'
MIXTURE = {'a': dict(source='jsonl:a.jsonl')}


def test_a_path_on_a_disk_stays_what_it_is():
  assert files.place('runs/a', 'the run') == pathlib.Path('runs/a')
  assert files.on_disk('runs/a', 'the run') == pathlib.Path('runs/a')
  assert files.on_disk(pathlib.Path('/b'), 'the run') == pathlib.Path('/b')


@pytest.mark.parametrize(
  'use',
  [
    lambda given, path: datasets.prepare(given),
    lambda given, path: store.Dataset(path, 'train'),
    lambda given, path: writer.Writer(path, None, {}),
    lambda given, path: prepare.prepare('jsonl:a.jsonl', path),
    lambda given, path: prepare_mixture.prepare_mixture(MIXTURE, path),
  ],
)
def test_a_bucket_does_not_become_a_directory(use, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'a.jsonl').write_text('{}')
  given = config.load(str(QUICKSTART))
  given.data.path = 'gs://bucket/data'
  with pytest.raises(ValueError, match='gs://bucket/.*: has to be on a disk; mount'):
    use(given, 'gs://bucket/run')
  assert [p.name for p in tmp_path.iterdir()] == ['a.jsonl']


@pytest.mark.parametrize(
  'use',
  [
    lambda given, path: loop.train(given, path),
    lambda given, path: rerun.rerun(path),
    lambda given, path: replay.replay(path, 1),
    lambda given, path: compare.measure(path),
  ],
)
def test_another_bucket_is_no_place_for_a_run(use, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  given = config.load(str(QUICKSTART))
  with pytest.raises(ValueError, match='s3://bucket/run: has to be on a disk; mount'):
    use(given, 's3://bucket/run')
  assert not list(tmp_path.iterdir())


def test_a_bucket_needs_a_folder_and_its_package(monkeypatch):
  with pytest.raises(ValueError, match='--workdir gs://runs: name a folder in the buck'):
    files.place('gs://runs', '--workdir')
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r'gs://a/b: needs the package gcsfs: .*mmjax\[cl'):
    files.place('gs://a/b', '--workdir')


def test_half_of_a_file_is_never_seen(tmp_path, monkeypatch):
  path = tmp_path / 'a.json'
  files.replace(path, 'one')
  files.replace(path, b'two')
  assert path.read_text() == 'two'

  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(files.os, 'replace', full)
  with pytest.raises(OSError, match='No space'), files.reaching(path):
    files.replace(path, 'three')
  assert [p.name for p in tmp_path.iterdir()] == ['a.json'] and path.read_text() == 'two'
