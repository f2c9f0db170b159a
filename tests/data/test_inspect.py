"""The script that shows a step's batch: what it writes, and what it refuses."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from mmjax.data.document import Document, Image, Text
from mmjax.data.inspect import inspect
from mmjax.data.pipeline import Pipeline
from mmjax.data.store import Dataset
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.data.writer import Writer
from mmjax.train import build
from mmjax.train import config as config_lib

ROOT = pathlib.Path(__file__).parents[2]
FILE = """
from ml_collections import ConfigDict

def get_config():
  return ConfigDict(dict(
    data=dict(source='none', path='data', rows=3,
              image=dict(patch=4, resize='fixed', size=8),
              budget=dict(stream=48, targets=16, image=dict(patches=16, items=4))),
    model=dict(name='unified', embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2,
               head_dim=8, mlp_dim=32)))
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with config.py and the dataset it names."""
  folder = tmp_path_factory.mktemp('inspect')
  (folder / 'config.py').write_text(FILE)
  rng = np.random.default_rng(0)
  with Writer(folder / 'data', ByteTokenizer()) as writer:
    for i in range(30):
      picture = rng.integers(0, 256, (8, 8, 3), np.uint8)
      words = 'w' * int(rng.integers(1, 9))
      spans = (Image(picture), Text(f'{i}<b>{words}', False), Text('yes', True))
      writer.add('train', Document(spans, f'd{i}'))
  return folder


@pytest.fixture
def config(folder):
  config = config_lib.load(str(folder / 'config.py'))
  config.data.path = str(folder / 'data')
  return config


def data_in(page):
  text = page.read_text(encoding='utf-8')
  found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
  return json.loads(found[1])


def test_the_page_is_of_the_batch_that_is_trained(config, tmp_path):
  said = inspect(config, 'name', tmp_path / 'new' / 'page.html', step=7, rows=2)
  assert said == str(tmp_path / 'new' / 'page.html')
  dataset = Dataset(config.data.path, 'train')
  rules = build.rules_of(config)
  budget = build.budget_of(config, rules)
  pipeline = Pipeline(
    dataset, budget=budget, rows=3, rules=rules, slots=lambda item: item.grid, seed=0
  )
  steps = pipeline.iterate(7)
  want = next(steps).batch
  steps.close()
  rows = data_in(tmp_path / 'new' / 'page.html')
  assert len(rows) == 2
  for b, row in enumerate(rows):
    for name, array in vars(want.stream).items():
      np.testing.assert_array_equal(row['stream'][name], array[b])


def test_command_counts_too(folder):
  command = [sys.executable, '-m', 'mmjax.data.inspect', '--config=config.py',
             '--config.data.rows=2', '--step=1', '--stats', '--steps=3']  # fmt: skip
  env = {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'PATH': ''}
  done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert re.search(r'Fill over 3 steps\n.*\n +stream +\d', done.stdout)
  assert done.stdout.endswith('\nbatch.html\n')
  assert len(data_in(folder / 'batch.html')) == 2
  wrong = subprocess.run(
    [*command[:3], '--config=konfig.py'], cwd=folder, env=env, capture_output=True,
    text=True,
  )  # fmt: skip
  assert wrong.returncode == 2
  assert wrong.stderr == (
    "error: no config file 'konfig.py'; did you mean 'config.py'? (choices: config.py)\n"
  )


@pytest.mark.parametrize(
  'wrong, message',
  [
    (dict(step=-1), '--step=-1: must be at least 0'),
    (dict(rows=0), '--rows=0: must be at least 1'),
    (dict(steps=-2), '--steps=-2: must be at least 0'),
  ],
)
def test_refuses_numbers_that_make_no_sense(config, tmp_path, wrong, message):
  with pytest.raises(ValueError, match=f'^{message}$'):
    inspect(config, 'name', tmp_path / 'page.html', **wrong)
  assert not any(tmp_path.iterdir())


def test_refuses_without_dataset(config, tmp_path):
  config.data.path = str(tmp_path / 'nothing')
  with pytest.raises(ValueError, match='^no dataset at .*nothing: .*meta.json: No such'):
    inspect(config, 'name', tmp_path / 'page.html')
  assert not any(tmp_path.iterdir())


def test_refuses_a_model_that_looks_less_far(config, tmp_path):
  config.model.reach = 2
  with pytest.raises(ValueError, match='config.model.reach = 2, but slots'):
    inspect(config, 'name', tmp_path / 'page.html')
