"""Next-token loss, computed only where a token is trained.

Token t is predicted from the hidden state of the slot before it in its document:

  stream    q  q  q  A  e | q  q  A  e  .  .     A, e: trained (weights > 0)
  targets            ^  ^         ^  ^           slots 3 4 7 8
  hidden          ^  ^         ^  ^              slots 2 3 6 7

Before the first slot of a branch (see `mmjax.batch`) stands the last one of the trunk.

A row has a fixed number of places for targets, so head and softmax see
[B, num_targets] instead of [B, T] slots, and of their logits a few words at a time
(`ops.vocabulary`): [B, T, V] never exists, and of places that no target fills most are
not computed. Sums, not means, are returned, so that the step can divide by the weight of
the whole global batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmjax.batch import FOREVER, Stream
from mmjax.ops.across import take
from mmjax.ops.vocabulary import LIMIT, Head, log_probs
from mmjax.shape import check
from mmjax.sharding import constrain, parts


def previous_slots(stream: Stream) -> jax.Array:
  """i32[B, T], the slot before each in its document, -1 where there is none.

  That is t - 1, or, if t can't see what ends there, the trunk's last slot so far.
  """
  T = stream.tokens.shape[1]
  slot = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), stream.tokens.shape)
  trunk = jax.lax.cummax(jnp.where(stream.until == FOREVER, slot, -1), axis=1)

  def before(x, fill):
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)), constant_values=fill)

  before_ends = before(stream.until, FOREVER) < stream.order
  previous = jnp.where(before_ends, before(trunk, -1), slot - 1)
  segments = jnp.take_along_axis(stream.segment_ids, jnp.maximum(previous, 0), 1)
  return jnp.where(segments == stream.segment_ids, previous, -1)


def trained_slots(stream: Stream) -> jax.Array:
  """bool[B, T], True where the token is a target: text of weight > 0 that has a slot
  before it in its document."""
  real = (stream.segment_ids > 0) & (stream.tokens >= 0)
  return (stream.weights > 0) & real & (previous_slots(stream) >= 0)


def select_targets(stream: Stream, num_targets: int) -> tuple[jax.Array, jax.Array]:
  """The slots of each row's first `num_targets` targets, in stream order.

  Returns:
    slots i32[B, num_targets], and bool[B, num_targets]: False where the row has
    fewer targets (the slot is then 0, a harmless place to read).
  """
  targets = trained_slots(stream)
  T = targets.shape[1]
  rank = jnp.cumsum(targets, 1, dtype=jnp.int32) - 1
  # Targets beyond the last place, and slots that are none, are written outside.
  place = jnp.where(targets, rank, num_targets)
  none = jnp.zeros(num_targets, jnp.int32)
  values = jnp.arange(T, dtype=jnp.int32)
  # By vmap the compiler knows that rows stay by themselves, where they are split.
  slots = jax.vmap(lambda at: none.at[at].set(values, mode='drop'))(place)
  used = jnp.arange(num_targets)[None] < jnp.sum(targets, 1, keepdims=True)
  return slots, used


def next_token_loss(
  hidden: jax.Array,
  head: Head,
  stream: Stream,
  num_targets: int,
  *,
  z_loss: float = 0.0,
  limit: int = LIMIT,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
  """Sum over the trained tokens of weight * cross-entropy.

  Args:
    hidden: f[B, T, D] after the final norm.
    head: from there to logits, see `ops.vocabulary`.
    stream: tokens, segments and weights of the batch.
    num_targets: places per row, `Budget.targets`.
    z_loss: adds z_loss * log(sum(exp(logits)))^2 (PaLM, 2204.02311, section 5).
    limit: bytes of logits at one time, see `ops.vocabulary.log_probs`.

  Returns:
    (loss, weight, sums): f32 scalars; the loss is the one to differentiate, with
    z-loss. sums holds 'ce' and 'z_loss' (the loss's two parts), 'correct' (sum
    of weights of targets with the largest logit), 'targets' (their number) and
    'lost' (targets beyond num_targets: must be 0, or the loss is not whole).

  Raises:
    ValueError: shapes that don't fit; num_targets or limit < 1, or no slot to predict.
  """
  stream = _whole_rows(stream)
  found = _gather(hidden, stream, num_targets, 'next_token_loss')
  num_targets = min(num_targets, found.slots.shape[1])
  log_z, right, best = log_probs(
    found.hidden, head, found.tokens, found.used, limit=limit
  )
  ce = jnp.sum(found.weights * (log_z - right))
  z = z_loss * jnp.sum(found.weights * log_z**2)
  num = jnp.sum(trained_slots(stream), 1)
  sums = {
    'ce': ce,
    'z_loss': z,
    'correct': jnp.sum(jnp.where(best == found.tokens, found.weights, 0.0)),
    'targets': jnp.sum(num).astype(jnp.float32),
    'lost': jnp.sum(jnp.maximum(num - num_targets, 0)).astype(jnp.float32),
  }
  return ce + z, jnp.sum(found.weights), sums


class TokenLosses(NamedTuple):
  """The loss of each target, before weights; see `token_losses`.

  slots: i32[B, K] where the target stands; used: bool[B, K], False = no target.
  tokens: i32[B, K]; losses: f32[B, K], 0 where there is no target.
  """

  slots: jax.Array
  used: jax.Array
  tokens: jax.Array
  losses: jax.Array


def token_losses(
  hidden: jax.Array, head: Head, stream: Stream, num_targets: int, *, limit: int = LIMIT
) -> TokenLosses:
  """Cross-entropy of every trained token by itself; arguments of `next_token_loss`.

  Raises:
    ValueError: see `next_token_loss`.
  """
  stream = _whole_rows(stream)
  found = _gather(hidden, stream, num_targets, 'token_losses')
  log_z, right, _ = log_probs(found.hidden, head, found.tokens, found.used, limit=limit)
  return TokenLosses(found.slots, found.used, found.tokens, log_z - right)


class _Gathered(NamedTuple):
  """The targets of a batch at their places, K per row; hidden: of the slots before."""

  slots: jax.Array
  used: jax.Array
  tokens: jax.Array
  weights: jax.Array
  hidden: jax.Array


def _gather(hidden, stream, num_targets, who) -> _Gathered:
  T = check('B T D', hidden, 'B T', stream.tokens)['T']
  if num_targets < 1 or T < 2:
    raise ValueError(
      f'{who}: needs num_targets >= 1 and two slots; got {num_targets} and {T}'
    )
  # Where the stream is split, so are the targets: as many places as divide.
  split = parts('seq')
  places = -(-min(num_targets, T) // split) * split
  slots, used = select_targets(stream, places)
  used &= jnp.arange(places)[None] < num_targets
  # A trained slot is always text; the maximum only guards unused places.
  tokens = jnp.maximum(jnp.take_along_axis(stream.tokens, slots, 1), 0)
  weights = jnp.where(used, jnp.take_along_axis(stream.weights, slots, 1), 0.0)
  previous = jnp.take_along_axis(previous_slots(stream), slots, 1)
  hidden = take(hidden, jnp.maximum(previous, 0))
  return _Gathered(slots, used, tokens, weights, hidden)


def _whole_rows(stream):
  """The tags of whole rows, on every device: few bytes beside hidden, and targets are
  found by what stands before them."""
  return jax.tree.map(lambda x: constrain(x, 'batch', *[None] * (x.ndim - 1)), stream)
