"""From a config to the parts of a run: budget, model, mesh, optimizer, state.

Nothing is computed here, so the same parts serve training, evaluation from a
checkpoint, planning for hardware that isn't there, and tests of big configs.
"""

import contextlib
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mmjax import models, sharding
from mmjax.batch import BankBudget, Budget
from mmjax.data.audio import AudioRule
from mmjax.data.media import ImageRule
from mmjax.data.pipeline import Pipeline
from mmjax.data.video import VideoRule
from mmjax.train import optim, state, step, tasks
from mmjax.train.config import fields_of

# By media kind, what config.data.<kind> describes.
_RULES = {'image': ImageRule, 'audio': AudioRule, 'video': VideoRule}


@dataclasses.dataclass(frozen=True)
class Parts:
  """What a run is made of; see `build`.

  budget:      shape of a row.
  media_rules: by kind, how an item becomes patches.
  model:       the module.
  mesh, rules: where things are.
  loss_fn:     the task.
  accumulate:  microbatches that the step makes; 1, where the task makes them.
  optimizer:   `optim.Optimizer`.
  abstract:    `TrainState` of shapes with shardings.
  init:        jitted, (rng, given={path: parameter}) -> TrainState.
  """

  budget: Budget
  media_rules: dict[str, Any]
  model: Any
  mesh: jax.sharding.Mesh
  rules: sharding.Rules
  loss_fn: step.LossFn
  accumulate: int
  optimizer: optim.Optimizer
  abstract: state.TrainState
  init: Any

  def batch_shapes(self, rows: int) -> Any:
    """A global batch of shapes with shardings.

    Raises:
      ValueError: the rows don't divide over the mesh.
    """
    shapes = _shapes(self.budget, rows)
    places = sharding.batch_shardings(shapes, self.mesh, self.rules)
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places
    )

  def step(self, rng: jax.Array) -> Any:
    """The training step, see `step.make_step`; rng: of all steps, `step_rng`."""
    return step.make_step(
      self.loss_fn,
      self.optimizer,
      rng,
      accumulate=self.accumulate,
      grad_shardings=jax.tree.map(lambda x: x.sharding, self.abstract.params),
    )


def step_of(config: ConfigDict, parts: Parts) -> Any:
  """The compiled step of a config: (state, batch) -> (state, metrics).

  Its random numbers are fold_in(fold_in(key(seed), 1), steps made before).
  """
  shapes = parts.batch_shapes(config.data.rows)
  return step.compile_step(parts.step(step_rng(config)), parts.abstract, shapes)


def step_rng(config: ConfigDict) -> jax.Array:
  """The key of all steps."""
  return jax.random.fold_in(jax.random.key(config.seed), 1)


def use_cpu_devices(config: ConfigDict) -> None:
  """Splits the CPU into `config.sharding.cpu_devices` devices, before JAX starts.

  One device per core keeps the cores busy where operations are too small to be
  worth splitting. Does nothing to accelerators, or once JAX has started.
  """
  if config.sharding.cpu_devices:
    with contextlib.suppress(RuntimeError):
      jax.config.update('jax_num_cpu_devices', config.sharding.cpu_devices)


def build(config: ConfigDict, vocab_size: int, devices=None) -> Parts:
  """Builds the parts of a run.

  Args:
    config: resolved.
    vocab_size: the tokenizer's.
    devices: default `jax.devices()`.

  Raises:
    ValueError: whatever in the config doesn't fit, in one line.
  """
  media_rules = rules_of(config)
  budget = budget_of(config, media_rules)
  mesh = sharding.make_mesh(config.sharding.mesh.to_dict(), devices)
  rules = sharding.rules_for(config.sharding.preset, config.sharding.rules.to_dict())
  model = model_of(config, vocab_size, budget)
  loss_fn, accumulate = tasks.build(config, model, budget)
  # As many rows as the mesh needs: parameters don't depend on them.
  shapes = _shapes(budget, math.prod(mesh.shape.values()))

  def init_params(rng):
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return model.init({'params': rng}, empty)['params']

  def optimizer(params, names):
    plain = config.optim.to_dict()
    return optim.build(params, names, steps=config.train.steps, **plain)

  with sharding.use(mesh, rules):
    made, abstract, init = state.plan(init_params, optimizer, mesh, rules)
  return Parts(
    budget, media_rules, model, mesh, rules, loss_fn, accumulate, made, abstract, init
  )


def _shapes(budget: Budget, rows: int) -> Any:
  """A batch of shapes; nothing of its size is made, which may be that of a pod's."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), budget.empty(1)
  )


def rules_of(config: ConfigDict) -> dict[str, Any]:
  """By media kind of the budget, the rule that `config.data.<kind>` describes."""
  kinds = [kind for kind in _RULES if config.data.budget.get(kind)]
  return {k: fields_of(config.data[k], _RULES[k], f'data.{k}') for k in kinds}


def budget_of(config: ConfigDict, media_rules: dict[str, Any]) -> Budget:
  """The `Budget` of config.data.budget."""
  plain = config.data.budget
  bank = {}
  for kind, rule in media_rules.items():
    given = dict(channels=rule.channels, dtype=getattr(rule, 'dtype', 'uint8'))
    section = ConfigDict({**plain[kind].to_dict(), **given})
    bank[kind] = fields_of(section, BankBudget, f'data.budget.{kind}')
  return Budget(plain.stream, plain.targets, bank)


def model_of(config: ConfigDict, vocab_size: int, budget: Budget) -> Any:
  """The model, with what the data says about it filled in.

  Rows of its tables beyond the tokenizer's `vocab_size` are padding: no target has
  them, and a round number of rows can be split over a mesh.

  Raises:
    ValueError: config.data.vocab_size has fewer rows than the tokenizer has ids; or
      the model's fields don't fit.
  """
  rows = config.data.vocab_size
  if rows is not None:
    if rows < vocab_size:
      raise ValueError(
        f'config.data.vocab_size = {rows}: the tokenizer has {vocab_size} ids'
      )
    vocab_size = rows
  media = tuple((kind, b.channels) for kind, b in sorted(budget.bank.items()))
  fields = {**config.model.to_dict(), 'vocab_size': vocab_size, 'media': media}
  return models.build(fields.pop('name'), **fields)


def pipeline_of(
  config: ConfigDict, dataset: Any, model: Any, budget: Budget, rules: dict[str, Any]
) -> Pipeline:
  """The pipeline of config.data over a dataset.

  Raises:
    ValueError: no document fits, or the model looks less far than documents reach.
  """
  pipeline = Pipeline(
    dataset,
    budget=budget,
    rows=config.data.rows,
    rules=rules,
    slots=model.slots,
    seed=config.seed,
    image_attention=config.data.image_attention,
    prompt_attention=config.data.prompt_attention,
    image_positions=config.data.image_positions,
    augment=config.data.augment,
    max_bad_share=config.data.max_bad_share,
    workers=config.data.workers,
    threads=config.data.threads,
  )
  refuse_short_reach(model, pipeline.reach)
  return pipeline


def refuse_short_reach(model: Any, needed: tuple[int, int]) -> None:
  """Refuses a model whose attention looks less far than the data's slots may see.

  Raises:
    ValueError: the model's `reach` would hide a part of a document from itself.
  """
  reach = getattr(model, 'reach', None)
  if reach is None:
    return
  have = (reach, reach) if isinstance(reach, int) else reach
  if have[0] < needed[0] or have[1] < needed[1]:
    raise ValueError(
      f'config.model.reach = {reach}, but slots of this data see up to {needed[0]}'
      f' back and {needed[1]} ahead; set it to {needed}, more, or None'
    )
