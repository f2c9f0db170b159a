"""The loop trains from two datasets by weight, and goes on in both where it was."""

import collections
import json

import jax
import pytest

from mmjax.data.document import Document, Text
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.data.writer import Writer
from mmjax.train import config as config_lib
from mmjax.train import log as log_lib
from mmjax.train import loop

SIZES = {'pages': 50, 'pairs': 30}
ROWS, STEPS = 4, 9
WEIGHTS = {'pages': 1.0, 'pairs': ((0, 1.0), (4, 3.0))}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A run of nine steps, and one of five that was then told to go to nine."""
  folder = tmp_path_factory.mktemp('mixture')
  for name, size in SIZES.items():
    with Writer(folder / name, ByteTokenizer(), {}) as out:
      for i in range(size):
        spans = (Text('?' * (1 + i % 7)), Text(f'{name}{i:02}', trained=True))
        out.add('train', Document(spans, id=f'{name}{i}'))

  def train(workdir, steps):
    given = dict(
      data=dict(
        mixture={n: dict(path=str(folder / n), weight=WEIGHTS[n]) for n in SIZES},
        rows=ROWS,
        budget=dict(stream=48, targets=32),
      ),
      model=dict(
        embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=16
      ),
      optim=dict(learning_rate=3e-3, schedule=dict(name='constant')),
      sharding=dict(max_replicated=1.0),
      train=dict(steps=steps, log_every=2, checkpoint_every=5),
    )
    made = config_lib.resolve(config_lib.ConfigDict(given))
    assert loop.train(made, workdir, jax.devices()[:1]) == 'done'

  programs, compile_ = {}, jax.stages.Lowered.compile

  def once(self, *args, **kwargs):
    key = self.as_text()
    if key not in programs:
      programs[key] = compile_(self, *args, **kwargs)
    return programs[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax.stages.Lowered, 'compile', once)
    train(folder / 'whole', STEPS)
    train(folder / 'halves', 5)
    train(folder / 'halves', STEPS)
  return folder


def meta(workdir, step):
  path = workdir / 'checkpoints' / str(step) / 'meta' / 'metadata'
  return json.loads(path.read_text())


def test_sources_are_counted_in_the_log_and_in_checkpoints(runs):
  logged = log_lib.read(runs / 'whole' / 'metrics.jsonl')
  total, before = collections.Counter(), 0
  for line in logged:  # means of the steps since the line before
    for name in SIZES:
      total[name] += line[f'data/{name}/documents'] * (line['step'] - before)
      assert line[f'data/{name}/tokens'] > 0
    before = line['step']
  found = meta(runs / 'whole', STEPS)['documents']
  assert before == STEPS and found == dict(total)
  # By weight: one to one, from step 4 on one to three. (Rows hold whole documents.)
  early = meta(runs / 'whole', 5)['documents']
  late = {name: found[name] - early[name] for name in SIZES}
  assert 2 < late['pairs'] / late['pages'] < 4.5
  assert found['pairs'] > 2 * SIZES['pairs']  # each source in its own epoch


def test_a_resumed_mixture_is_the_same_run_bit_for_bit(runs):
  one, other = (meta(runs / name, STEPS) for name in ('whole', 'halves'))
  assert one['fingerprints'] == other['fingerprints']
  assert one['documents'] == other['documents']
  plain = [
    [
      {k: v for k, v in line.items() if 'second' not in k and 'goodput' not in k}
      for line in log_lib.read(runs / name / 'metrics.jsonl')
    ]
    for name in ('whole', 'halves')
  ]
  assert plain[0][-1] == plain[1][-1]
