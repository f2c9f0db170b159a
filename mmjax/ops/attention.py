"""Attention by tags: one function for every pattern of who sees whom.

  out[t] = sum_s softmax_s(q[t] . k[s] * scale)  v[s]    over the s that t may see

(Vaswani et al., 1706.03762, eq. 1; grouped-query heads: Ainslie et al.,
2305.13245.) Who sees whom stands in small integer tags, see `mmjax.batch`; no
[T, S] mask is an input. Queries go in chunks, each made anew in the backward
pass, so the largest array held is [B, N, chunk, keys]. When nobody looks
further than `reach` slots, a chunk is shown only the keys near it:

  keys      |. . . . . . . . . . . . . . . .|
  chunk 0    q q q q
             k k k k k k k k                     chunk + 2 * reach keys, clipped
  chunk 1            q q q q                     to the ends of the stream
                 k k k k k k k k k k k k ...
"""

import functools
import math

import jax
import jax.numpy as jnp

from mmjax.batch import KeyTags, QueryTags, visible
from mmjax.shape import check


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
  reach: int | None = None,
) -> jax.Array:
  """Softmax attention, in float32 inside; a query that sees nothing gives 0.

  Args:
    q: f[B, T, N, H] queries; heads n * N/K ... share one key head.
    k, v: f[B, S, K, H]
    query_tags: i32[B, T] each.
    key_tags: i32[B, S] each.
    scale: of the logits; default H ** -0.5.
    logits_soft_cap: c * tanh(logits / c) (Gemma 2, 2408.00118), None = off.
    chunk: at most so many queries at once.
    reach: a promise that a query and a key that see each other stand at most
      this many slots apart in the same stream (T == S), e.g. that no document
      is longer. Keys out of reach are not looked at. None = no promise.

  Returns:
    f[B, T, N, H] of v's dtype.

  Raises:
    ValueError: shapes that don't fit, or chunk < 1, or reach with T != S.
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
  if reach is not None and (T != S or reach < 0):
    raise ValueError(f'attend: reach {reach} needs T == S and to be >= 0; T={T}, S={S}')
  scale = sizes['H'] ** -0.5 if scale is None else scale
  part = functools.partial(_attend, scale=scale, cap=logits_soft_cap)
  count = math.ceil(T / chunk)
  if count == 1:
    return part(q, k, v, query_tags, key_tags)
  return _in_chunks(part, q, k, v, query_tags, key_tags, math.ceil(T / count), reach)


def _in_chunks(part, q, k, v, query_tags, key_tags, size, reach):
  """Runs `part` on `size` queries after the other, over the keys in their reach."""
  T, S = q.shape[1], k.shape[1]
  count = math.ceil(T / size)
  pad = count * size - T

  def split(x, fill=0):  # [B, T, ...] -> [count, B, size, ...]
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

  queries = QueryTags(
    split(query_tags.segment_ids), split(query_tags.first), split(query_tags.last, -1)
  )
  window = S if reach is None else min(S, size + 2 * reach)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def body(k, v, key_tags, xs):
    i, q, tags = xs
    if window < S:
      start = jnp.clip(i * size - reach, 0, S - window)
      k, v, key_tags = jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, start, window, 1), (k, v, key_tags)
      )
    return part(q, k, v, tags, key_tags)

  out = jax.lax.map(
    lambda xs: body(k, v, key_tags, xs), (jnp.arange(count), split(q), queries)
  )
  out = jnp.moveaxis(out, 0, 1)
  return out.reshape(out.shape[0], count * size, *out.shape[3:])[:, :T]


def _attend(q, k, v, query_tags, key_tags, *, scale, cap):
  B, T, N, H = q.shape
  K = k.shape[2]
  q = q.reshape(B, T, K, N // K, H)
  logits = jnp.einsum('BTKGH,BSKH->BKGTS', q, k, preferred_element_type=jnp.float32)
  logits = logits * scale
  if cap is not None:
    logits = cap * jnp.tanh(logits / cap)
  mask = visible(query_tags, key_tags)[:, None, None]
  logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
  top = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
  probs = jnp.where(mask, jnp.exp(logits - top), 0.0)
  total = jnp.sum(probs, -1, keepdims=True)
  probs = probs / jnp.where(total > 0, total, 1.0)
  out = jnp.einsum('BKGTS,BSKH->BTKGH', probs.astype(v.dtype), v)
  return out.reshape(B, T, N, H)
