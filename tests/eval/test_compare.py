import json

import numpy as np
import pytest

from mmjax.data.document import Document, Image, Text
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.data.writer import Writer
from mmjax.eval import compare
from mmjax.train import config as config_lib

MODEL = dict(
  embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32
)
RECORDS = [
  {'step': 2, 'train/loss': 3.0, 'train/tokens_per_step': 8.0, 'data/documents': 4.0,
   'train/tokens_per_second': 80.0, 'data/tokens': 60.0},
  {'step': 2, 'eval/vqa/accuracy': 0.25, 'eval/vqa/seconds': 1.0},
  {'step': 4, 'train/loss': 2.0, 'train/tokens_per_step': 8.0, 'data/documents': 4.0,
   'train/tokens_per_second': 80.0, 'data/tokens': 60.0},
  {'step': 4, 'eval/vqa/accuracy': 0.5, 'eval/vqa/accuracy_shuffled': 0.1,
   'eval/vqa/seconds': 1.0},
]  # fmt: skip


@pytest.fixture
def run(tmp_path):
  """run(name, model fields) -> a workdir, with data but without training."""
  picture = np.zeros((8, 8, 3), np.uint8)
  with Writer(tmp_path / 'data', ByteTokenizer()) as writer:
    spans = (Image(picture), Text('dark? ', False), Text('y', True))
    writer.add('train', Document(spans, '0'))

  def make(name, records=RECORDS, freeze=(), **model):
    data = dict(
      source='none', path=str(tmp_path / 'data'), rows=2,
      image=dict(patch=4, resize='fixed', size=8),
      budget=dict(stream=32, targets=8, image=dict(patches=8, items=2)),
    )  # fmt: skip
    given = dict(data=data, model=MODEL | model, optim=dict(freeze=freeze))
    config = config_lib.resolve(config_lib.ConfigDict(given))
    workdir = tmp_path / name
    workdir.mkdir()
    (workdir / 'config.json').write_text(config_lib.to_json(config))
    lines = ''.join(json.dumps(r) + '\n' for r in records)
    (workdir / 'metrics.jsonl').write_text(lines)
    return workdir

  return make


def test_measures_what_a_run_says_of_itself(run):
  found = compare.measure(run('a', freeze=('transformer/*',)))
  assert found['name'] == 'a' and found['model'] == 'unified' and found['steps'] == 4
  assert found['documents_per_second'] == 40 and found['tokens_per_second'] == 600
  assert found['evaluation'] == {
    'vqa/accuracy': 0.5, 'vqa/accuracy_shuffled': 0.1, 'vqa/seconds': 1.0
  }  # fmt: skip
  # 257 words and 48 values of a patch, tied head; layers of attention, MLP and norms
  outside = 257 * 16 + 48 * 16 + 16
  layers = 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16
  assert found['parameters'] == outside + layers and found['trained'] == outside


def test_flops_grow_with_the_layers(run):
  """A layer more: its products on 64 slots forward, and twice that backward."""
  two, three = (compare.measure(run(str(n), num_layers=n))['flops'] * 4 for n in (2, 3))
  kernels = 2 * 64 * (4 * 16 * 16 + 3 * 16 * 32)
  attention = 2 * 2 * (2 * 32 * 32 * 16)
  assert three - two == 3 * (kernels + attention)


def test_writes_a_page_with_the_best_run_first(run, tmp_path):
  worse = [*RECORDS[:-1], {'step': 4, 'eval/vqa/accuracy': 0.125}]
  out = tmp_path / 'page.html'
  args = [str(run('first', worse)), str(run('<second>')), '--out', str(out)]
  assert compare.main(args) == 0
  text = out.read_text()
  assert '&lt;second&gt;' in text and '<second>' not in text
  assert text.index('second&gt;</td>') < text.index('first</td>')
  assert '50.0\u00a0%' in text and '12.5\u00a0%' in text and 'http' not in text
  table = compare.compare([tmp_path / 'first'], out, 'vqa/accuracy')
  assert np.isnan(table[0]['shuffled']) and table[0]['value'] == 0.125


def test_the_metric_is_one_that_all_have():
  runs = [
    dict(name='a', evaluation={'r/recall': 1.0, 'vqa/accuracy': 1.0, 'a/loss': 1.0}),
    dict(name='b', evaluation={'r/recall': 1.0, 'a/loss': 1.0}),
  ]
  assert compare.common_metric(runs[:1]) == 'vqa/accuracy'
  assert compare.common_metric(runs) == 'a/loss'
  runs.append(dict(name='c', evaluation={}))
  with pytest.raises(ValueError, match='no metric in common .*c: 0 metrics'):
    compare.common_metric(runs)


def test_refuses_in_one_line(run, tmp_path, capsys):
  assert compare.main([str(tmp_path / 'none')]) == 2
  assert 'no run at' in capsys.readouterr().err
  workdir = run('lost')
  for path in sorted((tmp_path / 'data').rglob('*'), reverse=True):
    path.rmdir() if path.is_dir() else path.unlink()
  with pytest.raises(ValueError, match='no tokenizer at'):
    compare.measure(workdir)
