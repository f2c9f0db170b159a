"""Attention by tags on a TPU: `ops.attention.partial_attend` as three Pallas kernels.

Of a tile of queries and one of keys only the logits are made, in VMEM, with the keys
down and the queries across (Dao et al., 2205.14135, the other way round):

              queries                        x = k qT                 [keys, queries]
         . . . . . . . .                     p = 2 ** (x - m)
  keys   . . x = k qT  .                     l = l a + sum(p)         [1, queries]
         . . . . . . . .                     o = o a + vT p           [H, queries]
                                             a = 2 ** (old m - m)
         m, l, lse, delta  are rows          m = running maximum      [1, queries]

so that what belongs to a query is a row of lanes, which takes no room, and sums over
keys are sums of registers. Logits are in units of log 2. The query heads of one key
head share its tile, its tags and its mask. Backward, with do, and dlse of the lse:

  dx = p (do v - delta),  delta = rowsum(do out) - dlse
  forward, queries'  for each tile of queries, over its tiles of keys: out, lse; dq
  keys'              for each tile of keys, over its tiles of queries: dk, dv

Which tiles there are to visit: `kernels.tiles`. Everything is linear in T and S. Where
these are no multiples of a tile, the last blocks hang over the arrays' ends: only tags
and rows of lanes are filled up, since a copy of q, k and v costs more than attention.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmjax.batch import KeyTags, QueryTags
from mmjax.ops.attention import NAMES
from mmjax.ops.kernels.tiles import (
  FIRST,
  FULL,
  LAST,
  MAX_ENTRIES,
  PARTIAL,
  STATE,
  Tiles,
  meetings,
  table,
  tiles_for,
)  # fmt: skip

_LOG2E = math.log2(math.e)
_LEAST = float(np.finfo(np.float32).min)
# A logit that isn't seen; far from the least float, so that differences are finite.
_UNSEEN = 0.7 * _LEAST


@dataclasses.dataclass(frozen=True)
class _How:
  """What is fixed when a kernel is made."""

  scale: float
  cap: float | None
  tiles: Tiles
  interpret: bool


def attend_by_tags(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_tags: QueryTags,
  key_tags: KeyTags,
  *,
  scale: float,
  logits_soft_cap: float | None = None,
  kind: str = '',
  interpret: bool = False,
  tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array]:
  """`ops.attention.partial_attend` by the kernels, differentiable by q, k and v.

  Segments of the tags are >= 0. Inside of a `shard_map` (which has to be one with
  check_vma=False) it is of one device's part.

  Args:
    q, k, v, query_tags, key_tags, scale, logits_soft_cap: as there.
    kind: the device's kind, for the size of tiles.
    interpret: run it without a TPU, slowly.
    tiles: sizes other than the table's, multiples of 128.

  Returns:
    f[B, T, N, H] of v's dtype, f32[B, T, N].

  Raises:
    ValueError: more tiles in a row than tables have room for.
  """
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  G = N // K
  tiles = tiles or tiles_for(kind, T, S, G, H, q.dtype.itemsize)
  how = _How(float(scale), logits_soft_cap, tiles, interpret)
  if key_tags.until is None:  # the queries' own order isn't needed
    query_tags = dataclasses.replace(query_tags, order=None)
  q = jnp.moveaxis(q.reshape(B, T, K, G, H), 1, 3)
  k, v = (jnp.moveaxis(x, 1, 2) for x in (k, v))
  # Tags that nobody has: what fills up the tiles sees nothing, and isn't seen.
  query_tags = jax.tree.map(lambda x: _fill(x, tiles.queries, -1), query_tags)
  key_tags = jax.tree.map(lambda x: _fill(x, tiles.keys, -2), key_tags)

  entries = math.ceil(T / tiles.queries) * math.ceil(S / tiles.keys)
  if entries > MAX_ENTRIES:
    raise ValueError(
      f'attend: {T} queries x {S} keys on one device are {entries} tiles of'
      f' {tiles.queries} x {tiles.keys}, at most {MAX_ENTRIES}; split them over the mesh'
    )
  run = functools.partial(_attend, how)
  args = (q, k, v, query_tags, key_tags)
  rows = max(n for n in range(1, B + 1) if B % n == 0 and n * entries <= MAX_ENTRIES)
  if rows == B:
    out, lse = run(*args)
  else:
    args = jax.tree.map(lambda x: x.reshape(B // rows, rows, *x.shape[1:]), args)
    out, lse = jax.lax.map(lambda x: run(*x), args)
    out, lse = (x.reshape(B, *x.shape[2:]) for x in (out, lse))
  out = jnp.moveaxis(out, 3, 1).reshape(B, T, N, H)
  return out, jnp.moveaxis(lse, 3, 1).reshape(B, T, N)


def _fill(x, tile, value=0):
  """x[..., slots] with its last axis up to whole tiles."""
  width = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % tile)]
  return jnp.pad(x, width, constant_values=value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how, q, k, v, query_tags, key_tags):
  """q f[B, K, G, T, H], k and v f[B, K, S, H] -> f[B, K, G, T, H], f32[B, K, G, T]."""
  return _forward(how, q, k, v, query_tags, key_tags)[0]


def _forward(how, q, k, v, query_tags, key_tags):
  call = _Call(how, q, k, query_tags, key_tags)
  out, lse = call(
    _forward_kernel, 'attention_forward', by_keys=False, matmuls=2,
    inputs=[(q, 'query'), (k, 'key'), (v, 'key')],
    outputs=[(q.shape, v.dtype, 'query'), (call.row_shape, jnp.float32, 'row')],
    scratch=[call.wide, call.row, call.row],
  )  # fmt: skip
  # By these names a policy of remat may keep what a second run would make anew.
  out = checkpoint_name(out, NAMES[0])
  lse = checkpoint_name(lse[..., 0, : call.T], NAMES[1])
  return (out, lse), (q, k, v, query_tags, key_tags, out, lse)


def _backward(how, kept, cotangents):
  q, k, v, query_tags, key_tags, out, lse = kept
  do, dlse = cotangents
  product = do.astype(jnp.float32) * out.astype(jnp.float32)
  delta = jnp.sum(product, -1) - dlse
  # Of a query that sees nothing: any finite number makes all its p zero.
  lse = jnp.where(lse > _UNSEEN, lse * _LOG2E, 0.0)
  lse, delta = (_fill(x, how.tiles.queries)[..., None, :] for x in (lse, delta))
  call = _Call(how, q, k, query_tags, key_tags)
  inputs = [
    (q, 'query'), (k, 'key'), (v, 'key'), (do.astype(v.dtype), 'query'),
    (lse, 'row'), (delta, 'row'),
  ]  # fmt: skip
  (dq,) = call(
    _queries_kernel, 'attention_queries', by_keys=False, matmuls=3, inputs=inputs,
    outputs=[(q.shape, q.dtype, 'query')], scratch=[call.wide],
  )  # fmt: skip
  dk, dv = call(
    _keys_kernel, 'attention_keys', by_keys=True, matmuls=4, inputs=inputs,
    outputs=[(k.shape, k.dtype, 'key'), (v.shape, v.dtype, 'key')],
    scratch=[call.tall, call.tall],
  )  # fmt: skip
  return dq, dk, dv, None, None


_attend.defvjp(_forward, _backward)


class _Call:
  """What the three kernels' calls have in common: the grid, the blocks, the tags.

  The grid is (rows, key heads, steps of the row's table).
  """

  def __init__(self, how, q, k, query_tags, key_tags):
    self.how = how
    self.B, self.K, self.G, self.T, self.H = q.shape
    self.S = k.shape[2]
    self.itemsize = q.dtype.itemsize
    queries, _ = how.tiles
    self.wide = pltpu.VMEM((self.G, self.H, queries), jnp.float32)
    self.row = pltpu.VMEM((self.G, 1, queries), jnp.float32)
    self.tall = pltpu.VMEM((how.tiles.keys, self.H), jnp.float32)
    self.row_shape = (self.B, self.K, self.G, 1, query_tags.segment_ids.shape[1])
    self.states = meetings(query_tags, key_tags, how.tiles)
    # [B, tags, slots]: a row of lanes for each tag.
    self.tags = [jnp.stack(jax.tree.leaves(x), 1) for x in (query_tags, key_tags)]

  def __call__(self, kernel, name, *, by_keys, matmuls, inputs, outputs, scratch):
    how, G, H = self.how, self.G, self.H
    steps = table(jnp.swapaxes(self.states, 1, 2) if by_keys else self.states)
    queries, keys = how.tiles

    def place(ref, b, n):  # (tile of queries, tile of keys) of a step
      outer, inner, _ = steps.read(ref, b, n)
      return (inner, outer) if by_keys else (outer, inner)

    def spec(kind):
      return {
        'query': pl.BlockSpec(
          (1, 1, G, queries, H),
          lambda b, h, n, ref: (b, h, 0, place(ref, b, n)[0], 0),
        ),
        'row': pl.BlockSpec(
          (1, 1, G, 1, queries), lambda b, h, n, ref: (b, h, 0, 0, place(ref, b, n)[0])
        ),
        'key': pl.BlockSpec(
          (1, 1, keys, H), lambda b, h, n, ref: (b, h, place(ref, b, n)[1], 0)
        ),
        'query_tags': pl.BlockSpec(
          (1, self.tags[0].shape[1], queries),
          lambda b, h, n, ref: (b, 0, place(ref, b, n)[0]),
        ),
        'key_tags': pl.BlockSpec(
          (1, self.tags[1].shape[1], keys),
          lambda b, h, n, ref: (b, 0, place(ref, b, n)[1]),
        ),
      }[kind]

    # What is summed over: key by key or query by query.
    summed, length, tile = (
      ('query', self.T, queries) if by_keys else ('key', self.S, keys)
    )

    def body(ref, query_tags, key_tags, *refs):
      _, inner, bits = steps.read(ref, pl.program_id(0), pl.program_id(2))
      mask = functools.partial(_mask, query_tags, key_tags)
      if length % tile:
        left = length - inner * tile
        own = [kind for _, kind in inputs]
        refs = [
          _Ending(ref, left) if kind == summed else ref
          for ref, kind in itertools.zip_longest(refs, own)
        ]
      kernel(how, bits, mask, *refs)

    tags = [(self.tags[0], 'query_tags'), (self.tags[1], 'key_tags')]
    call = pl.pallas_call(
      body,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(self.B, self.K, steps.steps),
        in_specs=[spec(kind) for _, kind in (*tags, *inputs)],
        out_specs=[spec(kind) for _, _, kind in outputs],
        scratch_shapes=scratch,
      ),
      out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=('parallel', 'parallel', 'arbitrary')
      ),
      cost_estimate=self.cost(matmuls),
      interpret=how.interpret,
      name=name,
    )
    return call(steps.entries, *(x for x, _ in (*tags, *inputs)))

  def cost(self, matmuls):
    """What a compiler may reckon with, who doesn't know the tags.

    Pairs: half of all where T == S, as if causal, and all otherwise.
    """
    pairs = self.B * self.K * self.G * self.T * self.S // (2 if self.T == self.S else 1)
    slots = 2 * self.B * self.K * (self.G * self.T + self.S)
    return pl.CostEstimate(
      flops=2 * matmuls * pairs * self.H,
      transcendentals=pairs,
      bytes_accessed=slots * self.H * self.itemsize,
    )


class _Ending:
  """A block of slots, read as zeros from where the array ends.

  There may stand anything in it, NaN too, which no weight of 0 would hide in a sum.
  """

  def __init__(self, ref, left):
    self.ref, self.left = ref, left
    self.shape, self.dtype = ref.shape, ref.dtype

  def __getitem__(self, place):
    x = self.ref[place]
    slot = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(slot < self.left, x, jnp.zeros_like(x))


def _mask(query_tags, key_tags):
  """bool[keys, queries], as of `mmjax.batch.visible`, of a step's blocks of tags."""
  # In the order of the fields of QueryTags and KeyTags.
  segment, first, last, *rank = (
    query_tags[0, i : i + 1] for i in range(query_tags.shape[1])
  )
  columns = jnp.swapaxes(key_tags[0], 0, 1)
  key_segment, order, *until = (columns[:, i : i + 1] for i in range(columns.shape[1]))
  seen = (segment == key_segment) & (first <= order) & (order <= last)
  return seen & (rank[0] <= until[0]) if until else seen


def _dot(a, b, axes):
  """a b over these axes, in float32."""
  return jax.lax.dot_general(
    a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32
  )


def _logits(how, q, k):
  """[queries, H], [keys, H] -> logits [keys, queries] / log 2, and d of them / d qk."""
  x = _dot(k, q, (1, 1))
  if how.cap is None:
    return x * (how.scale * _LOG2E), None
  tanh = jnp.tanh(x * (how.scale / how.cap))
  return tanh * (how.cap * _LOG2E), tanh


def _each_tile(bits, G, mask, tile):
  """Runs `tile(g, hide)` of every query head, if the step has work."""

  def run(hide):
    jax.lax.fori_loop(0, G, lambda g, _: tile(g, hide), None, unroll=G <= 4)

  @pl.when(bits & STATE == FULL)
  def _():
    run(lambda x: x)

  @pl.when(bits & STATE == PARTIAL)
  def _():
    seen = mask()
    run(lambda x: jnp.where(seen, x, _UNSEEN))


def _forward_kernel(how, bits, mask, q, k, v, out, lse, wide, top, total):
  @pl.when(bits & FIRST != 0)
  def _():
    wide[...] = jnp.zeros_like(wide)
    top[...] = jnp.full_like(top, _UNSEEN)
    total[...] = jnp.zeros_like(total)

  def tile(g, hide):
    x, _ = _logits(how, q[0, 0, g], k[0, 0])
    x = hide(x)
    old = top[g]
    m = jnp.maximum(old, jnp.max(x, 0, keepdims=True))
    p = jnp.exp2(x - m)
    shrink = jnp.exp2(old - m)
    top[g] = m
    total[g] = total[g] * shrink + jnp.sum(p, 0, keepdims=True)
    wide[g] = wide[g] * shrink + _dot(v[0, 0], p.astype(v.dtype), (0, 0))

  G = q.shape[2]
  _each_tile(bits, G, mask, tile)

  @pl.when(bits & LAST != 0)
  def _():
    def finish(g, _):
      # A query that sees nothing has averaged what it doesn't see; that is thrown away.
      sees = top[g] > _UNSEEN
      o = jnp.where(sees, wide[g] / total[g], 0.0)
      out[0, 0, g] = jnp.swapaxes(o, 0, 1).astype(out.dtype)
      lse[0, 0, g] = jnp.where(sees, top[g] / _LOG2E + jnp.log(total[g]), _LEAST)

    jax.lax.fori_loop(0, G, finish, None)


def _dlogits(how, hide, g, q, k, v, do, lse, delta):
  """p and the gradient by q . k, without the scale, of a tile: [keys, queries] each."""
  x, tanh = _logits(how, q[0, 0, g], k[0, 0])
  p = jnp.exp2(hide(x) - lse[0, 0, g])
  dx = p * (_dot(v[0, 0], do[0, 0, g], (1, 1)) - delta[0, 0, g])
  return p, dx if tanh is None else dx * (1 - tanh * tanh)


def _queries_kernel(how, bits, mask, q, k, v, do, lse, delta, dq, wide):
  @pl.when(bits & FIRST != 0)
  def _():
    wide[...] = jnp.zeros_like(wide)

  def tile(g, hide):
    _, dx = _dlogits(how, hide, g, q, k, v, do, lse, delta)
    wide[g] += _dot(k[0, 0], dx.astype(k.dtype), (0, 0))

  G = q.shape[2]
  _each_tile(bits, G, mask, tile)

  @pl.when(bits & LAST != 0)
  def _():
    def finish(g, _):
      dq[0, 0, g] = jnp.swapaxes(wide[g] * how.scale, 0, 1).astype(dq.dtype)

    jax.lax.fori_loop(0, G, finish, None)


def _keys_kernel(how, bits, mask, q, k, v, do, lse, delta, dk, dv, tall_k, tall_v):
  @pl.when(bits & FIRST != 0)
  def _():
    tall_k[...] = jnp.zeros_like(tall_k)
    tall_v[...] = jnp.zeros_like(tall_v)

  def tile(g, hide):
    p, dx = _dlogits(how, hide, g, q, k, v, do, lse, delta)
    tall_v[...] += _dot(p.astype(do.dtype), do[0, 0, g], (1, 0))
    tall_k[...] += _dot(dx.astype(q.dtype), q[0, 0, g], (1, 0))

  _each_tile(bits, q.shape[2], mask, tile)

  @pl.when(bits & LAST != 0)
  def _():
    dk[0, 0] = (tall_k[...] * how.scale).astype(dk.dtype)
    dv[0, 0] = tall_v[...].astype(dv.dtype)
