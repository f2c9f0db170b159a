"""Next-token loss, computed only where a token is trained.

Token t is predicted from the hidden state of the slot before it in its document:

  stream    q  q  q  A  e | q  q  A  e  .  .     A, e: trained (weights > 0)
  targets            ^  ^         ^  ^           slots 3 4 7 8
  hidden          ^  ^         ^  ^              slots 2 3 6 7

Before the first slot of a branch (see `mmjax.batch`) stands the last one of the trunk.

A row has a fixed number of places for targets, so head and softmax see
[B, num_targets] instead of [B, T] slots, and those in chunks that are made anew
in the backward pass: [B, T, V] never exists. Sums, not means, are returned, so
that the step can divide by the weight of the whole global batch.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmjax.batch import FOREVER, Stream
from mmjax.ops.across import take
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
  unembed: Callable[[jax.Array], jax.Array],
  stream: Stream,
  num_targets: int,
  *,
  z_loss: float = 0.0,
  chunk: int = 256,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
  """Sum over the trained tokens of weight * cross-entropy.

  Args:
    hidden: f[B, T, D] after the final norm.
    unembed: from f[B, x, D] to logits f32[B, x, V].
    stream: tokens, segments and weights of the batch.
    num_targets: places per row, `Budget.targets`.
    z_loss: adds z_loss * log(sum(exp(logits)))^2 (PaLM, 2204.02311, section 5).
    chunk: at most so many targets of a row have logits on a device at one time. Each
      chunk of a sharded batch sums the head's gradient over devices: no smaller than
      need be.

  Returns:
    (loss, weight, sums): f32 scalars; the loss is the one to differentiate, with
    z-loss. sums holds 'ce' and 'z_loss' (the loss's two parts), 'correct' (sum
    of weights of targets with the largest logit), 'targets' (their number) and
    'lost' (targets beyond num_targets: must be 0, or the loss is not whole).

  Raises:
    ValueError: shapes that don't fit; num_targets or chunk < 1, or no slot to predict.
  """
  stream = _whole_rows(stream)
  gathered = _gather(hidden, stream, num_targets, chunk, 'next_token_loss')
  num_targets = min(num_targets, gathered.slots.shape[1])
  hidden, tokens, weights = gathered.hidden, gathered.tokens, gathered.weights

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def part(xs):
    hidden, tokens, weights = xs
    return _sums(unembed(hidden), tokens, weights)

  xs = (hidden, tokens, weights)
  if num_targets <= chunk:
    ce, square, correct = part(xs)
  else:
    zero = jnp.zeros((), jnp.float32)
    (ce, square, correct), _ = jax.lax.scan(
      lambda sums, xs: (jax.tree.map(jnp.add, sums, part(xs)), None),
      (zero, zero, zero),
      jax.tree.map(lambda x: _split(x, chunk), xs),
    )
  num = jnp.sum(trained_slots(stream), 1)
  z = z_loss * square
  sums = {
    'ce': ce,
    'z_loss': z,
    'correct': correct,
    'targets': jnp.sum(num).astype(jnp.float32),
    'lost': jnp.sum(jnp.maximum(num - num_targets, 0)).astype(jnp.float32),
  }
  return ce + z, jnp.sum(weights), sums


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
  hidden: jax.Array,
  unembed: Callable[[jax.Array], jax.Array],
  stream: Stream,
  num_targets: int,
  *,
  chunk: int = 256,
) -> TokenLosses:
  """Cross-entropy of every trained token by itself; arguments of `next_token_loss`.

  Raises:
    ValueError: see `next_token_loss`.
  """
  stream = _whole_rows(stream)
  found = _gather(hidden, stream, num_targets, chunk, 'token_losses')
  B, K = found.slots.shape

  def part(xs):
    log_z, right, _ = _log_probs(unembed(xs[0]), xs[1])
    return log_z - right

  xs = (found.hidden, found.tokens)
  if chunk >= K:
    losses = part(xs)
  else:
    losses = jax.lax.map(part, jax.tree.map(lambda x: _split(x, chunk), xs))
    losses = jnp.moveaxis(losses, 0, 2).reshape(B, -1)[:, :K]
  losses = jnp.where(found.used, losses, 0.0)
  return TokenLosses(found.slots, found.used, found.tokens, losses)


class _Gathered(NamedTuple):
  """The targets of a batch at their places, K per row; hidden: of the slots before."""

  slots: jax.Array
  used: jax.Array
  tokens: jax.Array
  weights: jax.Array
  hidden: jax.Array


def _gather(hidden, stream, num_targets, chunk, who) -> _Gathered:
  T = check('B T D', hidden, 'B T', stream.tokens)['T']
  if num_targets < 1 or chunk < 1 or T < 2:
    raise ValueError(
      f'{who}: needs num_targets >= 1, chunk >= 1 and two slots;'
      f' got {num_targets}, {chunk} and {T}'
    )
  # Where the stream is split, so are the targets: as many places as divide.
  places = _round_up(min(num_targets, T), parts('seq'))
  slots, used = select_targets(stream, places)
  used &= jnp.arange(places)[None] < num_targets
  tokens = jnp.take_along_axis(stream.tokens, slots, 1)
  weights = jnp.where(used, jnp.take_along_axis(stream.weights, slots, 1), 0.0)
  previous = jnp.take_along_axis(previous_slots(stream), slots, 1)
  hidden = take(hidden, jnp.maximum(previous, 0))
  return _Gathered(slots, used, tokens, weights, hidden)


def _whole_rows(stream):
  """The tags of whole rows, on every device: few bytes beside hidden, and targets are
  found by what stands before them."""
  return jax.tree.map(lambda x: constrain(x, 'batch', *[None] * (x.ndim - 1)), stream)


def _round_up(n, multiple):
  return math.ceil(n / multiple) * multiple


def _split(x, chunk):
  """[B, K, ...] -> [count, B, size, ...] with size about <= chunk; padded with 0.

  Part i takes i, i + count, ...: so every device's places are spread over all parts.
  """
  K = x.shape[1]
  count = math.ceil(K / chunk)
  size = _round_up(math.ceil(K / count), parts('seq'))
  width = [(0, 0), (0, count * size - K)] + [(0, 0)] * (x.ndim - 2)
  return jnp.moveaxis(jnp.pad(x, width).reshape(len(x), size, count, *x.shape[2:]), 2, 0)


def _log_probs(logits, tokens):
  """(log-normaliser, logit of the token, the logits), all f32."""
  logits = logits.astype(jnp.float32)
  log_z = jax.nn.logsumexp(logits, -1)
  # A trained slot is always text; the maximum only guards unused places.
  right = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[..., None], -1)[..., 0]
  return log_z, right, logits


def _sums(logits, tokens, weights):
  """Sums of weight * (cross-entropy, log-normaliser squared, correctness)."""
  log_z, right, logits = _log_probs(logits, tokens)
  # The first of the largest, in two plain reductions: argmax is one slow loop on CPU.
  V = logits.shape[-1]
  ids = jnp.arange(V, dtype=tokens.dtype).reshape((1,) * (logits.ndim - 1) + (V,))
  best = jnp.where(logits == jnp.max(logits, -1, keepdims=True), ids, V)
  correct = jnp.min(best, -1) == tokens
  return (
    jnp.sum(weights * (log_z - right)),
    jnp.sum(weights * log_z**2),
    jnp.sum(jnp.where(correct, weights, 0.0)),
  )
