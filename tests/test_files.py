import pathlib

import pytest

from mmjax import files
from mmjax.data import prepare, prepare_mixture, store, writer
from mmjax.eval import rerun
from mmjax.train import config, datasets, loop

QUICKSTART = pathlib.Path(__file__).parents[1] / 'configs' / 'quickstart.py'
MIXTURE = {'a': dict(source='jsonl:a.jsonl')}


def test_a_path_on_a_disk_stays_what_it_is():
  assert files.on_disk('runs/a', 'the run') == pathlib.Path('runs/a')
  assert files.on_disk(pathlib.Path('/b'), 'the run') == pathlib.Path('/b')


@pytest.mark.parametrize(
  'use',
  [
    lambda given, path: loop.train(given, path),
    lambda given, path: rerun.rerun(path),
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
