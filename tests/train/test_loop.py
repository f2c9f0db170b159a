"""The loop on a prepared dataset, with a model that compiles in no time."""

import errno
import json
import logging
import os
import signal

import jax
import pytest

from mmjax.data import store
from mmjax.train import log as log_lib
from mmjax.train import loop
from mmjax.train.checkpoint import CheckpointError, Checkpoints


def fingerprints(workdir, step):
  text = (workdir / 'checkpoints' / str(step) / 'meta' / 'metadata').read_text()
  return json.loads(text)['fingerprints']


def lines(workdir):
  """The log without what a clock says."""
  out = log_lib.read(workdir / 'metrics.jsonl')
  return [{k: v for k, v in x.items() if not log_lib.clocked(k)} for x in out]


def test_a_run_leaves_what_it_promises(run):
  compiles = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, _, **kw: (
      compiles.append(kw.get('fun_name'))
      if name.endswith('backend_compile_duration')
      else None
    )
  )
  try:
    assert run(6) == 'done'
  finally:
    jax.monitoring.clear_event_listeners()
  workdir = run.workdir
  assert {p.name for p in workdir.iterdir()} >= {
    'config.json', 'metrics.jsonl', 'train.log', 'tensorboard', 'checkpoints', 'eval',
    'curves.png',
  }  # fmt: skip
  assert json.loads((workdir / 'config.json').read_text())['train']['steps'] == 6
  got = log_lib.read(workdir / 'metrics.jsonl')
  assert [x['step'] for x in got if 'train/loss' in x] == [2, 4, 6]
  assert got[0]['train/tokens_per_second'] > 0 and 0 < got[0]['data/fill/stream'] <= 1
  assert got[0]['train/targets_lost'] == 0
  assert run.evaluator.runs == [(2, False), (4, False), (6, True)]
  assert [x['step'] for x in got if 'eval/vqa/accuracy' in x] == [2, 4, 6]
  assert 'table' in (workdir / 'train.log').read_text()  # the table of parameters
  # One compile of the step, whatever the number of steps.
  assert len([n for n in compiles if n and 'step' in n]) == 1, compiles


def test_two_steps_then_two_equal_four(run):
  assert run(4, 'straight', optim=dict(name='adamw', ema=0.9)) == 'done'
  assert run(2, optim=dict(name='adamw', ema=0.9)) == 'done'
  assert run(4, optim=dict(name='adamw', ema=0.9)) == 'done'
  straight = run.workdir.parent / 'straight'
  assert fingerprints(run.workdir, 4) == fingerprints(straight, 4)
  losses = [[x.get('train/loss') for x in lines(d)] for d in (run.workdir, straight)]
  assert losses[0] == losses[1]


def test_support_documents_stand_in_the_rows_of_a_run(run):
  assert run(2) == 'done'
  assert run(2, 'shots', data=dict(shots=dict(count=1))) == 'done'
  alone, behind = (lines(run.workdir.parent / name) for name in ('a', 'shots'))
  # As many answers are trained of a document, which takes twice the room.
  assert alone[0]['data/targets'] / alone[0]['data/documents'] == pytest.approx(
    behind[0]['data/targets'] / behind[0]['data/documents'], rel=0.1
  )
  assert behind[0]['data/tokens'] / behind[0]['data/documents'] == pytest.approx(
    2 * alone[0]['data/tokens'] / alone[0]['data/documents'], rel=0.1
  )
  with pytest.raises(ValueError, match='60 supports out of 59 documents'):
    run(2, 'many', data=dict(shots=dict(count=60)))


def test_the_same_command_after_the_end_does_nothing(run):
  run(2)
  before = lines(run.workdir), list(run.evaluator.runs)
  assert run(2) == 'done'
  assert (lines(run.workdir), run.evaluator.runs) == before


def at_step(monkeypatch, step, action):
  """Calls `action` when the numbers of that step are read."""
  read = loop._Run._read

  def hooked(self, pending):
    if pending and pending[0] == step:
      action()
    read(self, pending)

  monkeypatch.setattr(loop._Run, '_read', hooked)


@pytest.mark.parametrize(
  ('number', 'outcome'), [(signal.SIGTERM, 'preempted'), (signal.SIGINT, 'stopped')]
)
def test_a_signal_saves_and_the_run_goes_on(run, monkeypatch, number, outcome):
  run(6, 'straight')
  before = signal.getsignal(number)
  with monkeypatch.context() as patch:
    at_step(patch, 3, lambda: os.kill(os.getpid(), number))
    assert run(6) == outcome
  kept = Checkpoints(run.workdir / 'checkpoints', read_only=True).steps()
  assert kept[-1] in (3, 4)  # not at a multiple of checkpoint_every, but where it was
  assert signal.getsignal(number) == before
  assert run(6) == 'done'
  straight = run.workdir.parent / 'straight'
  assert fingerprints(run.workdir, 6) == fingerprints(straight, 6)
  assert lines(run.workdir) == lines(straight)


