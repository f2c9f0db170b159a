"""The one training loop: every task, every model, every mesh.

  dispatch step s  ->  save, if due  ->  evaluate, if due  ->  draw batch s + 1
        |                                                        (while s runs)
        '-- read the numbers of step s - 1, which is done: nothing waits

The position in the data is the step, the random numbers are a function of the
step, so the same command after a kill goes on from the last checkpoint and ends
with the same bits. A signal to stop finishes the step and saves: `train.signals`.
"""

import contextlib
import logging
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import mmjax
from mmjax import files, sharding
from mmjax.train import begin, datasets, processes
from mmjax.train import build as build_lib
from mmjax.train import config as config_lib
from mmjax.train import log as log_lib
from mmjax.train.checkpoint import Checkpoints
from mmjax.train.signals import Signalled, Signals
from mmjax.train.step import compile_step
from mmjax.train.window import Window, share

_log = logging.getLogger('mmjax')


class RunStopped(RuntimeError):
  """The run can't go on; one line says why."""


def train(config: ConfigDict, workdir: str | os.PathLike, devices=None) -> str:
  """Trains, from the start or from where the workdir stands.

  Args:
    config: resolved (`config.resolve`) and checked.
    workdir: everything that a run leaves goes here.
    devices: default `jax.devices()`.

  Returns:
    'done', or 'stopped' by a signal (the same call goes on later).

  Raises:
    ValueError: the config, the data or the checkpoints don't fit; one line.
    RunStopped: too many bad documents or non-finite updates, a full disk.
  """
  from mmjax.eval import build_evaluators

  config_lib.check(config)
  build_lib.use_cpu_devices(config)
  processes.refuse_unjoined()
  workdir = files.on_disk(workdir, '--workdir').absolute()
  first = jax.process_index() == 0
  with log_lib.logging_to(workdir, first):
    _keep_config(config, workdir, first)
    _log.info('%s', processes.found())
    if config.train.compilation_cache:
      jax.config.update('jax_compilation_cache_dir', config.train.compilation_cache)
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
      run = _Run(config, workdir, parts, pipeline, dataset, evaluators)
      return run.go()


