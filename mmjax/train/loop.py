"""The one training loop: every task, every model, every mesh.

  dispatch step s  ->  save, if due  ->  evaluate, if due  ->  draw batch s + 1
        |                                                        (while s runs)
        '-- read the numbers of step s - 1, which is done: nothing waits

The position in the data is the step, the random numbers are a function of the
step, so the same command after a kill goes on from the last checkpoint and ends
with the same bits. A signal to stop finishes the step and saves: `train.signals`.
"""

import contextlib
import functools
import logging
import os
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import mmjax
from mmjax import files, sharding
from mmjax.train import begin, cache, datasets, lifeline, processes
from mmjax.train import build as build_lib
from mmjax.train import config as config_lib
from mmjax.train import log as log_lib
from mmjax.train.checkpoint import Checkpoints
from mmjax.train.mirror import Mirror
from mmjax.train.profile import Profile
from mmjax.train.progress import Progress
from mmjax.train.signals import OUTCOMES, Signalled, Signals
from mmjax.train.spikes import Spikes, kept
from mmjax.train.watchdog import Watchdog
from mmjax.train.window import Window, share

_log = logging.getLogger('mmjax')
_PATIENCE = 5.0  # seconds that a run waits for a checkpoint before it leaves one out


class RunStopped(RuntimeError):
  """The run can't go on; one line says why. `code`: of the exit."""

  code = 1


class ProcessLost(RunStopped):
  """Another process has gone; nothing is wrong with the run."""

  code = lifeline.LOST


def train(
  config: ConfigDict,
  workdir: str | os.PathLike,
  devices=None,
  profile: tuple[int, int] | None = None,
) -> str:
  """Trains, from the start or from where the workdir stands.

  Args:
    config: resolved (`config.resolve`) and checked.
    workdir: everything that a run leaves goes here.
    devices: default `jax.devices()`.
    profile: steps (start, stop) to write a trace of, see `train.profile`.

  Returns:
    'done', or 'stopped' by Ctrl-C, or 'preempted' by SIGTERM (the same call goes on
    later).

  Raises:
    ValueError: the config, the data or the checkpoints don't fit; one line.
    RunStopped: too many bad documents or non-finite updates, a full disk.
  """
  from mmjax.eval import build_evaluators

  config_lib.check(config)
  build_lib.use_cpu_devices(config)
  processes.refuse_unjoined()
  workdir = files.place(workdir, '--workdir')
  workdir = workdir if files.in_bucket(workdir) else workdir.absolute()
  first = jax.process_index() == 0
  with Mirror(workdir, first) as mirror, log_lib.logging_to(mirror.folder, first):
    with files.reaching(workdir):
      _keep_config(config, workdir, first)
    _log.info('%s', processes.found())
    kept_in = cache.use(config.train.compilation_cache)
    _log.info('compiled programs are kept in %s', kept_in or 'no folder')
    if first:
      datasets.prepare(config, devices)
    processes.barrier('prepared')
    dataset = datasets.load(config)
    parts = build_lib.build(config, dataset.tokenizer.vocab_size, devices)
    refuse_uneven(config, parts)
    evaluators = build_evaluators(
      config, model=parts.model, mesh=parts.mesh, rules=parts.rules
    )
    pipeline = build_lib.pipeline_of(
      config, dataset, parts.model, parts.budget, parts.media_rules
    )
    with sharding.use(parts.mesh, parts.rules):
      run = _Run(config, mirror, parts, pipeline, dataset, evaluators, profile)
      return run.go()


