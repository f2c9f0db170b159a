"""What goes wrong beside the run: slow disks, old formats, clocks, stuck steps."""

import json
import pathlib
import re
import threading
import time

import jax
import pytest

from mmjax.data.pipeline import Steps
from mmjax.train import cache, loop, processes
from mmjax.train import log as log_lib
from mmjax.train import profile as profile_lib
from mmjax.train.checkpoint import CheckpointError, Checkpoints
from mmjax.train.progress import Progress
from mmjax.train.watchdog import Watchdog


def meta_of(workdir, step) -> pathlib.Path:
  return workdir / 'checkpoints' / str(step) / 'meta' / 'metadata'


def fingerprints(workdir, step):
  return json.loads(meta_of(workdir, step).read_text())['fingerprints']


def said(run):
  return (run.workdir / 'train.log').read_text()


def steps(workdir):
  return sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir())


@pytest.fixture
def slow_disk(monkeypatch):
  """What is written needs a second before it is whole."""
  import orbax.checkpoint as ocp

  options = ocp.CheckpointManagerOptions
  slow = ocp.options.AsyncOptions(post_finalization_callback=lambda: time.sleep(1))
  monkeypatch.setattr(
    ocp, 'CheckpointManagerOptions', lambda **kw: options(async_options=slow, **kw)
  )


@pytest.mark.slow
def test_a_slow_disk_neither_stalls_nor_loses_anything(run, slow_disk):
  """Saves are due each step, and take as long as many steps."""
  saving = []
  save = Checkpoints.save

  def timed(self, state, step, meta):
    began = time.monotonic()
    save(self, state, step, meta)
    saving.append((step, time.monotonic() - began))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Checkpoints, 'save', timed)
    patch.setattr(loop, '_PATIENCE', 0.0)
    assert run(30, train=dict(checkpoint_every=1, keep=100)) == 'done'
  made = dict(saving)
  assert {1, 30} <= set(made) and len(made) < 15
  # None but the last waited for the one before.
  waited = [seconds for step, seconds in saving if 1 < step < 30]  # a fast run has none
  assert min(waited, default=0.0) < 0.7
  assert steps(run.workdir) == sorted(made)
  assert 'that of step 1 is still being written' in said(run)
  assert run(30, 'straight', train=dict(checkpoint_every=30)) == 'done'
  straight = run.workdir.parent / 'straight'
  assert fingerprints(run.workdir, 30) == fingerprints(straight, 30)


def test_a_checkpoint_without_a_format_number_is_migrated(run):
  run(2)
  content = json.loads(meta_of(run.workdir, 2).read_text())
  assert content.pop('format') == 1 and content.pop('goodput')['seconds'] > 0
  meta_of(run.workdir, 2).write_text(json.dumps(content))
  assert run(4) == 'done'
  assert run(4, 'straight') == 'done'
  straight = run.workdir.parent / 'straight'
  assert fingerprints(run.workdir, 4) == fingerprints(straight, 4)


def test_a_checkpoint_of_a_newer_format_is_refused_by_name(run):
  run(2)
  content = json.loads(meta_of(run.workdir, 2).read_text())
  meta_of(run.workdir, 2).write_text(json.dumps({**content, 'format': 7, 'mmjax': '9.1'}))
  told = r'checkpoints/2 is of format 7, written by mmjax 9\.1; .* up to format 1'
  with pytest.raises(CheckpointError, match=told):
    run(4)
  assert steps(run.workdir) == [2]  # not damaged, so not put aside


def test_a_pinned_checkpoint_stays(toy, tmp_path):
  state = toy().state
  checkpoints = Checkpoints(tmp_path, keep=2)
  checkpoints.pin(1)
  for step in range(5):
    checkpoints.save(state, step, {})
  checkpoints.wait()
  assert checkpoints.steps() == [1, 3, 4]


@pytest.mark.slow
def test_a_clock_that_is_off_changes_nothing(run, monkeypatch):
  """The run moves to hosts whose clocks are days away."""
  assert run(6, 'straight') == 'done'
  assert run(2) == 'done'
  right = time.time
  for last, days in ((4, 3), (6, -3)):
    monkeypatch.setattr(time, 'time', lambda days=days: right() + days * 86400)
    assert run(last) == 'done'
  straight = run.workdir.parent / 'straight'
  assert fingerprints(run.workdir, 6) == fingerprints(straight, 6)
  lines = log_lib.read(run.workdir / 'metrics.jsonl')
  assert all(0 < x['train/goodput'] <= 1 for x in lines if 'train/loss' in x)


