"""Tasks: what a model is trained for. One pure function each, picked by name.

  loss_fn(params, batch, rng, train) -> (sum of losses, {'weight': count, ...})

Everything returned is a sum over the trained tokens of the batch it was given; the
step divides by the count of the whole global batch. A new objective is a new
function here and a config, not another trainer.
"""

from collections.abc import Callable
from typing import Any

import jax

from mmjax.batch import PackedBatch
from mmjax.ops.losses import next_token_loss


def next_token(model: Any, *, num_targets: int, z_loss: float = 0.0) -> Callable:
  """Cross-entropy of the next token, where it is trained.

  Args:
    model: `apply(variables, batch, train=)` gives hidden f[B, T, D], and its method
      'logits' turns those into logits.
    num_targets: places for trained tokens in a row, `Budget.targets`.
    z_loss: see `ops.losses.next_token_loss`.
  """

  def loss_fn(
    params: Any, batch: PackedBatch, rng: jax.Array, train: bool
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    variables = {'params': params}
    hidden = model.apply(variables, batch, train=train, rngs={'dropout': rng})

    def unembed(hidden):
      return model.apply(variables, hidden, method='logits')

    loss, weight, sums = next_token_loss(
      hidden, unembed, batch.stream, num_targets, z_loss=z_loss
    )
    return loss, {
      'weight': weight,
      'accuracy': sums['correct'],
      'cross_entropy': sums['ce'],
      'targets_lost': sums['lost'],
    }

  return loss_fn


TASKS = {'next_token': next_token}
