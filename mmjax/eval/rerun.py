"""Evaluation of a finished (or killed) run from what its workdir holds.

  config.json + data + checkpoints/<step>  ->  the numbers of that step again

The same parameters in the same compiled program give the same predictions, so an
evaluation that differs from the one in `eval/<step>.json` says that something
else has changed: the data, the code, or the machine.
"""

import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from mmjax import files
from mmjax.data import tokenizer
from mmjax.eval import build_evaluators, report
from mmjax.train import build as build_lib
from mmjax.train import config as config_lib
from mmjax.train.checkpoint import Checkpoints


def rerun(
  workdir: str | os.PathLike,
  step: int | None = None,
  changes: Sequence[str] = (),
  say: Callable[[str], Any] = print,
) -> dict[str, Any]:
  """Evaluates a checkpoint; writes the report of its step if there is none yet.

  Args:
    workdir: of the run.
    step: which checkpoint; None = the newest.
    changes: of the config, as in 'eval.vqa.rows=64'.
    say: gets the lines to print.

  Returns:
    By name of the evaluator its `Result`.

  Raises:
    ValueError: no run or no such checkpoint there (the steps are listed), nothing
      to evaluate, a change that doesn't fit, other data; one line.
  """
  workdir = files.place(workdir, '--workdir')
  config = load(workdir, changes)
  if not config.eval:
    raise ValueError(f'{workdir}: config.eval names nothing to evaluate')
  build_lib.use_cpu_devices(config)
  checkpoints = Checkpoints(workdir / 'checkpoints', read_only=True)
  try:
    parts = build_lib.build(config, tokenizer.load(config.data.path).vocab_size)
    params, meta = checkpoints.restore_params(parts.abstract.params, step)
  finally:
    checkpoints.close()
  step = meta['step']
  evaluators = build_evaluators(
    config,
    model=parts.model,
    mesh=parts.mesh,
    rules=parts.rules,
    tokenizer_hash=meta['tokenizer_hash'],
  )
  results = {name: e.run(params, step) for name, e in evaluators.items()}
  if jax.process_index() == 0:
    _report(workdir, step, results, say)
  return results


def load(workdir: pathlib.Path, changes: Sequence[str] = ()) -> ConfigDict:
  """The config of a run, without the limits of scheduled evaluations, changed.

  Raises:
    ValueError: no run there; a change of a key that isn't, or to another type.
  """
  path = workdir / 'config.json'
  with files.reaching(workdir):
    if not path.exists():
      raise ValueError(f'no run at {workdir}: {path.name} is missing')
    config = config_lib.from_json(path.read_text())
  for name in config.eval:
    if 'limit' in config.eval[name]:
      del config.eval[name]['limit']
  for change in changes:
    key, equals, text = change.partition('=')
    *sections, word = key.split('.')
    node = config
    for section in sections:
      node = node.get(section) if isinstance(node, ConfigDict) else None
    inside = isinstance(node, ConfigDict)
    # Fields of evaluators are checked when those are built.
    if not equals or not inside or (word not in node and sections[:1] != ['eval']):
      raise ValueError(f'unknown config key {key!r}{config_lib.near_key(key, config)}')
    try:
      value = json.loads(text)
    except ValueError:
      value = text
    try:
      node[word] = value
    except TypeError:
      want = node.get_type(word).__name__
      raise ValueError(f'config.{key} = {text}: must be {want}') from None
  return config


def _report(workdir, step, results, say) -> None:
  say(f'{workdir}, step {step}')
  say(report.table(results))
  before = report.read(workdir, step)
  if before is None:
    paths = report.write(workdir, step, results)
    pages = [str(path) for kind, path in paths.items() if kind.startswith('html')]
    say(f'written: {", ".join(pages)}')
  else:
    say(f'compared with eval/{step}.json: {report.same_predictions(results, before)}')