class _Run:
  """One run of the loop; `go` does it."""

  def __init__(self, config, mirror, parts, pipeline, dataset, evaluators, profile):
    self.config, self.mirror, self.parts = config, mirror, parts
    self.workdir = workdir = mirror.workdir
    self.pipeline, self.dataset, self.evaluators = pipeline, dataset, evaluators
    self.plan = pipeline.plan
    self.checkpoints = Checkpoints(workdir / 'checkpoints', config.train.keep)
    self.block = sharding.row_block(config.data.rows, parts.mesh, parts.rules)
    self.window, self.progress = Window(), Progress()
    self.progress.enter('restoring')
    self.state = self._restore_or_init()
    self.start = self.saved = int(self.state.step)
    first = jax.process_index() == 0
    self.log = log_lib.RunLog(mirror.folder, self.start, config.train.steps, first)
    self.signals = Signals()
    self.spikes = Spikes(workdir / 'spikes', **config.train.spikes)
    for about in kept(workdir / 'spikes'):
      self.checkpoints.pin(about['checkpoint'])
    self.watchdog = Watchdog(self.progress, config.train.watchdog, _tell_where)
    self.profile = Profile(
      mirror.folder / 'profile', profile if first else None, workdir / 'profile'
    )
    self.lost = False  # another process

  def _restore_or_init(self):
    parts = self.parts
    params, places = (
      parts.abstract.params,
      jax.tree.map(lambda x: x.sharding, parts.abstract.params),
    )
    count = sum(x.size for x in jax.tree.leaves(params))
    _log.info('%s: %s parameters', self.config.model.name, f'{count:,}')
    _log.info('%s', sharding.table(params, places))
    _log.info('%s', self.pipeline.summary())
    sharding.refuse_replicated(params, places, self.config.sharding.max_replicated)
    same = functools.partial(datasets.refuse_others, self.config, self.dataset, self.plan)
    found = self.checkpoints.restore(parts.abstract, same)
    if found is None:
      return begin.state(self.config, parts)
    state, meta = found
    self.progress = Progress(meta['goodput'])
    self.window = Window.from_json(meta['window'], jax.process_index() == 0)
    _log.info('going on from step %d of %s', meta['step'], self.workdir)
    return state

  def go(self) -> str:
    try:
      with self.signals:
        self.watchdog.start()
        outcome = self._steps() if self._missing_evaluation() else self._asked()
      self.progress.enter('saving')
      self.checkpoints.wait()
      if outcome == 'done':
        _log.info('done: %d steps in %s', self.config.train.steps, self.workdir)
      else:
        _log.info('stopped at step %d; the same command goes on', int(self.state.step))
      return outcome
    except (ValueError, jax.errors.JaxRuntimeError) as error:
      if processes.is_lost(error):
        self.lost = True
        raise ProcessLost(processes.how_lost(error)) from error
      if isinstance(error, ValueError) and config_lib.is_ours(error):
        raise RunStopped(str(error)) from error
      raise
    except OSError as error:  # a full disk, most of the time
      raise RunStopped(f'{error.strerror or error}: {error.filename or ""}') from error
    finally:
      self.watchdog.close()
      self.profile.close()
      self.log.close()
      if not self.lost:  # or it would wait for them
        with contextlib.suppress(ValueError):
          self.checkpoints.close()

  def _asked(self) -> str:
    return OUTCOMES[self.signals.asked]

  def _steps(self) -> str:
    """Steps until the end or a signal."""
    if self.start >= self.config.train.steps:
      return 'done'
    began = time.monotonic()
    self.progress.enter('compiling', self.start + 1)
    step_fn = build_lib.step_of(self.config, self.parts)
    _log.info('compiled the step in %.1f s', time.monotonic() - began)
    loaded = self.pipeline.iterate(self.start, *self.block)
    with contextlib.closing(loaded):
      return self._loop(step_fn, loaded)

  def _loop(self, step_fn, loaded) -> str:
    config, steps = self.config, self.config.train.steps
    self.window.restart_clock()
    self.watchdog.beat()
    drawn = self._draw(loaded)
    pending = None
    for done in range(self.start + 1, steps + 1):
      self._tell(self.profile.before(done, self.state))
      self.progress.enter('step', done)
      batch, stats, rows = drawn
      self.state, metrics = step_fn(self.state, batch)
      self.log.advance()
      self._read(pending)
      pending = (done, metrics, stats, rows)
      self.watchdog.beat()
      self.checkpoints.check()
      stopped = self.signals.agreed()
      due = done % config.train.checkpoint_every == 0 or done == steps
      evaluate = self._evaluation_due(done)
      if stopped or due or evaluate:
        self._read(pending)
        pending = None
      if stopped or due:
        self._save(done, wait=stopped or done == steps)
      if evaluate and not stopped:
        stopped = None if self._evaluate(done) else self._asked()
        if stopped:
          self._save(done, wait=True)
      if done == steps and not stopped:
        self._tell(self.profile.close())
        return 'done'
      if stopped:
        return stopped
      drawn = self._draw(loaded)
    raise RuntimeError('a run without steps')

  def _tell(self, line):
    if line:
      _log.info('%s', line)

  def _draw(self, loaded):
    """(the batch on its devices, stats, the rows of this process)."""
    self.progress.enter('data')
    found = next(loaded)
    batch = sharding.place_batch(
      found.batch, self.config.data.rows, self.parts.mesh, self.parts.rules
    )
    return batch, share(found.stats, self.block[1]), found.batch

  def _read(self, pending):
    """Takes in the numbers of a step; logs every `log_every` steps."""
    if pending is None:
      return
    done, metrics, stats, rows = pending
    metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    self.window.add(metrics, stats)
    in_a_row = int(metrics['skipped_in_a_row'])
    if in_a_row:
      _log.warning(
        'step %d: loss %s, gradient norm %s; update left out',
        done, metrics['loss'], metrics['grad_norm'],
      )  # fmt: skip
    if reason := self.spikes.judge(metrics['loss'], bool(in_a_row)):
      self._keep_spike(done, reason, metrics, rows)
    if done % self.config.train.log_every == 0 or done == self.config.train.steps:
      line = self.window.flush(processes.gather)
      self.log.write(done, {**line, 'train/goodput': self.progress.goodput()})
    if in_a_row >= self.config.train.max_skipped:
      named = datasets.named(self.dataset, self._ids(done - 1))
      raise RunStopped(
        f'{in_a_row} updates in a row were not finite, steps {done - in_a_row + 1} to'
        f' {done}; documents of step {done}: {named}'
      )

  def _keep_spike(self, done, reason, metrics, rows):
    about = {
      'reason': reason,
      'metrics': {k: repr(v) for k, v in metrics.items()},  # JSON has no NaN
      'checkpoint': self.saved,  # 0: what the run began with
      'rng': f'fold_in(fold_in(key({self.config.seed}), 1), {done - 1})',
      'documents': self._ids(done - 1),
    }
    if self.spikes.keep(done, rows, self.block, about):
      self.checkpoints.pin(self.saved)
      _log.warning('step %d: %s; kept in %s', done, reason, self.workdir / 'spikes')

  def _ids(self, step) -> list[int]:
    return datasets.ids(self.config, self.plan, step)

  def _save(self, done, wait):
    """Starts to write a checkpoint; left out if the last one isn't written soon.

    Args:
      wait: for the last one instead, and write this one whatever it takes.
    """
    if not wait and processes.anyone(self.checkpoints.busy(_PATIENCE)):
      _log.warning(
        'no checkpoint of step %d: that of step %d is still being written; is the disk'
        ' slow, or config.train.checkpoint_every too small?', done, self.saved,
      )  # fmt: skip
      return
    with self.progress.during('saving'):
      self._save_now(done)
    self.saved = done

  def _save_now(self, done):
    meta = {
      'window': self.window.to_json(processes.gather),
      'tokenizer_hash': self.dataset.tokenizer.hash,
      'data_position': done,
      'documents': self.plan.before(done * self.config.data.rows),
      'goodput': self.progress.to_json(),
      'config': self.config.to_dict(),
      'mmjax': mmjax.__version__,
    }
    self.mirror.send()
    self.checkpoints.save(self.state, done, meta)

  def _evaluation_due(self, done) -> bool:
    last = done == self.config.train.steps
    every = (e.every for e in self.evaluators.values())
    return bool(self.evaluators) and (last or any(n and done % n == 0 for n in every))

  def _missing_evaluation(self) -> bool:
    """The evaluation before the first step, or one that a kill came before.

    False = stopped by a signal.
    """
    begun, wanted = self.start > 0, self.config.train.evaluate_first
    due = self._evaluation_due(self.start) if begun else self.evaluators and wanted
    # Process 0 knows, and all have to do the same.
    if not due or processes.gather(self.log.evaluated(self.start))[0]:
      return True
    return self._evaluate(self.start)

  def _evaluate(self, done) -> bool:
    """Evaluates and writes what there is to see; False = a signal came between."""
    from mmjax.eval import curves, report

    full = done in (0, self.config.train.steps)
    params = self.state.eval_params()
    results = {}
    self.watchdog.rest()
    try:
      with self.progress.during('evaluating'), self.signals.raising():
        for name, evaluator in self.evaluators.items():
          if full or (evaluator.every and done % evaluator.every == 0):
            results[name] = evaluator.run(params, done, full=full)
    except Signalled:
      return False
    if jax.process_index() == 0:
      report.write(self.mirror.folder, done, results)
      metrics = {
        f'eval/{k}': v for result in results.values() for k, v in result.metrics.items()
      }
      self.log.write(done, metrics)
      curves.write(self.mirror.folder, self.workdir.name)
    self.window.restart_clock()
    self.watchdog.beat()
    return True


