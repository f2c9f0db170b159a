"""Attention of a stream that is split over devices, with its images.

The rules say what is split: queries by 'seq', keys by 'kv_seq', heads by 'act_heads'.
What then happens in attention, on a mesh axis `context`:

  seq      kv_seq   attend_heads
  context  context  -          ring: keys travel with their tags    (2310.01889)
  context  context  context    all-to-all: every device takes all slots, and a
                               share of the heads                   (2309.14509)
  context  -        -          every device has all keys            (2407.21783, 3.3.2)
  -        context  -          queries go to all keys' devices, as in decoding

  ring     device 0   device 1   device 2       Rows of the picture are rounds. What
    0      q0 k0      q1 k1      q2 k2          a device has seen of the keys is joined
    1      q0 k2      q1 k0      q2 k1          by log-sum-exp, and where tags say that
    2      q0 k1      q1 k2      q2 k0          nothing can be seen, nothing is done.

The ring's gradient is written out: a second ring, in which the gradient of keys and
values travels with them, so that no device ever holds those of all. Nothing here knows
how one device attends: that is a function given, `ops.attention.partial_attend`.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mmjax import sharding
from mmjax.batch import KeyTags, QueryTags
from mmjax.ops.across import onward, spec, ways
from mmjax.sharding import mesh_axes

# (q, k, v, query_tags, key_tags, reach=) -> (out, logarithm of the sum of exp(logits))
Part = Callable[..., tuple[jax.Array, jax.Array]]


def takes_over(kernel: bool = False) -> bool:
  """Whether attention here is `attend`'s: queries or keys are split, or a device's share
  is a kernel's, which the compiler doesn't know how to split."""
  split = sharding.parts('seq') > 1 or sharding.parts('kv_seq') > 1
  return split or (kernel and sharding.inside())


def attend(
  part: Part,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_tags: QueryTags,
  key_tags: KeyTags,
  reach: tuple[int, int] | None = None,
) -> jax.Array:
  """`ops.attention.attend` inside of `sharding.use`: `part` on each device's share.

  Args:
    part: attention on one device, `ops.attention.partial_attend` with its options.
    q, k, v, query_tags, key_tags, reach: as of `ops.attention.attend`; `reach` goes to
      `part` where a device holds the whole stream.

  Returns:
    f[B, T, N, H] of v's dtype, split as q.

  Raises:
    ValueError: sizes that don't divide over the mesh, or rules that don't go together.
  """
  how = _how(q.shape, k.shape)
  names = 'batch', 'seq', 'act_heads', None
  q_spec = spec('queries', q.shape, names)
  # Without groups, keys' heads are as queries'.
  heads = 'act_heads' if k.shape[2] == q.shape[2] else 'act_kv_heads'
  k_spec = spec('keys', k.shape, ('batch', 'kv_seq', heads, None))
  specs = (q_spec, k_spec, k_spec, P(*q_spec[:2]), P(*k_spec[:2]))
  run = functools.partial(_on_each, how, part, reach)
  # What is whole in some mesh axis is the same there by construction.
  return jax.shard_map(run, in_specs=specs, out_specs=q_spec, check_vma=False)(
    q, k, v, query_tags, key_tags
  )


class _How(NamedTuple):
  """Mesh axes that take part, by what they split; each () if it is whole."""

  seq: tuple[str, ...]
  keys: tuple[str, ...]
  swap: tuple[str, ...]  # heads over these, instead of slots, during attention
  heads: tuple[str, ...]  # of queries, where keys' heads are whole


def _how(q_shape, k_shape) -> _How:
  seq, keys, swap, heads = map(mesh_axes, ('seq', 'kv_seq', 'attend_heads', 'act_heads'))
  N, K = q_shape[2], k_shape[2]
  kv_heads = heads if N == K else mesh_axes('act_kv_heads')
  if seq and keys and seq != keys:
    raise ValueError(f"attend: rules split 'seq' over {seq} but 'kv_seq' over {keys}")
  if kv_heads and kv_heads != heads:
    raise ValueError(
      f"attend: rules split 'act_kv_heads' over {kv_heads} but 'act_heads' over {heads}"
    )
  swap = swap if seq else ()
  if swap and swap != seq:
    raise ValueError(
      f"attend: rules split 'attend_heads' over {swap}; it must be those of 'seq', {seq}"
    )
  local = N // ways(heads)
  if local % ways(swap):
    raise ValueError(
      f"attend: {local} heads a device don't divide over 'attend_heads' {swap} ="
      f' {ways(swap)};'
      ' without that rule keys go round a ring, with any number of heads'
    )
  return _How(seq, keys, swap, () if kv_heads else heads)


def _on_each(how, part, reach, q, k, v, query_tags, key_tags):
  """What one device does of `attend`."""
  if how.heads:
    k, v = (_own_heads(x, q.shape[2], how.heads) for x in (k, v))
  if how.swap:
    q, query_tags = _to_heads(q, how.swap), _whole(query_tags, how.swap)
    if how.keys:
      # As few copies of the keys' heads as it takes for each device to get one.
      copies = ways(how.swap) // math.gcd(k.shape[2], ways(how.swap))
      k, v = (_to_heads(jnp.repeat(x, copies, 2), how.swap) for x in (k, v))
      key_tags = _whole(key_tags, how.swap)
    else:
      k, v = (_own_heads(x, q.shape[2], how.swap) for x in (k, v))
    out, _ = part(q, k, v, query_tags, key_tags, reach=reach)
    return jax.lax.all_to_all(out, how.swap, 1, 2, tiled=True)
  if how.seq and how.keys:
    return _ring((part, how.keys), q, k, v, query_tags, key_tags)
  reach = None if how.seq or how.keys else reach
  out, lse = part(q, k, v, query_tags, key_tags, reach=reach)
  if not how.keys:
    return out
  top = jax.lax.pmax(jax.lax.stop_gradient(lse), how.keys)
  share = jnp.exp(lse - top)
  total = jax.lax.psum(share, how.keys)
  out = jax.lax.psum(share[..., None] * out.astype(jnp.float32), how.keys)
  return (out / total[..., None]).astype(v.dtype)


def _own_heads(x, num_heads, axes):
  """Of whole keys f[B, S, K, H], those of this device's `num_heads` query heads."""
  group = num_heads * ways(axes) // x.shape[2]
  first = jax.lax.axis_index(axes) * num_heads
  if num_heads % group and group % num_heads:  # a group begins in one device's midst
    return jnp.take(x, (first + jnp.arange(num_heads)) // group, axis=2)
  size = max(1, num_heads // group)
  return jax.lax.dynamic_slice_in_dim(x, first // group, size, 2)


def _to_heads(x, axes):
  """f[B, T / c, N, H] -> f[B, T, N / c, H]"""
  return jax.lax.all_to_all(x, axes, 2, 1, tiled=True)


def _whole(tags, axes):
  return jax.tree.map(lambda x: jax.lax.all_gather(x, axes, axis=1, tiled=True), tags)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(how, q, k, v, query_tags, key_tags):
  """Attention of this device's queries to the keys of all; how: (part, mesh axes)."""
  return _ring_forward(how, q, k, v, query_tags, key_tags)[0]


def _ring_forward(how, q, k, v, query_tags, key_tags):
  part, axes = how

  def visit(made, travel):
    k, v, tags = travel

    def look(made):
      return _join(made, part(q, k, v, query_tags, tags))

    return jax.lax.cond(_may_meet(query_tags, tags), look, lambda made: made, made)

  out = jnp.zeros((*q.shape[:3], v.shape[3]), jnp.float32)
  made = out, jnp.full(q.shape[:3], jnp.finfo(jnp.float32).min)

  def one_round(carry, _):
    made, travel = carry
    # The next keys are under way while these are looked at.
    return (visit(made, travel), onward(travel, axes)), None

  carry = made, (k, v, key_tags)
  (made, last), _ = jax.lax.scan(one_round, carry, None, length=ways(axes) - 1)
  out, lse = visit(made, last)
  out = out.astype(v.dtype)
  return out, (q, k, v, query_tags, key_tags, out, lse)


def _ring_backward(how, kept, cotangent):
  """Of out = sum_r w_r out_r with w_r = exp(lse_r - lse), round by round:

  d out_r = w_r d out          d lse_r = w_r (d out . out_r - d out . out)
  """
  part, axes = how
  q, k, v, query_tags, key_tags, out, lse = kept
  g = cotangent.astype(jnp.float32)
  all_of_it = jnp.sum(g * out.astype(jnp.float32), -1)

  def visit(grads, travel):
    k, v, tags = travel

    def look(grads):
      (o, l), pull = jax.vjp(lambda *x: part(*x, query_tags, tags), q, k, v)
      w = jnp.exp(l - lse)
      own = jnp.sum(g * o.astype(jnp.float32), -1)
      new = pull(((w[..., None] * g).astype(o.dtype), w * (own - all_of_it)))
      return jax.tree.map(lambda sum, x: sum + x.astype(jnp.float32), grads, new)

    return jax.lax.cond(_may_meet(query_tags, tags), look, lambda grads: grads, grads)

  def one_round(carry, _):
    grads, travel = carry
    (dq, *dkv), travel = visit(grads, travel), onward(travel, axes)
    return ((dq, *onward(dkv, axes)), travel), None

  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
  carry = zeros, (k, v, key_tags)
  (grads, last), _ = jax.lax.scan(one_round, carry, None, length=ways(axes) - 1)
  dq, *dkv = visit(grads, last)
  dk, dv = onward(dkv, axes)  # home
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_ring.defvjp(_ring_forward, _ring_backward)


def _join(a, b):
  """What two parts of the keys make together; each (out, log-sum-exp)."""
  top = jnp.maximum(a[1], b[1])
  share = jnp.exp(a[1] - top), jnp.exp(b[1] - top)
  total = share[0] + share[1]
  out = share[0][..., None] * a[0] + share[1][..., None] * b[0].astype(jnp.float32)
  return out / total[..., None], top + jnp.log(total)


def _may_meet(query_tags: QueryTags, key_tags: KeyTags) -> jax.Array:
  """bool[], False only if no query of any row can see any key."""
  low, high = -1, jnp.iinfo(jnp.int32).max
  q, k = query_tags, key_tags
  looks = q.first <= q.last

  def ranges(x, counts):
    least = jnp.min(jnp.where(counts, x, high), 1)
    return least, jnp.max(jnp.where(counts, x, low), 1)

  def meet(a, b):
    return (a[0] <= b[1]) & (b[0] <= a[1])

  # Padding by itself: it would stretch the range of segments down to 0.
  padding = jnp.any(looks & (q.segment_ids == 0), 1) & jnp.any(k.segment_ids == 0, 1)
  documents = meet(
    ranges(q.segment_ids, looks & (q.segment_ids > 0)),
    ranges(k.segment_ids, k.segment_ids > 0),
  )
  first, last = ranges(q.first, looks)[0], ranges(q.last, looks)[1]
  ranks = meet((first, last), ranges(k.order, k.order == k.order))
  return jnp.any((padding | documents) & ranks)
