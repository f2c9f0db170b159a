"""One step of a run again, alone, to see what went wrong in it.

  python -m mmjax.train.replay --workdir=runs/x --step=812
  python -m mmjax.train.replay --workdir=runs/x --step=812 --kept

  checkpoint 800 -> steps 801 ... 811 again -> step 812: loss, gradients, documents

A step is a function of the state, and the state one of the config and the number of
steps made; so the first way gives the bits of the run, on the same devices, whatever
checkpoint it starts from (none: from the beginning). If the batch was kept
(`train.spikes`), it says whether the one that is drawn now equals it. The second way
draws nothing: it takes the batch that was kept, and the parameters of the checkpoint
before as they are. That is quick and needs no data, but isn't the run's step.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from mmjax import files, sharding
from mmjax.train import begin, build, cache, datasets, spikes
from mmjax.train import config as config_lib
from mmjax.train import step as step_lib
from mmjax.train.checkpoint import Checkpoints
from mmjax.train.optim import by_path

_SHOWN = 16


def replay(
  workdir: str | os.PathLike,
  step: int,
  use_kept: bool = False,
  changes: Sequence[str] = (),
  say: Callable[[str], Any] = print,
  devices: Any = None,
) -> dict[str, float]:
  """Makes a step again; changes nothing in the workdir.

  Args:
    workdir: of the run.
    step: which, from 1 on, as in its log.
    use_kept: the second way, see above.
    changes: of the config, as in 'sharding.mesh.data=1'.
    say: gets the lines to print.
    devices: default `jax.devices()`.

  Returns:
    The metrics of the step.

  Raises:
    ValueError: no run there, no such step, or no batch of it; other data; one line.
  """
  from mmjax.eval.rerun import load

  workdir = files.place(workdir, '--workdir')
  config = load(workdir, changes)
  if not 1 <= step <= config.train.steps:
    raise ValueError(f'--step={step}: the run has steps 1 to {config.train.steps}')
  build.use_cpu_devices(config)
  cache.use(config.train.compilation_cache)
  dataset = datasets.load(config)
  parts = build.build(config, dataset.tokenizer.vocab_size, devices)
  pipeline = build.pipeline_of(
    config, dataset, parts.model, parts.budget, parts.media_rules
  )
  known = {about['step']: about for about in spikes.kept(workdir / 'spikes')}
  about, batch = known.get(step), None
  if about is not None:
    batch = spikes.load(workdir / 'spikes', about, parts.budget.empty(1))
  elif use_kept:
    raise ValueError(f'no batch of step {step} was kept (there are: {sorted(known)})')

  with sharding.use(parts.mesh, parts.rules):
    step_fn = build.step_of(config, parts)
    state, start = _state(config, parts, dataset, pipeline, workdir, step - 1)
    if use_kept:
      say(
        f'step {step} of {workdir}: the batch that was kept, on the parameters after step'
        f' {start}; not the step of the run unless that is the one before'
      )
      state = dataclasses.replace(state, step=jnp.full_like(state.step, step - 1))
    else:
      say(f'step {step} of {workdir}: from the state after step {start}')
      state, drawn = _go_to(state, step_fn, config, parts, pipeline, start, step)
      if batch is not None:
        pairs = zip(jax.tree.leaves(batch), jax.tree.leaves(drawn))
        same = all(np.array_equal(a, b) for a, b in pairs)
        say(f'the batch drawn now {"equals" if same else "DIFFERS from"} the one kept')
      batch = drawn
    placed = sharding.place_batch(batch, config.data.rows, parts.mesh, parts.rules)
    lines = _look(config, parts, state, batch, placed)
    _, metrics = step_fn(state, placed)
  metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
  then = '' if about is None else f' (in the run: {about["metrics"]["loss"]})'
  say(f'loss {metrics["loss"]!r}{then}')
  say(f'gradient norm {metrics["grad_norm"]:.6g}, of that')
  for line in lines:
    say(line)
  ids = datasets.ids(config, pipeline.plan, step - 1)
  say(f'documents: {datasets.named(dataset, ids)}')
  return metrics


def _state(config, parts, dataset, pipeline, workdir, until):
  """(the newest state that a checkpoint or the beginning gives, its step)."""
  folder = workdir / 'checkpoints'

  def same(meta):
    datasets.refuse_others(config, dataset, pipeline.plan, meta)

  if folder.is_dir():
    checkpoints = Checkpoints(folder, read_only=True)
    try:
      found = checkpoints.restore(parts.abstract, same, until)
    finally:
      checkpoints.close()
    if found is not None:
      return found[0], found[1]['step']
  return begin.state(config, parts), 0


def _go_to(state, step_fn, config, parts, pipeline, start, step):
  """(the state before the step, the step's batch)."""
  with contextlib.closing(pipeline.iterate(start)) as loaded:
    for _ in range(start + 1, step):
      batch = next(loaded).batch
      placed = sharding.place_batch(batch, config.data.rows, parts.mesh, parts.rules)
      state, _ = step_fn(state, placed)
    return state, next(loaded).batch


def _look(config, parts, state, batch, placed):
  """Lines on gradients by module, and on the first values that aren't finite."""
  gradient = step_lib.make_gradient(
    parts.loss_fn, parts.optimizer, build.step_rng(config), accumulate=parts.accumulate
  )

  @jax.jit
  def look(state, batch):
    grads, sums = gradient(state, batch)
    grads = jax.tree.map(lambda g: g / jnp.maximum(sums['weight'], 1e-30), grads)
    norms = {k: optax.tree.norm(tree) for k, tree in _modules(grads).items()}
    bad = {'parameters': _bad(state.params), 'gradients': _bad(grads)}
    return norms, bad, sums

  norms, bad, sums = jax.device_get(look(state, placed))
  lines = [f'  {k}  {float(v):.6g}' for k, v in norms.items()]
  values = {k: np.any(~np.isfinite(x)) for k, x in by_path(batch).items() if _float(x)}
  found = [
    ('parameters', bad['parameters']), ('values of the batch', values),
    ('sums of the loss', {k: not np.isfinite(v) for k, v in sums.items()}),
    ('gradients', bad['gradients']),
  ]  # fmt: skip
  # In the order in which they are computed, so what comes first isn't to blame itself.
  told = [(what, [k for k, is_bad in which.items() if is_bad]) for what, which in found]
  told = [(what, which) for what, which in told if which]
  if not told:
    return [*lines, 'all finite: parameters, batch, loss, gradients']
  for i, (what, which) in enumerate(told):
    more = f' and {len(which) - _SHOWN} more' if len(which) > _SHOWN else ''
    order = 'not finite first' if i == 0 else 'then'
    lines.append(f'{order}: {what}: {", ".join(which[:_SHOWN])}{more}')
  if (line := _primitive(parts, state, placed, build.step_rng(config))) is not None:
    lines.append(line)
  return lines


def _primitive(parts, state, batch, rng):
  """The first operation of the forward pass that made a NaN, if it can be told."""
  from jax.experimental import checkify

  def loss(params):
    return parts.loss_fn(params, batch, jax.random.fold_in(rng, state.step), True)[0]

  with contextlib.suppress(Exception):  # not every operation can be checked
    error, _ = jax.jit(checkify.checkify(loss, errors=checkify.float_checks))(
      state.params
    )
    if told := error.get():
      return f'the first operation: {" ".join(told.split())}'
  return None


def _modules(tree):
  """{name of a top-level module: its leaves}."""
  out = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    out.setdefault(jax.tree_util.keystr(path[:1], simple=True), []).append(leaf)
  return out


def _bad(tree):
  return {k: jnp.any(~jnp.isfinite(x)) for k, x in by_path(tree).items() if _float(x)}


def _float(x):
  return jnp.issubdtype(x.dtype, jnp.floating)


def main(argv: list[str]) -> None:
  options = flags.FLAGS
  try:
    if len(argv) > 1 or options.workdir is None or options.step is None:
      raise ValueError('needs --workdir and --step, and takes nothing else but --kept')
    replay(options.workdir, options.step, options.kept, options.set)
  except ValueError as error:
    if not config_lib.is_ours(error):
      raise
    sys.exit(config_lib.refuse(error))


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Directory of the run.')
  flags.DEFINE_integer('step', None, 'Which step, as in the log.')
  flags.DEFINE_boolean('kept', False, 'Use the batch that was kept; draw nothing.')
  flags.DEFINE_multi_string('set', [], 'A changed value, as sharding.mesh.data=1.')
  app.run(main)