def _tell_where(head: str, where: str) -> None:
  """Where all processes are, to the log of process 0."""
  for k, said in enumerate(processes.ask_around('where', where, seconds=3.0)):
    _log.warning('%sprocess %d: %s', '' if k else f'{head}\n', k, said.rstrip())


def _keep_config(config: ConfigDict, workdir: Any, first: bool) -> None:
  path = workdir / 'config.json'
  if path.exists():
    differ = config_lib.refuse_changes(config_lib.from_json(path.read_text()), config)
    if differ:
      _log.info('changed since this run began: %s', ', '.join(differ))
  if first:
    if not files.in_bucket(workdir):  # it would make the bucket
      workdir.mkdir(parents=True, exist_ok=True)
    files.replace(path, config_lib.to_json(config))
  processes.barrier('config')


def refuse_uneven(config: ConfigDict, parts: Any) -> None:
  rows, accumulate = config.data.rows, config.train.accumulate
  ways = np.prod([parts.mesh.shape[a] for a in _axes(parts.rules['batch'])], dtype=int)
  if (rows // accumulate) % ways:
    raise ValueError(
      f'config.data.rows = {rows} in {accumulate} microbatches does not divide over the'
      f' {ways} devices of mesh axes {_axes(parts.rules["batch"])}'
    )


def _axes(entry):
  return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