class _Run:
  """One run of the loop; `go` does it."""

  def __init__(self, config, workdir, parts, pipeline, dataset, evaluators):
    self.config, self.workdir, self.parts = config, workdir, parts
    self.pipeline, self.dataset, self.evaluators = pipeline, dataset, evaluators
    self.checkpoints = Checkpoints(workdir / 'checkpoints', config.train.keep)
    self.block = sharding.row_block(config.data.rows, parts.mesh, parts.rules)
    self.window = Window()
    self.state = self._restore_or_init()
    self.start = int(self.state.step)
    self.log = log_lib.RunLog(
      workdir, self.start, config.train.steps, jax.process_index() == 0
    )
    self.signals = Signals()
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
    found = self.checkpoints.restore(parts.abstract, self._accept)
    if found is None:
      given = begin.parameters(parts.model, params, self.config.init.to_dict())
      if given:
        count = sum(x.size for x in given.values())
        _log.info('%s parameters from %s', f'{count:,}', self.config.init.to_json())
      return parts.init(jax.random.fold_in(jax.random.key(self.config.seed), 0), given)
    state, meta = found
    self.window = Window.from_json(meta['window'], jax.process_index() == 0)
    _log.info('going on from step %d of %s', meta['step'], self.workdir)
    return state

  def _accept(self, meta):
    mine, theirs = self.dataset.tokenizer.hash, meta['tokenizer_hash']
    if mine != theirs:
      raise ValueError(
        f'the tokenizer of {datasets.where(self.config)} has hash {mine[:12]}, the'
        f' checkpoint was trained with {theirs[:12]}; put that data back or use another'
        ' --workdir'
      )
    # The place in the data is the step; the counts tell whether it is the same data.
    then, now = meta.get('documents'), self._dealt(meta['data_position'])
    if then not in (None, now):
      raise ValueError(
        f'the data of {datasets.where(self.config)} is not what it was: {now} documents'
        f' before step {meta["data_position"]}, the checkpoint says {then}; put that'
        ' data back or use another --workdir'
      )

  def _dealt(self, steps) -> dict[str, int]:
    """How many documents of each source come in so many steps."""
    return self.pipeline.plan.before(steps * self.config.data.rows)

  def go(self) -> str:
    try:
      with self.signals:
        outcome = self._steps() if self._missing_evaluation() else 'stopped'
      self.checkpoints.wait()
      if outcome == 'done':
        _log.info('done: %d steps in %s', self.config.train.steps, self.workdir)
      else:
        _log.info('stopped at step %d; the same command goes on', int(self.state.step))
      return outcome
    except (ValueError, jax.errors.JaxRuntimeError) as error:
      if processes.is_lost(error):
        self.lost = True
        raise RunStopped(processes.how_lost(error)) from error
      if isinstance(error, ValueError) and config_lib.is_ours(error):
        raise RunStopped(str(error)) from error
      raise
    except OSError as error:  # a full disk, most of the time
      raise RunStopped(f'{error.strerror or error}: {error.filename or ""}') from error
    finally:
      self.log.close()
      if not self.lost:  # or it would wait for them
        with contextlib.suppress(ValueError):
          self.checkpoints.close()

  def _steps(self) -> str:
    """Steps until the end or a signal."""
    config, steps = self.config, self.config.train.steps
    if self.start >= steps:
      return 'done'
    step_fn = self.parts.step(config.seed)
    shapes = self.parts.batch_shapes(config.data.rows)
    began = time.monotonic()
    step_fn = compile_step(step_fn, self.parts.abstract, shapes)
    _log.info('compiled the step in %.1f s', time.monotonic() - began)
    loaded = self.pipeline.iterate(self.start, *self.block)
    with contextlib.closing(loaded):
      return self._loop(step_fn, loaded)

  def _loop(self, step_fn, loaded) -> str:
    config, steps = self.config, self.config.train.steps
    self.window.restart_clock()
    batch, stats = self._draw(loaded)
    pending = None
    for done in range(self.start + 1, steps + 1):
      self.state, metrics = step_fn(self.state, batch)
      self.log.advance()
      self._read(pending)
      pending = (done, metrics, stats)
      self.checkpoints.check()
      stopped = self.signals.agreed()
      due = done % config.train.checkpoint_every == 0 or done == steps
      evaluate = self._evaluation_due(done)
      if stopped or due or evaluate:
        self._read(pending)
        pending = None
      if stopped or due:
        self._save(done)
      if evaluate and not stopped:
        stopped = not self._evaluate(done)
        if stopped:
          self._save(done)
      if done == steps and not stopped:
        return 'done'
      if stopped:
        return 'stopped'
      batch, stats = self._draw(loaded)
    raise RuntimeError('a run without steps')

  def _draw(self, loaded):
    found = next(loaded)
    batch = sharding.place_batch(
      found.batch, self.config.data.rows, self.parts.mesh, self.parts.rules
    )
    return batch, share(found.stats, self.block[1])

  def _read(self, pending):
    """Takes in the numbers of a step; logs every `log_every` steps."""
    if pending is None:
      return
    done, metrics, stats = pending
    metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    self.window.add(metrics, stats)
    in_a_row = int(metrics['skipped_in_a_row'])
    if in_a_row:
      _log.warning(
        'step %d: loss %s, gradient norm %s; update left out',
        done, metrics['loss'], metrics['grad_norm'],
      )  # fmt: skip
    if done % self.config.train.log_every == 0 or done == self.config.train.steps:
      self.log.write(done, self.window.flush(processes.gather))
    if in_a_row >= self.config.train.max_skipped:
      raise RunStopped(
        f'{in_a_row} updates in a row were not finite, steps {done - in_a_row + 1} to'
        f' {done}; documents of step {done}: {self._documents(done - 1)}'
      )

  def _documents(self, step) -> str:
    rows = range(step * self.config.data.rows, (step + 1) * self.config.data.rows)
    ids = [int(i) for r in rows for i in self.pipeline.plan.row(r)]
    shown = ', '.join(self.dataset[i].id or f'#{i}' for i in ids[:16])
    return shown + (f' and {len(ids) - 16} more' if len(ids) > 16 else '')

  def _save(self, done):
    meta = {
      'window': self.window.to_json(processes.gather),
      'tokenizer_hash': self.dataset.tokenizer.hash,
      'data_position': done,
      'documents': self._dealt(done),
      'config': self.config.to_dict(),
      'mmjax': mmjax.__version__,
    }
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
    try:
      with self.signals.raising():
        for name, evaluator in self.evaluators.items():
          if full or (evaluator.every and done % evaluator.every == 0):
            results[name] = evaluator.run(params, done, full=full)
    except Signalled:
      return False
    if jax.process_index() == 0:
      report.write(self.workdir, done, results)
      metrics = {
        f'eval/{k}': v for result in results.values() for k, v in result.metrics.items()
      }
      self.log.write(done, metrics)
      curves.write(self.workdir, self.workdir.name)
    self.window.restart_clock()
    return True


def _keep_config(config: ConfigDict, workdir: pathlib.Path, first: bool) -> None:
  path = workdir / 'config.json'
  if path.exists():
    differ = config_lib.refuse_changes(config_lib.from_json(path.read_text()), config)
    if differ:
      _log.info('changed since this run began: %s', ', '.join(differ))
  if first:
    workdir.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix('.tmp')
    fresh.write_text(config_lib.to_json(config))
    os.replace(fresh, path)
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
