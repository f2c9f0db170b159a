"""Writing the continuation of documents: one prefill, then a token at a time.

Each row holds one document, padded on the right. All rows write their i-th new
token at the same cache slot T + i; what a row's padding left in between has
segment 0 and is seen by nobody. What all rows begin with (`prefix`: examples before
a question) is read once, for one row, and stands before them in the cache:

  slots    p p p p | 0 1 2 3 4 | 5 6 7      T = 5, max_new = 3
  row 0    i i q r | i i a b c | x y z
  row 1    i i q r | i i a . . | x e e      stopped: end_id from there on

Order, position and segment go on from the last slot of what stands before (see
`mmjax.batch`). There are two programs: the prefill, by the same modules as in
training, and a loop that stops when every row has ended, in place on the cache that
it is given. What a token needs of the parameters alone is made before the loop
(`once`). Batches of NumPy arrays are padded to `bucket`s first, so that prompts of
any length need few programs; with a cache of fixed size there is one loop.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.batch import FOREVER, PackedBatch, Stream
from mmjax.generate.once import once
from mmjax.generate.sampling import Greedy, Sampler
from mmjax.ops.linear import reused
from mmjax.sharding import constrain

GREEDY = Greedy()
_LEAST = 16  # slots of the smallest bucket of a stream


class Place(NamedTuple):
  """Where documents go on: what the next slot would have, i32[B, 1] each."""

  segment: jax.Array
  first: jax.Array
  order: jax.Array
  position: jax.Array

  def token(self, tokens: jax.Array, i: jax.Array) -> Stream:
    """The stream of the i-th text token from here, tokens i32[B]."""
    B = len(tokens)
    order = self.order + i
    return Stream(
      tokens=tokens[:, None],
      segment_ids=self.segment,
      order=order,
      first=self.first,
      last=order,
      until=jnp.full((B, 1), FOREVER, jnp.int32),
      positions=jnp.broadcast_to((self.position + i)[..., None], (B, 1, 3)),
      weights=jnp.zeros((B, 1), jnp.float32),
      source=jnp.full((B, 1), -1, jnp.int32),
    )


class Prefix(NamedTuple):
  """What stands before all rows, read for one: its cache, its end, its slots i32."""

  cache: Any
  place: Place
  slots: jax.Array


class State(NamedTuple):
  """Between two tokens: the last ones i32[B], who has ended bool[B], the cache, where
  the documents went on after slot - 1, and what was written i32[B, max_new]."""

  tokens: jax.Array
  done: jax.Array
  cache: Any
  place: Place
  slot: jax.Array
  out: jax.Array


class Generator:
  """`generate(params, batch, rng=None, prefix=None)`, compiled; see `make_generate`."""

  def __init__(self, model, max_new, end_id, sampler, slots):
    self.model, self.max_new, self.end_id = model, max_new, end_id
    self.sampler, self.slots = sampler, slots
    self.read_program = jax.jit(self._read, static_argnames='slots')
    self.prefill_program = jax.jit(self._prefill, static_argnames='slots')
    self.loop_program = jax.jit(self._loop, donate_argnames='state')

  def __call__(
    self,
    params: Any,
    batch: PackedBatch,
    rng: jax.Array | None = None,
    prefix: PackedBatch | Prefix | None = None,
  ) -> jax.Array:
    if rng is None:
      if not isinstance(self.sampler, Greedy):
        raise ValueError(
          f'generate: a sampler that draws needs rng, got none for {self.sampler}'
        )
      rng = jax.random.key(0)
    batch = bucketed(batch)
    needed = batch.stream.tokens.shape[1] + self.max_new - 1
    if isinstance(prefix, PackedBatch):
      prefix = bucketed(prefix)
      needed += prefix.stream.tokens.shape[1]
      slots = self._slots(needed)
      prefix = self.read_program(params, prefix, slots=slots)
    elif prefix is not None:
      slots = self._slots(needed + int(prefix.slots))
    else:
      slots = self._slots(needed)
    state = self.prefill_program(params, batch, rng, prefix, slots=slots)
    if self.max_new == 1:
      return state.out
    return self.loop_program(params, state, rng)[0]

  def read(self, params: Any, prefix: PackedBatch) -> Prefix:
    """Reads a prefix of one row, for many batches; needs `slots`.

    Raises:
      ValueError: without `slots`, of several rows, or too long.
    """
    if self.slots is None:
      raise ValueError('generate: a prefix for many batches needs slots, got none')
    prefix = bucketed(prefix)
    slots = self._slots(prefix.stream.tokens.shape[1])
    return self.read_program(params, prefix, slots=slots)

  def _slots(self, needed):
    if self.slots is not None and needed > self.slots:
      raise ValueError(
        f'generate: prompts, padded, and new tokens need {needed} slots of the cache,'
        f' it has {self.slots}'
      )
    return self.slots or needed

  def _apply(self, params):
    # Layers one by one: a scan would copy each layer's kernels at every token.
    plain, flat = self.model.unscanned(params)
    return plain, functools.partial(plain.apply, {'params': flat})

  def _choose(self, apply, i, hidden, done, rng):
    """hidden f[B, D] -> tokens i32[B], done bool[B]."""
    logits = constrain(apply(hidden, method='logits'), 'batch', 'act_vocab')
    tokens = self.sampler(logits, jax.random.fold_in(rng, i))
    tokens = jnp.where(done, self.end_id, tokens)
    return tokens, done | (tokens == self.end_id)

  def _read(self, params, prefix, slots):
    rows, T = prefix.stream.tokens.shape
    if rows != 1:
      raise ValueError(f'generate: a prefix has one row, got {rows}')
    plain, apply = self._apply(params)
    _, cache = apply(prefix, plain.empty_cache(1, slots), 0, method='extend')
    return Prefix(cache, _place(prefix.stream), jnp.int32(T))

  def _prefill(self, params, batch, rng, prefix, slots):
    plain, apply = self._apply(params)
    B, T = batch.stream.tokens.shape
    if prefix is None:
      cache, start = plain.empty_cache(B, slots), 0
    else:
      cache, start = _broadcast(prefix.cache, B), prefix.slots
      batch = _behind(batch, prefix.place)
    hidden, cache = apply(batch, cache, start, method='extend')
    last = jnp.take_along_axis(hidden, _last_slot(batch.stream)[:, None, None], 1)[:, 0]
    done = ~jnp.any(batch.stream.segment_ids > 0, 1)
    tokens, done = self._choose(apply, 0, last, done, rng)
    out = jnp.full((B, self.max_new), self.end_id, jnp.int32).at[:, 0].set(tokens)
    slot = jnp.asarray(start + T, jnp.int32)
    return State(tokens, done, cache, _place(batch.stream), slot, out)

  def _loop(self, params, state, rng):
    def token(params, i, state, rng):
      _, apply = self._apply(params)
      step = PackedBatch(state.place.token(state.tokens, i - 1), {})
      slot = state.slot + i - 1
      hidden, cache = apply(step, state.cache, slot, method='extend')
      tokens, done = self._choose(apply, i, hidden[:, 0], state.done, rng)
      out = jax.lax.dynamic_update_slice_in_dim(state.out, tokens[:, None], i, 1)
      return state._replace(tokens=tokens, done=done, cache=cache, out=out)

    def going_on(loop):
      i, state = loop
      return (i < self.max_new) & ~jnp.all(state.done)

    def body(loop):
      i, carried = loop
      return i + 1, _squeezed(step(i, _shaped(carried, state), rng))

    first = jnp.int32(1)
    with reused():
      step = once(token, params, first, state, rng)
    _, carried = jax.lax.while_loop(going_on, body, (first, _squeezed(state)))
    made = _shaped(carried, state)
    # All of it comes back, since only what does can stand where the given one stood.
    return made.out, made


def make_generate(
  model: Any,
  max_new: int,
  end_id: int,
  sampler: Sampler = GREEDY,
  slots: int | None = None,
) -> Generator:
  """A compiled `generate(params, batch, rng=None, prefix=None)`; keep it.

  Args:
    model: has `empty_cache`, `unscanned`, and methods `extend` and `logits`. One whose
      layers are one by one already (`unscanned`) spares their copies at every call.
    max_new: tokens to write at most.
    end_id: the token that ends a document.
    sampler: Greedy() or Sample(...).
    slots: of the cache: for the prefix, the prompt (both as padded, see `bucket`), and
      max_new - 1. None = as many as needed, and a loop is compiled for each number.

  Returns:
    A function of the parameters, a batch with one document per row (ragged, padded on
    the right), a key, needed only to sample, and what stands before every row's
    document as its beginning: a batch of one row, or what `read(params, batch)` of the
    function gave. It gives i32[B, max_new]: end_id from the end on. Rows without a
    document are all end_id. Orders and positions of rows begin at 0 in any case.

  Raises:
    ValueError: max_new < 1; in the call: no key for a sampler other than Greedy, more
      slots needed than there are, or a prefix of several rows.
  """
  if max_new < 1:
    raise ValueError(f'generate: max_new must be at least 1, got {max_new}')
  return Generator(model, max_new, end_id, sampler, slots)


def generate(
  model: Any,
  params: Any,
  batch: PackedBatch,
  *,
  max_new: int,
  end_id: int,
  sampler: Sampler = GREEDY,
  rng: jax.Array | None = None,
  prefix: PackedBatch | None = None,
) -> jax.Array:
  """Continues each row's document, i32[B, max_new]; see `make_generate`.

  Calls with an equal model, max_new, end_id and sampler share compilations.
  """
  return _cached(model, max_new, end_id, sampler)(params, batch, rng, prefix)


_cached = functools.lru_cache(maxsize=32)(make_generate)


def bucket(n: int, least: int = 1) -> int:
  """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: at most 1/3 is padding."""
  power = 1 << max(n - 1, 0).bit_length()
  return max(least, power * 3 // 4 if power >= 4 and power * 3 // 4 >= n else power)


def bucketed(batch: PackedBatch) -> PackedBatch:
  """A batch of NumPy arrays, padded to buckets; what is on devices stays as it is."""
  if not isinstance(batch.stream.tokens, np.ndarray):
    return batch

  def pad(x, size, fill=0):
    width = [(0, 0), (0, size - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    return np.pad(x, width, constant_values=fill)

  fill = {'last': -1, 'until': FOREVER, 'source': -1}
  T = bucket(batch.stream.tokens.shape[1], _LEAST)
  stream = {k: pad(x, T, fill.get(k, 0)) for k, x in vars(batch.stream).items()}
  bank = {
    kind: dataclasses.replace(
      b, **{k: pad(x, bucket(x.shape[1])) for k, x in vars(b).items()}
    )
    for kind, b in batch.bank.items()
  }
  return PackedBatch(Stream(**stream), bank)


def _squeezed(state: State) -> State:
  """Without axes of one: a loop that carries them, e.g. of a single row, copies the cache
  at every token, since XLA's products leave them out and its loops don't."""
  return jax.tree.map(jnp.squeeze, state)


def _shaped(carried: State, state: State) -> State:
  """`_squeezed` undone."""
  return jax.tree.map(lambda x, like: x.reshape(like.shape), carried, state)


def _broadcast(cache: Any, rows: int) -> Any:
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), cache)


def _trunk(stream: Stream) -> jax.Array:
  """bool[B, T], the slots that are no padding and that what follows may see."""
  return (stream.segment_ids > 0) & (stream.until == FOREVER)


def _last_slot(stream: Stream) -> jax.Array:
  """i32[B], the last slot of each row's trunk; 0 in an empty row."""
  T = stream.segment_ids.shape[1]
  slot = jnp.arange(T, dtype=jnp.int32)[None]
  return jnp.max(jnp.where(_trunk(stream), slot, 0), 1)


