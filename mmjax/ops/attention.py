"""Attention by tags: one function for every pattern of who sees whom.

  out[t] = sum_s softmax_s(q[t] . k[s] * scale)  v[s]    over the s that t may see

(Vaswani et al., 1706.03762, eq. 1; grouped-query heads: Ainslie et al.,
2305.13245.) Who sees whom stands in small integer tags, see `mmjax.batch`; no
[T, S] mask is an input. More than `chunk` queries go in chunks, each made anew in
the backward pass, so the largest array held is [B, N, chunk, keys]. When nobody
looks further than `reach` slots, e.g. since no document is longer, a chunk is shown
only the keys near it (here reach = (4, 2): 4 back, 2 ahead):

  keys      |. . . . . . . . . . . . . . . .|
  chunk 0    q q q q
             k k k k k k k k k k                 chunk + 4 + 2 keys, shifted
  chunk 1            q q q q                     inside the stream
             k k k k k k k k k k

That is XLA's way ('xla'). On TPUs a kernel takes over ('pallas'), which never has the
logits in memory and skips what tags rule out: `ops.kernels.attention`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmjax import sharding
from mmjax.batch import KeyTags, QueryTags, visible
from mmjax.names import closest
from mmjax.ops import context
from mmjax.ops.linear import batch_matmul
from mmjax.shape import check

Reach = int | tuple[int, int]
# By these names `jax.checkpoint` may keep what `partial_attend` returns.
NAMES = ('attention_out', 'attention_lse')

IMPLEMENTATIONS = ('auto', 'xla', 'pallas')
# Of fewer queries, as in decoding, the kernel would compute mostly what nobody asked.
_KERNEL_QUERIES = 128


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_tags: QueryTags,
  key_tags: KeyTags,
  *,
  scale: float | None = None,
  logits_soft_cap: float | None = None,
  chunk: int = 512,
  reach: Reach | None = None,
  implementation: str = 'auto',
) -> jax.Array:
  """Softmax attention, in float32 inside; a query that sees nothing gives 0.

  Args:
    q: f[B, T, N, H] queries; heads n * N/K ... share one key head.
    k, v: f[B, S, K, H]
    query_tags, key_tags: i32[B, T] and i32[B, S] each; see `mmjax.batch`.
    scale: of the logits; default H ** -0.5.
    logits_soft_cap: c * tanh(logits / c) (Gemma 2, 2408.00118), None = off.
    chunk: at most so many queries at once.
    reach: a promise: a query sees no key that stands more than reach[0] slots
      before it, or reach[1] after it, in the same stream (T == S). Keys out of
      reach are not looked at. One number is for both ways; None = no promise.
    implementation: xla; or pallas, a TPU's kernel (interpreted elsewhere, slowly), which
      needs neither chunk nor reach, and segments >= 0; or auto: pallas on a TPU for 128
      queries or more, else xla. What it is compiled for says `sharding.device`.

  Returns:
    f[B, T, N, H] of v's dtype.

  Raises:
    ValueError: shapes that don't fit, or chunk < 1, or reach with T != S, or an unknown
      implementation; and see `ops.context.attend`, which takes over where the rules
      split queries or keys.
  """
  sizes = check(
    'B T N H', q, 'B S K H', k, 'B S K H', v,
    'B T', query_tags.segment_ids, 'B S', key_tags.segment_ids,
  )  # fmt: skip
  T, S, N, K = (sizes[x] for x in 'TSNK')
  if N % K:
    raise ValueError(f'attend: {N} query heads do not divide over {K} key/value heads')
  if chunk < 1:
    raise ValueError(f'attend: chunk must be at least 1, got {chunk}')
  if reach is not None:
    reach = (reach, reach) if isinstance(reach, int) else tuple(reach)
    if T != S or min(reach) < 0:
      raise ValueError(f'attend: reach {reach} needs T == S and to be >= 0; T={T}, S={S}')
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'attend: unknown implementation {implementation!r}'
      f'{closest(implementation, IMPLEMENTATIONS)}'
    )
  scale = sizes['H'] ** -0.5 if scale is None else scale
  part = functools.partial(
    partial_attend,
    scale=scale,
    logits_soft_cap=logits_soft_cap,
    chunk=chunk,
    implementation=implementation,
  )
  if context.takes_over(takes_kernel(implementation, T)):
    return context.attend(part, q, k, v, query_tags, key_tags, reach)
  return part(q, k, v, query_tags, key_tags, reach=reach)[0]


def takes_kernel(implementation: str, T: int) -> bool:
  """Whether that implementation of attention of T queries is the kernel here."""
  if implementation == 'auto':
    return sharding.device()[0] == 'tpu' and T >= _KERNEL_QUERIES
  return implementation == 'pallas'


def partial_attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_tags: QueryTags,
  key_tags: KeyTags,
  *,
  scale: float,
  logits_soft_cap: float | None = None,
  chunk: int = 512,
  reach: tuple[int, int] | None = None,
  implementation: str = 'auto',
) -> tuple[jax.Array, jax.Array]:
  """Attention to some of the keys, with what it takes to join it to that of others.

  Arguments as of `attend`, which has checked them.

  Returns:
    f[B, T, N, H] of v's dtype, and f32[B, T, N], the logarithm of the sum of
    exp(logits), the least float where a query sees nothing. Both have gradients.
  """
  B, T, N, _ = q.shape
  K = k.shape[2]
  if takes_kernel(implementation, T):
    # Not before it is needed: Pallas takes a while to import.
    from mmjax.ops.kernels.attention import attend_by_tags

    platform, kind = sharding.device()
    return attend_by_tags(
      q, k, v, query_tags, key_tags, scale=scale, logits_soft_cap=logits_soft_cap,
      kind=kind, interpret=platform != 'tpu',
    )  # fmt: skip
  part = functools.partial(_attend, scale=scale, cap=logits_soft_cap)
  # Heads first: products of whole matrices, three times as fast on CPU.
  q = jnp.moveaxis(q.reshape(B, T, K, N // K, -1), 1, 3)  # [B, K, G, T, H]
  k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)  # [B, K, S, H]
  count = math.ceil(T / chunk)
  if count == 1:
    made = part(q, k, v, query_tags, key_tags)
  else:
    made = _in_chunks(part, q, k, v, query_tags, key_tags, math.ceil(T / count), reach)
  out, lse = (jnp.moveaxis(x, 3, 1) for x in made)
  made = out.reshape(B, T, N, -1), lse.reshape(B, T, N)
  return tuple(checkpoint_name(x, name) for x, name in zip(made, NAMES))


def _in_chunks(part, q, k, v, query_tags, key_tags, size, reach):
  """Runs `part` on `size` queries after the other, over the keys in their reach."""
  T, S = q.shape[3], k.shape[2]
  count = math.ceil(T / size)

  def split(x, axis, fill=0):  # [.., T, ..] -> [count, .., size, ..]
    width = [(0, 0)] * x.ndim
    width[axis] = (0, count * size - T)
    x = jnp.pad(x, width, constant_values=fill)
    x = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)

  # Queries that fill up the last chunk have segment -1, which no key has.
  queries = jax.tree.map(lambda x: split(x, 1, -1), query_tags)
  window = S if reach is None else min(S, size + sum(reach))

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def body(k, v, key_tags, xs):
    i, q, tags = xs
    if window < S:
      start = jnp.clip(i * size - reach[0], 0, S - window)

      def near(x, axis):
        return jax.lax.dynamic_slice_in_dim(x, start, window, axis)

      k, v = near(k, 2), near(v, 2)
      key_tags = jax.tree.map(lambda x: near(x, 1), key_tags)
    return part(q, k, v, tags, key_tags)

  made = jax.lax.map(
    lambda xs: body(k, v, key_tags, xs), (jnp.arange(count), split(q, 3), queries)
  )

  def join(x):  # [count, B, K, G, size, ..] -> [B, K, G, T, ..]
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], count * size, *x.shape[5:])[:, :, :, :T]

  return jax.tree.map(join, made)


def _attend(q, k, v, query_tags, key_tags, *, scale, cap):
  """q f[B, K, G, T, H], k and v f[B, K, S, H] -> f[B, K, G, T, H], f32[B, K, G, T]."""
  B, K, G, T, H = q.shape
  q = q.reshape(B, K, G * T, H)
  logits = batch_matmul(q, k, transpose=True) * scale
  if cap is not None:
    logits = cap * jnp.tanh(logits / cap)
  mask = visible(query_tags, key_tags)
  nothing = jnp.finfo(jnp.float32).min
  logits = jnp.where(jnp.tile(mask, (1, G, 1))[:, None], logits, nothing)
  top = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
  weights = jnp.exp(logits - top)
  total = jnp.sum(weights, -1, keepdims=True)
  out = batch_matmul(weights.astype(v.dtype), v)
  # A query that sees nothing has averaged everything: finite, and thrown away.
  sees = top > nothing
  out = jnp.where(sees, out / total, 0.0).astype(v.dtype)
  lse = jnp.where(sees, top + jnp.log(total), nothing)
  return out.reshape(B, K, G, T, -1), lse.reshape(B, K, G, T)
