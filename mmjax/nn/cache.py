"""Keys and values of slots already seen, with the tags they carry.

A cache has S slots in every row; a step writes its T new slots at the same
place in all rows, and attention finds its way by the tags, so rows of ragged
length just have invisible slots (segment 0) in between:

  slot          0 1 2 3 4 | 5 6          prompt of up to 5, then new tokens
  row 0         a b c d e | f g
  row 1         a b . . . | c d          . = padding of the prompt, never seen

Heads come first, [B, K, S, H], as attention's products want them: with slots first, XLA
on a CPU writes the whole cache anew, transposed, at every token.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmjax import sharding
from mmjax.batch import KeyTags
from mmjax.sharding import constrain


class KV(NamedTuple):
  """One layer's keys and values, each f[B, K, S, H]; stacked layers: f[L, B, K, S, H]."""

  key: Any
  value: Any

  @classmethod
  def of(cls, key: jax.Array, value: jax.Array) -> 'KV':
    """From f[B, S, K, H] each."""
    return cls(jnp.moveaxis(key, 1, 2), jnp.moveaxis(value, 1, 2))

  def slots_first(self) -> tuple[jax.Array, jax.Array]:
    """f[B, S, K, H] each, as `ops.attention.attend` takes them."""
    return jnp.moveaxis(self.key, 2, 1), jnp.moveaxis(self.value, 2, 1)


class Cache(NamedTuple):
  """Tags of the S slots, i32[B, S] each, and a `KV` stacked or one per layer."""

  tags: KeyTags
  layers: KV | tuple[KV, ...]


def empty_cache(
  rows: int,
  slots: int,
  num_layers: int,
  num_kv_heads: int,
  head_dim: int,
  dtype: Any,
  stacked: bool,
) -> Cache:
  """A cache whose slots are all padding.

  On a CPU bfloat16 is kept in float32: attention's products there are of float32, and
  would want all of the cache converted at every token.
  """
  if sharding.device()[0] == 'cpu' and jnp.dtype(dtype) == jnp.bfloat16:
    dtype = jnp.float32
  shape = (rows, num_kv_heads, slots, head_dim)
  names = ('batch', 'act_kv_heads', 'kv_seq', None)

  def zeros():
    if stacked:
      return constrain(jnp.zeros((num_layers, *shape), dtype), None, *names)
    return constrain(jnp.zeros(shape, dtype), *names)

  layers = tuple(KV(zeros(), zeros()) for _ in range(1 if stacked else num_layers))
  tags = KeyTags(*(jnp.zeros((rows, slots), jnp.int32) for _ in range(3)))
  return Cache(tags, layers[0] if stacked else layers)


def write(old: Any, new: Any, slot: jax.Array | int, axis: int = 1) -> Any:
  """Writes T new slots into the S old ones from `slot` on, leaf by leaf."""
  return jax.tree.map(
    lambda o, n: jax.lax.dynamic_update_slice_in_dim(o, n.astype(o.dtype), slot, axis),
    old,
    new,
  )


def join(old: Any, new: Any, axis: int) -> Any:
  """New slots or items behind the old ones, leaf by leaf."""
  return jax.tree.map(lambda o, n: jnp.concatenate([o, n], axis), old, new)