def _place(stream: Stream) -> Place:
  """Where each row's document goes on."""
  real = stream.segment_ids > 0
  slot = _last_slot(stream)[:, None]
  segment = jnp.take_along_axis(stream.segment_ids, slot, 1)
  first = jnp.take_along_axis(stream.first, slot, 1)
  order = jnp.max(jnp.where(real, stream.order, -1), 1, keepdims=True) + 1
  # An image's largest position is its start + max(grid) - 1, so this is right after it.
  far = jnp.max(stream.positions, -1)
  position = jnp.max(jnp.where(_trunk(stream), far, -1), 1, keepdims=True) + 1
  return Place(segment, first, order, position)


def _behind(batch: PackedBatch, place: Place) -> PackedBatch:
  """Rows' documents as what goes on from `place`, of one row.

  A `first` of 0, a document's beginning, stays; others, of windows, move along.
  """
  s = batch.stream
  real = s.segment_ids > 0
  stream = dataclasses.replace(
    s,
    segment_ids=jnp.where(real, place.segment, 0),
    order=s.order + place.order,
    first=jnp.where(s.first == 0, 0, s.first + place.order),
    last=jnp.where(real, s.last + place.order, s.last),
    until=jnp.where(s.until == FOREVER, FOREVER, s.until + place.order),
    positions=s.positions + place.position[..., None],
  )
  bank = {
    kind: dataclasses.replace(
      b,
      item_segments=jnp.where(b.item_segments > 0, place.segment, 0),
      item_order=b.item_order + place.order,
    )
    for kind, b in batch.bank.items()
  }
  return PackedBatch(stream, bank)
