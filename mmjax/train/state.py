"""The state of a run: one pytree of plain arrays, and where each of them lives.

An optimizer's leaf that has the shape of its parameter (moments, momentum, the
moving average) lives where the parameter lives; everything else (counts,
Adafactor's rows and columns) is small and whole on every device.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmjax import sharding
from mmjax.train.moments import parameter_of
from mmjax.train.optim import Optimizer, merge, paths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a step changes.

  step:             i32[] steps made = position in the data
  params:           the tree of parameters, frozen ones included
  opt_state:        optax' state of the trained parameters
  ema:              moving average of the trained parameters (None at the frozen), or None
  skipped:          i32[] updates left out because loss or gradient was not finite
  skipped_in_a_row: i32[] of them, since the last good one
  """

  step: jax.Array
  params: Any
  opt_state: Any
  ema: Any
  skipped: jax.Array
  skipped_in_a_row: jax.Array

  def eval_params(self) -> Any:
    """The parameters to evaluate and to ship: the moving average where there is one."""
    return self.params if self.ema is None else merge(self.ema, self.params)


def create(params: Any, optimizer: Optimizer) -> TrainState:
  """The state before the first step."""
  trained, _ = optimizer.split(params)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.tx.init(trained),
    ema=None if optimizer.ema is None else jax.tree.map(jnp.copy, trained),
    skipped=jnp.zeros((), jnp.int32),
    skipped_in_a_row=jnp.zeros((), jnp.int32),
  )


def shardings(
  abstract: TrainState, param_shardings: Any, optimizer: Optimizer, mesh: Mesh
) -> TrainState:
  """The tree of `NamedSharding`s of a state.

  Args:
    abstract: shapes of the state.
    param_shardings: `sharding.shardings` of the parameters.
  """
  whole = NamedSharding(mesh, PartitionSpec())
  placed, _ = optimizer.split(param_shardings)
  flat = jax.tree_util.tree_leaves_with_path(abstract.params)
  shapes = {path: x.shape for path, x in flat}
  where = dict(zip(shapes, jax.tree.leaves(param_shardings), strict=True))

  def of(path, leaf):
    return where.get(parameter_of(path, leaf, shapes), whole)

  opt_state = jax.tree_util.tree_map_with_path(of, abstract.opt_state)
  ema = None if abstract.ema is None else placed
  return TrainState(whole, param_shardings, opt_state, ema, whole, whole)


def plan(
  init_params: Callable[[jax.Array], Any],
  make_optimizer: Callable[[Any, Any], Optimizer],
  mesh: Mesh,
  rules: sharding.Rules,
) -> tuple[Optimizer, TrainState, Callable[..., TrainState]]:
  """Everything about the state without computing it.

  Args:
    init_params: rng -> tree of parameters.
    make_optimizer: (shapes, axis names) of the parameters -> `Optimizer`.

  Returns:
    The optimizer; the state as `ShapeDtypeStruct`s with shardings; and the jitted
    init, (rng, given={path: parameter}) -> state, every leaf born in its place; those
    given, which it takes over, aren't drawn.

  Raises:
    ValueError: a parameter that doesn't fit the rules, or the optimizer's patterns.
  """
  rng = jax.eval_shape(lambda: jax.random.key(0))  # no array, also where none can be
  params = jax.eval_shape(init_params, rng)
  names = sharding.axis_names(init_params, rng)
  param_shardings = sharding.shardings(names, params, mesh, rules)
  optimizer = make_optimizer(params, names)

  def init(rng, given):
    return create(_replace(init_params(rng), given), optimizer)

  abstract = jax.eval_shape(init, rng, {})
  placed = shardings(abstract, param_shardings, optimizer, mesh)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed
  )
  made = jax.jit(init, out_shardings=placed, donate_argnums=1)
  return optimizer, abstract, lambda rng, given=None: made(rng, given or {})


def _replace(params: Any, given: Mapping[str, jax.Array]) -> Any:
  """The tree with leaves put in by path."""
  leaves = [given.get(p, x) for p, x in zip(paths(params), jax.tree.leaves(params))]
  if lost := given.keys() - set(paths(params)):
    raise ValueError(f'there is no parameter {min(lost)}')
  return jax.tree.unflatten(jax.tree.structure(params), leaves)
