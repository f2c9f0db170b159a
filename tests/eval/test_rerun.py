"""One small run of eight devices, trained once; its evaluation comes out again."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from mmjax.data.document import Document, Image, Text
from mmjax.data.tokenizer import ByteTokenizer, from_spec
from mmjax.data.writer import Writer
from mmjax.eval.rerun import load, rerun
from mmjax.train import config as config_lib
from mmjax.train import loop

ROOT = pathlib.Path(__file__).parents[2]


def _config(path):
  return config_lib.resolve(
    ConfigDict(
      dict(
        data=dict(
          source='none',
          path=str(path),
          rows=8,
          image=dict(patch=4, resize='fixed', size=8),
          budget=dict(stream=32, targets=8, image=dict(patches=8, items=2)),
        ),
        model=dict(
          name='unified', embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2,
          head_dim=8, mlp_dim=32,
        ),
        optim=dict(learning_rate=1e-2, schedule=dict(name='constant')),
        sharding=dict(preset='fsdp', mesh=dict(data=2, fsdp=4)),
        train=dict(steps=4, log_every=2, checkpoint_every=2),
        eval=dict(vqa=dict(split='test', every=2, limit=5, rows=8, max_new=3)),
      )
    )
  )  # fmt: skip


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A workdir with checkpoints of steps 2 and 4; 21 test questions."""
  folder = tmp_path_factory.mktemp('rerun')
  rng = np.random.default_rng(0)
  with Writer(folder / 'data', ByteTokenizer()) as writer:
    for split, count in (('train', 40), ('test', 21)):
      for i in range(count):
        picture = rng.integers(0, 256, (8, 8, 3), np.uint8)
        spans = (Image(picture), Text('dark? ', False), Text('yn'[i % 2], True))
        writer.add(split, Document(spans, f'{split}/{i}', {'types': ['dark']}))
  loop.train(_config(folder / 'data'), folder / 'run')
  return folder / 'run'


@pytest.fixture
def run(trained, tmp_path):
  """A copy of it, to write in."""
  return shutil.copytree(trained, tmp_path / 'run')


def _predictions(run, step):
  content = json.loads((run / 'eval' / f'{step}.json').read_text())
  return content['results']['vqa']['predictions']


def test_training_leaves_a_cheap_evaluation_and_a_full_one(trained):
  assert len(_predictions(trained, 2)) == 5
  assert len(_predictions(trained, 4)) == 21
  lines = (trained / 'metrics.jsonl').read_text().splitlines()
  found = [json.loads(line) for line in lines if 'eval/vqa/accuracy' in line]
  assert [(r['step'], r['eval/vqa/count']) for r in found] == [(2, 5.0), (4, 21.0)]
  assert (trained / 'curves.png').stat().st_size > 1000


def test_the_predictions_of_training_come_out_again(run):
  before = {p: p.read_bytes() for p in (run / 'eval').iterdir()}
  said = []
  results = rerun(run, say=said.append)
  assert results['vqa'].predictions == _predictions(run, 4)
  assert said[0] == f'{run}, step 4'
  assert said[-1] == (
    'compared with eval/4.json: vqa: 21 questions in common, identical predictions'
  )
  assert before == {p: p.read_bytes() for p in (run / 'eval').iterdir()}


def test_a_missing_report_is_written_of_all_questions(run):
  cheap = _predictions(run, 2)
  shutil.rmtree(run / 'eval')
  said = []
  rerun(run, step=2, changes=['eval.vqa.rows=16'], say=said.append)
  assert said[-1] == f'written: {run / "eval" / "2.html"}'
  found = _predictions(run, 2)
  assert len(found) == 21  # the limit of the schedule is lifted
  assert [r for r in found if r['index'] in {c['index'] for c in cheap}] == cheap


def test_changes_of_the_config(run):
  config = load(run, ['eval.vqa.rows=16', 'eval.vqa.limit=7', 'data.path=elsewhere'])
  assert (config.eval.vqa.rows, config.eval.vqa.limit) == (16, 7)
  assert config.data.path == 'elsewhere'
  assert 'limit' not in load(run).eval.vqa


@pytest.mark.parametrize(
  'arguments, message',
  [
    (dict(step=3), r'no checkpoint of step 3 in .*there are: \[2, 4\]'),
    (dict(changes=['data.pth=x']), "unknown config key 'data.pth'; did you mean"),
    (dict(changes=['data.path']), "unknown config key 'data.path'"),
    (dict(changes=['eval.vqa.rows.x=1']), "unknown config key 'eval.vqa.rows.x'"),
    (dict(changes=['eval.vqa.rows=many']), 'config.eval.vqa.rows = many: must be int'),
    (dict(changes=['eval.vqa.rowz=16']), "no field 'rowz'; did you mean 'rows'"),
    (dict(changes=['eval.vqa.split=dev']), "no split 'dev'; there are: train, test"),
    (dict(changes=['data.path=nowhere']), 'nowhere'),
    (dict(changes=['model.mlp_dim=64']), 'of another architecture: shapes: '),
  ],
)
def test_errors_say_what_there_is(run, arguments, message):
  with pytest.raises(ValueError, match=message) as error:
    rerun(run, **arguments)
  assert '\n' not in str(error.value)


def test_data_of_another_tokenizer_is_refused(run, tmp_path):
  texts = lambda: ['dark? yes no'] * 9  # noqa: E731
  with Writer(tmp_path / 'other', from_spec('bpe:257', texts)) as writer:
    writer.add('test', Document((Text('q ', False), Text('a', True))))
  with pytest.raises(ValueError, match='tokenizer .*, but this run was begun with'):
    rerun(run, changes=[f'data.path={tmp_path / "other"}'])


def test_no_run_and_no_checkpoint(run, tmp_path):
  with pytest.raises(ValueError, match=r'no run at .*: config.json is missing'):
    rerun(tmp_path)
  shutil.rmtree(run / 'checkpoints')
  with pytest.raises(ValueError, match='checkpoint'):
    rerun(run)
  config = json.loads((run / 'config.json').read_text())
  (run / 'config.json').write_text(json.dumps({**config, 'eval': {}}))
  with pytest.raises(ValueError, match='config.eval names nothing to evaluate'):
    rerun(run)


def test_the_script_refuses_in_one_line(tmp_path):
  command = [sys.executable, str(ROOT / 'eval.py'), f'--workdir={tmp_path}']
  found = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert found.returncode == 2
  assert found.stdout == ''
  assert found.stderr == f'error: no run at {tmp_path}: config.json is missing\n'
