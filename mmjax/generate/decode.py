"""Writing the continuation of documents: one prefill, then a token at a time.

Each row holds one document, padded on the right. All rows write their i-th new
token at the same cache slot T + i; what a row's padding left in between has
segment 0 and is seen by nobody:

  slots    0 1 2 3 4 | 5 6 7             T = 5, max_new = 3
  row 0    i i a b c | x y z
  row 1    i i a . . | x e e             stopped: end_id from there on

Order, position and segment go on from the last slot of each row's trunk (see
`mmjax.batch`). Everything is
one compiled program per shape: prefill by the same modules as in training, and
a loop that stops when every row has ended.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.batch import FOREVER, PackedBatch, Stream
from mmjax.generate.sampling import Greedy, Sampler
from mmjax.sharding import constrain

GREEDY = Greedy()


def make_generate(
  model: Any, max_new: int, end_id: int, sampler: Sampler = GREEDY
) -> Callable[..., jax.Array]:
  """A compiled `generate(params, batch, rng=None)`; keep it to compile once.

  Args:
    model: has `empty_cache`, `unscanned`, and methods `extend` and `logits`.
    max_new: tokens to write at most.
    end_id: the token that ends a document.
    sampler: Greedy() or Sample(...).

  Returns:
    A function of the parameters, a batch with one document per row (ragged,
    padded on the right) and a key, needed only to sample, giving
    i32[B, max_new]: end_id from the end on. Rows without a document are all end_id.

  Raises:
    ValueError: max_new < 1; in the call: no key for a sampler other than Greedy.
  """
  if max_new < 1:
    raise ValueError(f'generate: max_new must be at least 1, got {max_new}')

  @jax.jit
  def generate(params, batch: PackedBatch, rng=None):
    if rng is None:
      if not isinstance(sampler, Greedy):
        raise ValueError(
          f'generate: a sampler that draws needs rng, got none for {sampler}'
        )
      rng = jax.random.key(0)
    # Layers one by one: a scan would copy each layer's kernels at every token.
    plain, flat = model.unscanned(params)
    apply = functools.partial(plain.apply, {'params': flat})
    B, T = batch.stream.tokens.shape

    def choose(i, hidden, done):  # hidden f[B, D] -> tokens i32[B], done bool[B]
      logits = constrain(apply(hidden, method='logits'), 'batch', 'act_vocab')
      tokens = sampler(logits, jax.random.fold_in(rng, i))
      tokens = jnp.where(done, end_id, tokens)
      return tokens, done | (tokens == end_id)

    hidden, cache = apply(
      batch, plain.empty_cache(B, T + max_new - 1), 0, method='extend'
    )
    following = _following(batch.stream)
    last = jnp.take_along_axis(hidden, _last_slot(batch.stream)[:, None, None], 1)[:, 0]
    tokens, done = choose(0, last, ~jnp.any(batch.stream.segment_ids > 0, 1))
    out = jnp.full((B, max_new), end_id, jnp.int32).at[:, 0].set(tokens)

    def going_on(state):
      i, _, done, _, _ = state
      return (i < max_new) & ~jnp.all(done)

    def body(state):
      i, tokens, done, cache, out = state
      step = PackedBatch(following(tokens, i - 1), {})
      hidden, cache = apply(step, cache, T + i - 1, method='extend')
      tokens, done = choose(i, hidden[:, 0], done)
      out = jax.lax.dynamic_update_slice_in_dim(out, tokens[:, None], i, 1)
      return i + 1, tokens, done, cache, out

    state = (jnp.int32(1), tokens, done, cache, out)
    return jax.lax.while_loop(going_on, body, state)[-1]

  return generate


def generate(
  model: Any,
  params: Any,
  batch: PackedBatch,
  *,
  max_new: int,
  end_id: int,
  sampler: Sampler = GREEDY,
  rng: jax.Array | None = None,
) -> jax.Array:
  """Continues each row's document, i32[B, max_new]; see `make_generate`.

  Calls with an equal model, max_new, end_id and sampler share one compilation.
  """
  return _cached(model, max_new, end_id, sampler)(params, batch, rng)


_cached = functools.lru_cache(maxsize=32)(make_generate)


def _trunk(stream: Stream) -> jax.Array:
  """bool[B, T], the slots that are no padding and that what follows may see."""
  return (stream.segment_ids > 0) & (stream.until == FOREVER)


def _last_slot(stream: Stream) -> jax.Array:
  """i32[B], the last slot of each row's trunk; 0 in an empty row."""
  T = stream.segment_ids.shape[1]
  slot = jnp.arange(T, dtype=jnp.int32)[None]
  return jnp.max(jnp.where(_trunk(stream), slot, 0), 1)


def _following(stream: Stream) -> Callable[[jax.Array, jax.Array], Stream]:
  """The stream of one more text token per row, as a function of (tokens i32[B], i)."""
  real = stream.segment_ids > 0
  slot = _last_slot(stream)[:, None]
  segment = jnp.take_along_axis(stream.segment_ids, slot, 1)
  first = jnp.take_along_axis(stream.first, slot, 1)
  order = jnp.max(jnp.where(real, stream.order, -1), 1, keepdims=True) + 1
  # An image's largest position is its start + max(grid) - 1, so this is right after it.
  far = jnp.max(stream.positions, -1)
  position = jnp.max(jnp.where(_trunk(stream), far, -1), 1, keepdims=True) + 1

  def token(tokens, i):
    B = tokens.shape[0]
    return Stream(
      tokens=tokens[:, None],
      segment_ids=segment,
      order=order + i,
      first=first,
      last=order + i,
      until=jnp.full((B, 1), FOREVER, jnp.int32),
      positions=jnp.broadcast_to((position + i)[..., None], (B, 1, 3)),
      weights=jnp.zeros((B, 1), jnp.float32),
      source=jnp.full((B, 1), -1, jnp.int32),
    )

  return token