def test_goodput_counts_steps_that_are_kept_against_all_time(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(time, 'monotonic', lambda: now[0])
  monkeypatch.setattr(time, 'time', lambda: now[0])
  run = Progress()

  def spend(phase, seconds):
    run.enter(phase)
    now[0] += seconds

  spend('compiling', 10)
  spend('data', 2)
  spend('step', 18)
  with run.during('saving'):
    now[0] += 10
  saved = run.to_json()
  assert run.phase == 'step' and run.goodput() == 20 / 40
  spend('step', 30)  # which a kill undoes
  run = Progress(json.loads(json.dumps(saved)))
  spend('restoring', 10)
  spend('step', 20)
  spend('evaluating', 0)
  assert run.goodput() == pytest.approx(40 / 100)


def test_a_late_step_tells_where_the_process_is(monkeypatch):
  progress, told = Progress(), []
  dog = Watchdog(progress, 0.2, lambda *said: told.append(said))
  dog.start()
  dog.beat()
  for step in range(5):
    progress.enter('step', step)
    time.sleep(0.01)
    dog.beat()
  assert not told

  def drawing_from_a_disk_that_hangs():
    time.sleep(0.8)

  progress.enter('data', 5)
  drawing_from_a_disk_that_hangs()
  dog.beat()
  (head, where), *more = told
  assert not more  # once
  assert head.startswith('step 5 takes 0 s, the others 0.01')
  assert where.startswith('step 5, data for ')
  assert 'in drawing_from_a_disk_that_hangs' in where
  dog.rest()  # an evaluation has no measure
  time.sleep(0.5)
  dog.close()
  assert len(told) == 1


def test_ten_times_the_median_is_late_whatever_came_before():
  told = []
  dog = Watchdog(Progress(), 0.2, lambda *said: told.append(said))
  dog.start()
  dog.beat()
  for seconds in (0.1, 0.1, 0.1, 0.5):  # a step of a second would be late
    time.sleep(seconds)
    dog.beat()
  dog.close()
  assert not told


def test_a_run_says_which_phase_is_stuck_and_goes_on(run, monkeypatch):
  draw = Steps.__next__

  def slow(self):
    if self.next_step == 3:
      time.sleep(2.5)
    return draw(self)

  monkeypatch.setattr(Steps, '__next__', slow)
  assert run(4, train=dict(watchdog=1.0, checkpoint_every=100)) == 'done'
  text = said(run)
  assert re.search(r'step 3 takes \d+ s, the others', text)
  assert re.search(r'process 0: step 3, data for \d+ s', text) and ', in slow' in text
  assert not [t for t in threading.enumerate() if t.name == 'watchdog']


def test_nobody_to_ask_but_oneself():
  assert processes.ask_around('where', 'here', seconds=9.0) == ['here']


def test_a_profile_of_some_steps(run):
  assert run(6, profile=(3, 5)) == 'done'
  (trace,) = (run.workdir / 'profile').rglob('*.xplane.pb')
  assert trace.stat().st_size > 1000
  assert 'a trace of the steps from 3 on is in' in said(run)


@pytest.mark.slow
def test_a_profile_past_the_end_is_closed(run):
  assert run(2, profile=(2, 9)) == 'done'
  assert list((run.workdir / 'profile').rglob('*.xplane.pb'))


def test_what_a_profile_may_be():
  assert profile_lib.span(None) is None
  assert profile_lib.span('10:13') == (10, 13)
  for text in ('10', '13:10', '0:3', 'a:b', '3:3'):
    with pytest.raises(ValueError, match=f'--profile={text}: must be start:stop'):
      profile_lib.span(text)


@pytest.fixture
def caching(monkeypatch, tmp_path):
  """The cache switched on, and back; its home is a folder of the test."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  before = jax.config.jax_enable_compilation_cache, jax.config.jax_compilation_cache_dir
  jax.config.update('jax_enable_compilation_cache', True)
  yield tmp_path
  jax.config.update('jax_enable_compilation_cache', before[0])
  jax.config.update('jax_compilation_cache_dir', before[1])


def test_compiled_programs_are_kept(caching):
  assert cache.use('off') is None
  assert cache.use('auto') == str(caching / 'mmjax' / 'compiled')
  assert jax.config.jax_compilation_cache_dir == str(caching / 'mmjax' / 'compiled')
  # What was said to JAX first stays.
  assert cache.use(str(caching / 'other')) == str(caching / 'mmjax' / 'compiled')


def test_a_home_that_cannot_be_written_is_no_error(caching, monkeypatch):
  (caching / 'file').write_text('')
  monkeypatch.setenv('XDG_CACHE_HOME', str(caching / 'file'))
  assert cache.use('auto') is None
  with pytest.raises(ValueError, match=r"compilation_cache = '.*file/x' can't be writt"):
    cache.use(str(caching / 'file' / 'x'))
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setattr(pathlib.Path, 'expanduser', lambda self: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    cache.use('auto')


def test_switched_off_by_the_environment(monkeypatch):
  assert not jax.config.jax_enable_compilation_cache
  assert cache.use('auto') is None
