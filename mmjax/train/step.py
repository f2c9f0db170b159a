"""One step of training, as a pure function of (state, batch).

  loss = sum over trained tokens / their global count

The count is taken once, over all microbatches and all devices, so accumulation
and sharding change nothing but the order of the additions. Microbatch a takes the
rows a, a + A, a + 2A, ...: then every device keeps the rows it holds.

  rows of a batch    0 1 2 3 | 4 5 6 7      two devices, A = 2
  microbatch 0       0   2   | 4   6
  microbatch 1         1   3 |   5   7

With `optim.grad_dtype` the loss gets a copy of the parameters in that type, cast where
they lie: what devices gather of it, and what they send each other of its gradients, has
that type, while parameters, sums over microbatches and the update stay as they are:

  f32 master --cast--> bf16 shards --gather--> loss --> bf16 gradients, reduced --> f32

If loss or gradient is not finite, the update is left out and counted.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmjax import sharding
from mmjax.train.optim import Optimizer, merge
from mmjax.train.state import TrainState

# (params, batch, rng, train) -> (sum of losses, sums: {'weight': count, ...})
LossFn = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def make_step(
  loss_fn: LossFn,
  optimizer: Optimizer,
  rng: jax.Array,
  *,
  accumulate: int = 1,
  grad_shardings: Any = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
  """The step (state, batch) -> (state, metrics); pure, to be jitted outside.

  Args:
    loss_fn: see `LossFn`; every value of the dict is a sum over trained tokens.
    rng: base key; step s uses fold_in(rng, s).
    accumulate: A, microbatches of a step; divides the rows.
    grad_shardings: shardings of the parameters; gradients are kept there.

  Returns:
    The step. Its metrics are f32[]: 'loss' and the task's own (each divided by the
    count), 'weight' (the count), 'grad_norm', 'learning_rate', 'skipped' (0 or 1)
    and 'skipped_in_a_row'.
  """
  gradient = make_gradient(
    loss_fn, optimizer, rng, accumulate=accumulate, grad_shardings=grad_shardings
  )

  def step(state, batch):
    trained, frozen = optimizer.split(state.params)
    grads, sums = gradient(state, batch)
    count = sums['weight']
    share = jnp.where(count > 0, 1 / jnp.maximum(count, 1e-30), 0.0)
    grads = jax.tree.map(lambda g: g * share.astype(g.dtype), grads)
    metrics = {k: v * share for k, v in sums.items() if k != 'weight'}
    norm = optax.tree.norm(grads)

    updates, opt_state = optimizer.tx.update(grads, state.opt_state, trained)
    updated = optax.apply_updates(trained, updates)
    ema = state.ema
    if ema is not None:
      ema = jax.tree.map(
        lambda old, new: optimizer.ema * old + (1 - optimizer.ema) * new, ema, updated
      )
    good = jnp.isfinite(metrics['loss']) & jnp.isfinite(norm)
    updated, opt_state, ema = jax.tree.map(
      lambda new, old: jnp.where(good, new, old),
      (updated, opt_state, ema),
      (trained, state.opt_state, state.ema),
    )
    bad = 1 - good.astype(jnp.int32)
    in_a_row = (state.skipped_in_a_row + 1) * bad
    metrics |= {
      'weight': count,
      'grad_norm': norm,
      'learning_rate': optimizer.schedule(state.step - state.skipped),
      'skipped': bad,
      'skipped_in_a_row': in_a_row,
    }
    new_state = TrainState(
      step=state.step + 1,
      params=merge(updated, frozen),
      opt_state=opt_state,
      ema=ema,
      skipped=state.skipped + bad,
      skipped_in_a_row=in_a_row,
    )
    return new_state, {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}

  return step


def make_gradient(
  loss_fn: LossFn,
  optimizer: Optimizer,
  rng: jax.Array,
  *,
  accumulate: int = 1,
  grad_shardings: Any = None,
) -> Callable[[TrainState, Any], tuple[Any, dict[str, jax.Array]]]:
  """(state, batch) -> gradient of the sum of losses, {'loss': that sum, ...: sums}.

  Args: as of `make_step`, whose first half this is.
  """
  placed = (None, None) if grad_shardings is None else optimizer.split(grad_shardings)

  def place(tree, where=placed[0]):
    return tree if where is None else jax.lax.with_sharding_constraint(tree, where)

  def gradient_of_step(state, batch):
    trained, frozen = optimizer.split(state.params)
    key = jax.random.fold_in(rng, state.step)
    # Once a step, and before anything is gathered.
    used = place(_cast(trained, optimizer.grad_dtype))
    fixed = place(_cast(frozen, optimizer.grad_dtype), placed[1])

    def loss(used, batch, key):
      total, sums = loss_fn(merge(used, fixed), batch, key, True)
      return total, {'loss': total, **sums}

    def gradient(batch, key):
      grads, sums = jax.grad(loss, has_aux=True)(used, batch, key)
      grads = jax.tree.map(lambda g, p: g.astype(p.dtype), place(grads), trained)
      return grads, sums

    if accumulate == 1:
      return gradient(batch, key)

    def one(carry, xs):
      micro, i = xs
      new = gradient(micro, jax.random.fold_in(key, i))
      grads, sums = jax.tree.map(jnp.add, carry, new)
      return (place(grads), sums), None

    micros = split_rows(batch, accumulate)
    first = jax.tree.map(lambda x: x[0], micros)
    shapes = jax.eval_shape(gradient, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums, _ = jax.lax.scan(one, zeros, (micros, jnp.arange(accumulate)))
    return sums

  return gradient_of_step


def _cast(tree, dtype):
  """Arrays of real numbers in dtype; scalars, such as a temperature, as they are."""

  def one(x):
    real = jnp.issubdtype(x.dtype, jnp.floating) and x.ndim
    return x.astype(dtype) if real and dtype is not None else x

  return jax.tree.map(one, tree)


def split_rows(batch: Any, parts: int) -> Any:
  """[B, ...] -> [A, B / A, ...]; see the picture above.

  Raises:
    ValueError: A doesn't divide the rows.
  """

  def one(x, names):
    if x.shape[0] % parts:
      raise ValueError(f'train.accumulate = {parts} does not divide {x.shape[0]} rows')
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    return sharding.constrain(x, None, *names)

  return jax.tree.map(one, batch, sharding.batch_names(batch))


def lower_step(step, abstract: TrainState, batch: Any):
  """The step as a program to compile, for the devices of the shardings.

  Args:
    abstract: `state.plan`'s state of shapes with shardings; it is donated.
    batch: the same of a batch.
  """
  placed = jax.tree.map(lambda x: x.sharding, abstract)
  jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
  return jitted.lower(abstract, batch)


def compile_step(step, abstract: TrainState, batch: Any):
  """Compiles the step ahead of time: one compile per run, by construction.

  Another shape, dtype or sharding afterwards is an error, never a silent compile.
  Arguments as of `lower_step`.
  """
  return lower_step(step, abstract, batch).compile()
