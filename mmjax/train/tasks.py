"""Tasks: what a model is trained for. One pure function each, picked by name.

  loss_fn(params, batch, rng, train) -> (sum of losses, {'weight': count, ...})

Everything returned is a sum over the trained tokens of the batch it was given; the
step divides by the count of the whole global batch. A new objective is a new
function here and a config, not another trainer.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.batch import Budget, PackedBatch
from mmjax.ops.contrastive import contrastive_loss
from mmjax.ops.losses import next_token_loss
from mmjax.sharding import constrain
from mmjax.train.step import split_rows


def next_token(model: Any, *, num_targets: int, z_loss: float = 0.0) -> Callable:
  """Cross-entropy of the next token, where it is trained.

  Args:
    model: `apply(variables, batch, train=)` gives hidden f[B, T, D], and its method
      'head' tells what turns those into logits.
    num_targets: places for trained tokens in a row, `Budget.targets`.
    z_loss: see `ops.losses.next_token_loss`.
  """

  def loss_fn(
    params: Any, batch: PackedBatch, rng: jax.Array, train: bool
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    variables = {'params': params}
    hidden = model.apply(variables, batch, train=train, rngs={'dropout': rng})
    head = model.apply(variables, method='head')
    loss, weight, sums = next_token_loss(
      hidden, head, batch.stream, num_targets, z_loss=z_loss
    )
    return loss, {
      'weight': weight,
      'accuracy': sums['correct'],
      'cross_entropy': sums['ce'],
      'targets_lost': sums['lost'],
    }

  return loss_fn


def contrastive(
  model: Any, *, loss: str = 'infonce', chunk: int = 1024, accumulate: int = 1
) -> Callable:
  """Pairs of media and text against all others of the global batch.

  Microbatches don't end at their own pairs: all are embedded, one after the other and
  made anew in the backward pass, and one loss is taken over all (GradCache,
  2101.06983). So neither value nor gradient depends on `accumulate`.

  Args:
    model: `apply(variables, batch, train=)` gives `models.dual.Pairs`, and its method
      'temperature' the scale and bias of the logits.
    loss, chunk: see `ops.contrastive.contrastive_loss`.
    accumulate: A, microbatches of a step; divides the rows.
  """

  def loss_fn(
    params: Any, batch: PackedBatch, rng: jax.Array, train: bool
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    variables = {'params': params}

    def embed(micro, i):
      rngs = {'dropout': rng if accumulate == 1 else jax.random.fold_in(rng, i)}
      return model.apply(variables, micro, train=train, rngs=rngs)

    if accumulate == 1:
      pairs = embed(batch, 0)
    else:
      again = jax.checkpoint(embed, prevent_cse=False)
      xs = split_rows(batch, accumulate), jnp.arange(accumulate)
      _, pairs = jax.lax.scan(lambda _, xs: (None, again(*xs)), None, xs)
      # [A, B / A, I, ...] -> [B, I, ...], every device keeps its own
      pairs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), pairs)
      pairs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pairs)
    image, text, weights = jax.tree.map(
      lambda x: constrain(
        x.reshape(-1, *x.shape[2:]), 'batch', *[None] * (x.ndim - 2)
      ), pairs,
    )  # fmt: skip
    scale, bias = model.apply(variables, method='temperature')
    total, weight, sums = contrastive_loss(
      image, text, weights, scale, bias, loss=loss, chunk=chunk
    )
    return total, {
      'weight': weight,
      'accuracy_text': sums['x_to_y'],  # of finding the text of an image
      'accuracy_image': sums['y_to_x'],
      'scale': scale * weight,
    }

  return loss_fn


TASKS = {'next_token': next_token, 'contrastive': contrastive}


def build(config: Any, model: Any, budget: Budget) -> tuple[Callable, int]:
  """The loss function of `config.train`, and the microbatches that the step makes.

  Raises:
    ValueError: an unknown task, or an option it doesn't have.
  """
  train = config.train
  if train.task not in TASKS:
    raise ValueError(f'unknown task {train.task!r}: {", ".join(TASKS)}')
  if train.task == 'contrastive':  # which makes its microbatches itself
    return contrastive(model, accumulate=train.accumulate, **train.contrastive), 1
  options = dict(num_targets=budget.targets, z_loss=train.z_loss)
  return next_token(model, **options), train.accumulate
