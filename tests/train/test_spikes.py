"""A step that went wrong is kept, and made again with the bits it had."""

import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

from mmjax.train import loop, spikes
from mmjax.train.checkpoint import Checkpoints
from mmjax.train.replay import replay
from mmjax.train.spikes import Spikes


def judged(losses, mads=20.0):
  found = Spikes(pathlib.Path('nowhere'), mads, 3)
  return [i for i, loss in enumerate(losses) if found.judge(loss, not np.isfinite(loss))]


def test_what_is_a_spike():
  rng = np.random.default_rng(0)
  losses = 3 - np.linspace(0, 1, 200) + rng.normal(0, 0.05, 200)
  assert judged(losses) == []
  losses[150], losses[160] = 9.0, 4.0
  assert judged(losses) == [150]
  assert judged(losses, mads=5.0) == [150, 160]
  assert judged(losses, mads=0) == []
  losses[3] = losses[170] = np.nan
  assert judged(losses) == [3, 150, 170]


def test_a_second_spike_is_not_hidden_by_the_first():
  losses = np.full(100, 2.0)
  losses[[50, 51, 52]] = 1e9
  assert judged(losses) == [50, 51, 52]
  # Equal losses have no deviation at all: a small change is none either.
  losses = np.full(100, 2.0)
  losses[50] = 2.1
  assert judged(losses) == []


def test_rows_of_processes_make_one_batch_again(tmp_path):
  rng = np.random.default_rng(0)
  whole = {'a': rng.normal(size=(6, 3)).astype('f4'), 'b': {'c': np.arange(6)}}
  kept = Spikes(tmp_path, 20.0, 3)
  for i in range(3):
    part = jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], whole)
    kept._kept.clear()  # another process
    assert kept.keep(7, part, (i, 3), {'reason': 'x'})
  (about,) = spikes.kept(tmp_path)
  assert (about['step'], about['blocks'], about['reason']) == (7, 3, 'x')
  like = {'a': np.zeros((1, 3), 'f4'), 'b': {'c': np.zeros(1, int)}}
  got = spikes.load(tmp_path, about, like)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(whole)):
    assert a.dtype == b.dtype and np.array_equal(a, b)
  with pytest.raises(ValueError, match='is of another budget'):
    spikes.load(tmp_path, about, {**like, 'a': np.zeros((1, 4), 'f4')})
  (tmp_path / '7' / 'rows-1of3.npz').unlink()
  with pytest.raises(ValueError, match='rows-1of3.npz is missing'):
    spikes.load(tmp_path, about, like)


def test_only_so_many_are_kept_over_restarts(tmp_path, caplog, monkeypatch):
  batch = {'a': np.zeros(2)}
  first = Spikes(tmp_path, 20.0, 2)
  assert first.keep(1, batch, (0, 1), {})
  again = Spikes(tmp_path, 20.0, 2)
  assert not again.keep(1, batch, (0, 1), {})
  assert again.keep(2, batch, (0, 1), {})
  assert not again.keep(3, batch, (0, 1), {})
  assert sorted(p.name for p in tmp_path.iterdir()) == ['1', '2']
  # A full disk takes the spike, not the run.
  monkeypatch.setattr(os, 'replace', lambda *_: (_ for _ in ()).throw(OSError('full')))
  assert Spikes(tmp_path, 20.0, 9).keep(4, batch, (0, 1), {})
  assert 'step 4 could not be kept: full' in caplog.text


@pytest.fixture
def spiky(run, monkeypatch):
  """spiky(step, **options) -> the workdir of a run in which that step counts as one."""

  def make(step, steps=6, **options):
    judge = Spikes.judge

    def judged(self, loss, skipped):
      self.count = getattr(self, 'count', 0) + 1
      return 'a test' if self.count == step else judge(self, loss, skipped)

    with monkeypatch.context() as patch:
      patch.setattr(Spikes, 'judge', judged)
      assert run(steps, train=dict(checkpoint_every=2, keep=1), **options) == 'done'
    return run.workdir

  return make


def again(workdir, step, use_kept=False):
  """(metrics, what was said)."""
  said = []
  one = jax.devices()[:1]
  return replay(workdir, step, use_kept, say=said.append, devices=one), said


def test_replay_gives_the_bits_of_the_run(spiky, run):
  options = dict(optim=dict(name='adamw', ema=0.9))
  workdir = spiky(4, **options)
  about = json.loads((workdir / 'spikes' / '4' / 'about.json').read_text())
  assert about['reason'] == 'a test' and about['checkpoint'] == 2
  # It is kept, although only the newest is.
  checkpoints = Checkpoints(workdir / 'checkpoints', read_only=True)
  assert checkpoints.steps() == [2, 6]
  checkpoints.close()
  metrics, said = again(workdir, 4)
  text = '\n'.join(said)
  assert repr(metrics['loss']) == about['metrics']['loss']
  assert repr(metrics['grad_norm']) == about['metrics']['grad_norm']
  assert 'from the state after step 2' in text
  assert 'the batch drawn now equals the one kept' in text
  norms = {x.split()[0]: float(x.split()[1]) for x in said if x.startswith('  ')}
  assert set(norms) == {'table', 'head'}
  whole = np.sqrt(sum(v**2 for v in norms.values()))
  np.testing.assert_allclose(whole, metrics['grad_norm'], rtol=1e-4)
  assert 'all finite' in text and 'documents: doc' in text
  # The kept batch on the parameters before is another step, and says so.
  other, said = again(workdir, 4, use_kept=True)
  assert other['loss'] != metrics['loss'] and 'not the step of the run unless' in said[0]
  # The pin outlives a restart.
  assert run(8, train=dict(checkpoint_every=2, keep=1), **options) == 'done'
  checkpoints = Checkpoints(workdir / 'checkpoints', read_only=True)
  assert checkpoints.steps() == [2, 8]
  checkpoints.close()
  # Without any checkpoint: from the beginning, to the same bits.
  shutil.rmtree(workdir / 'checkpoints')
  metrics, said = again(workdir, 4)
  assert 'from the state after step 0' in said[0]
  assert repr(metrics['loss']) == about['metrics']['loss']
  with pytest.raises(ValueError, match=r'no batch of step 3 was kept \(there are: \[4'):
    again(workdir, 3, use_kept=True)
  with pytest.raises(ValueError, match='--step=9: the run has steps 1 to 8'):
    again(workdir, 9)


@pytest.mark.slow
def test_what_is_not_finite_first(run, monkeypatch):
  with pytest.raises(loop.RunStopped, match='updates in a row were not finite'):
    run(
      40,
      optim=dict(name='sgd', learning_rate=1e30, weight_decay=1.0),
      train=dict(max_skipped=2),
    )
  found = spikes.kept(run.workdir / 'spikes')
  assert [about['reason'] for about in found] == ['loss or gradient not finite'] * 2
  step = found[0]['step']
  metrics, said = again(run.workdir, step)
  assert not np.isfinite(metrics['loss'])
  (first,) = [line for line in said if line.startswith('not finite first')]
  assert first.startswith(('not finite first: parameters', 'not finite first: sums'))
  assert any(line.startswith('then: gradients: ') for line in said)