def test_a_signal_breaks_an_evaluation_off_and_it_is_made_up_for(run):
  run.evaluator.hook = lambda step: step == 4 and os.kill(os.getpid(), signal.SIGTERM)
  assert run(6) == 'preempted'
  assert run.evaluator.runs == [(2, False), (4, False)]
  run.evaluator.hook = None
  assert run(6) == 'done'
  assert run.evaluator.runs[2:] == [(4, False), (6, True)]
  steps = [x['step'] for x in lines(run.workdir) if 'eval/vqa/accuracy' in x]
  assert steps == [2, 4, 6]


def test_the_evaluation_before_the_first_step_is_made_once_and_in_full(run):
  run.evaluator.hook = lambda step: step == 0 and os.kill(os.getpid(), signal.SIGTERM)
  assert run(2, train=dict(evaluate_first=True)) == 'preempted'
  assert not [x for x in lines(run.workdir) if 'eval/vqa/accuracy' in x]
  run.evaluator.hook = None
  run.evaluator.runs.clear()
  assert run(2, train=dict(evaluate_first=True)) == 'done'
  assert run.evaluator.runs == [(0, True), (2, True)]
  assert run(2, train=dict(evaluate_first=True)) == 'done'
  assert run.evaluator.runs == [(0, True), (2, True)]
  steps = [x['step'] for x in lines(run.workdir) if 'eval/vqa/accuracy' in x]
  assert steps == [0, 2]


def test_non_finite_updates_stop_the_run_and_name_the_documents(run):
  with pytest.raises(loop.RunStopped) as caught:
    run(
      40,
      optim=dict(name='sgd', learning_rate=1e30, weight_decay=1.0),
      train=dict(max_skipped=3),
    )
  message = str(caught.value)
  assert '3 updates in a row were not finite, steps ' in message
  assert 'documents of step' in message and 'doc' in message
  assert '\n' not in message


def test_a_log_that_cannot_be_written_stops_the_run(run, monkeypatch):
  def full(self, step, metrics):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'metrics.jsonl')

  monkeypatch.setattr(log_lib.RunLog, 'write', full)
  with pytest.raises(loop.RunStopped, match='No space left on device: metrics.jsonl'):
    run(4)


def test_too_many_bad_documents_stop_the_run(run, monkeypatch):
  from mmjax.data.document import BadDocument

  def broken(self, i):
    raise BadDocument('unreadable_record', f'document {i}')

  monkeypatch.setattr(store.Dataset, '__getitem__', broken)
  with pytest.raises(loop.RunStopped, match='documents are bad.*unreadable_record'):
    run(40)


def change_meta(monkeypatch, **changes):
  read = store.read_meta
  monkeypatch.setattr(store, 'read_meta', lambda path: {**read(path), **changes})


def test_another_tokenizer_is_refused(run):
  run(2)
  meta = run.workdir / 'checkpoints' / '2' / 'meta' / 'metadata'
  content = json.loads(meta.read_text())
  meta.write_text(json.dumps({**content, 'tokenizer_hash': 'f' * 64}))
  with pytest.raises(ValueError, match='tokenizer of .* has hash .*was trained with fff'):
    run(4)


def test_another_config_or_architecture_is_refused(run):
  run(2)
  with pytest.raises(ValueError, match=r'model.embed_dim \(8 -> 16\)'):
    run(2, model=dict(embed_dim=16))
  (run.workdir / 'config.json').unlink()
  with pytest.raises(CheckpointError, match=r'params/table is float32\[.*,8\], not'):
    run(4, model=dict(embed_dim=16))


def test_data_of_another_kind_is_refused(run, data, monkeypatch):
  monkeypatch.setattr(
    store,
    'read_meta',
    lambda path, read=store.read_meta: {**read(path), 'source': 'easy_vqa'},
  )
  with pytest.raises(
    ValueError, match="prepared with source 'easy_vqa', the config says"
  ):
    run(2)


@pytest.mark.parametrize(
  ('sections', 'message'),
  [
    (dict(train=dict(accumulate=2)), 'rows = 8 in 2 microbatches does not divide'),
    (dict(sharding=dict(mesh=dict(data=3))), 'needs 3 devices, there are 8'),
    (dict(data=dict(budget=dict(image=dict(item=3)))), "no 'item'; did you mean 'items'"),
    (dict(optim=dict(freeze=('nothing',))), "'nothing' matches no parameter.*table"),
    (dict(model=dict(name='unified', reach=9)), 'reach = 9, but .* 10 back and 3'),
    (dict(model=dict(name='unified', reach=(10, 2))), r'set it to \(10, 3\)'),
    (dict(model=dict(embed_dims=8)), "no field 'embed_dims'; did you mean 'embed_dim'"),
  ],
)
def test_what_does_not_fit_is_one_line(run, sections, message):
  with pytest.raises(ValueError, match=message) as caught:
    run(2, devices=8, **sections)
  assert '\n' not in str(caught.value)


def test_much_replication_is_refused(run):
  mesh = dict(mesh=dict(data=4, fsdp=2), preset='dp')
  with pytest.raises(ValueError, match='replicated'):
    run(2, devices=8, sharding=dict(**mesh, max_replicated=0.02))


def test_handlers_and_log_are_put_back(run):
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  run(2)
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
  assert logging.getLogger('mmjax').propagate
