"""Which tiles of queries and keys can meet, and in what order a kernel visits them.

A tile of queries is summed up by four numbers, and so is one of keys:

  queries   low  = least (segment, first)     high = greatest (segment, last)
  keys      low  = least (segment, order)     high = greatest (segment, order)

compared as words are: by segment, then by the other. They may meet only if neither
lies wholly after the other, low <= high both ways. This one test skips other
documents, what comes later (causal), and what has left the window. Two documents,
packed; tiles that are visited, `F`ull ones without looking at the tags of each slot:

              keys
  queries  o  .  .  .       The table of a row is the list of its `o` and `F`, so that
           F  o  .  .       a kernel takes no step for the others, and fetches nothing
           .  o  o  .       of them: 0 0 | 1 0 | 1 1 | 2 1 | 2 2 | 3 2 | 3 3
           .  .  o  o

A tile that nobody sees (padding) has one entry without work, which writes its zeros.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.batch import KeyTags, QueryTags

LANES = 128

# What a tile pair is; the low bits of a table's entry.
SKIPPED, PARTIAL, FULL = 0, 1, 2
STATE, FIRST, LAST, BITS = 3, 4, 8, 4

# Tables lie in the scalar memory, of 2**20 bytes: so many entries are half of it.
MAX_ENTRIES = 2**17

_MOST = np.iinfo(np.int32).max


class Tiles(NamedTuple):
  """How many queries and keys a tile has."""

  queries: int
  keys: int


class Sizes(NamedTuple):
  """Of a kind of chip: tiles of one query head for each of keys, and of many."""

  queries: int
  keys: int
  least: int  # queries of a tile; half of the matrix unit idles with fewer


# By the device's kind. Reckoned, not measured: a step of the grid costs about 0.35 us,
# so it should be microseconds of work, and about six float32 arrays of a tile's size
# have to lie in the 16 MiB (v4, v5) or 32 MiB (v6, 7) that a kernel may use.
SIZES = {
  'TPU v4': Sizes(512, 512, 128),
  'TPU v5 lite': Sizes(512, 512, 128),
  'TPU v5': Sizes(512, 512, 128),
  'TPU v6 lite': Sizes(512, 1024, 256),
  'TPU7x': Sizes(512, 1024, 256),
}
# Queries that share a tile of keys, of all heads, are at most this many, as small tiles
# are less often visited in vain; and their bytes at most those.
_QUERIES, _QUERY_BYTES = 1024, 2**20


def tiles_for(kind: str, T: int, S: int, G: int, H: int, itemsize: int) -> Tiles:
  """The tiles for T queries and S keys of width H, G query heads for each of keys.

  Both are multiples of 128, and as even as they can be: 640 slots are two tiles of 384,
  not one of 512 and one of 128.
  """
  queries, keys, least = SIZES.get(kind, Sizes(512, 512, 128))
  while queries > least and queries * G > _QUERIES:
    queries //= 2
  while queries > LANES and queries * G * max(H, LANES) * itemsize > _QUERY_BYTES:
    queries //= 2
  return Tiles(_even(T, queries), _even(S, keys // (itemsize // 2)))


def _even(length, size):
  count = math.ceil(length / size)
  return math.ceil(length / count / LANES) * LANES


def meetings(query_tags: QueryTags, key_tags: KeyTags, tiles: Tiles) -> jax.Array:
  """What each tile pair is: i32[B, T / queries, S / keys] of SKIPPED, PARTIAL, FULL.

  Tags as of `mmjax.batch.visible`; T and S are multiples of the tiles. SKIPPED: nobody
  sees anybody there. FULL: everybody sees everybody. PARTIAL may be anything. Slots of
  negative segments meet nobody.
  """
  B = len(query_tags.segment_ids)
  q = jax.tree.map(lambda x: x.reshape(B, -1, 1, tiles.queries), query_tags)
  k = jax.tree.map(lambda x: x.reshape(B, 1, -1, tiles.keys), key_tags)
  sees = (q.first <= q.last) & (q.segment_ids >= 0)
  seen = k.segment_ids >= 0
  meet = _in_order(_least(q, q.first, sees), _greatest(k, k.order, seen))
  meet &= _in_order(_least(k, k.order, seen), _greatest(q, q.last, sees))
  segments = jnp.minimum(q.segment_ids.min(-1), k.segment_ids.min(-1))
  full = segments == jnp.maximum(q.segment_ids.max(-1), k.segment_ids.max(-1))
  full &= (q.first.max(-1) <= k.order.min(-1)) & (k.order.max(-1) <= q.last.min(-1))
  if k.until is not None:
    full &= q.order.max(-1) <= k.until.min(-1)
    meet &= _min(q.order, sees) <= _max(k.until, seen)
  return jnp.where(meet, jnp.where(full, FULL, PARTIAL), SKIPPED)


def _min(x, where):
  return jnp.min(x, -1, where=where, initial=_MOST)


def _max(x, where):
  return jnp.max(x, -1, where=where, initial=-_MOST)


def _least(tags, x, where):
  """The least pair of a segment and its x, over the last axis; padding is last."""
  segments = jnp.where(tags.segment_ids == 0, _MOST, tags.segment_ids)
  segment = _min(segments, where)
  return segment, _min(x, where & (segments == segment[..., None]))


def _greatest(tags, x, where):
  segments = jnp.where(tags.segment_ids == 0, _MOST, tags.segment_ids)
  segment = _max(segments, where)
  return segment, _max(x, where & (segments == segment[..., None]))


def _in_order(a, b):
  return (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] <= b[1]))


class Table(NamedTuple):
  """The steps of every row, for the scalar memory.

  entries: i32[B * length] outer tile, inner tile and bits of each step; see `read`.
  steps:   i32[] of the longest row; the entries of others end with steps of no work.
  length:  entries per row.
  bits:    that the number of an inner tile takes.
  """

  entries: jax.Array
  steps: jax.Array
  length: int
  bits: int

  def read(self, ref, row, step):
    """(outer, inner, bits) of a step, with `entries` in ref; made of shifts only."""
    code = ref[row * self.length + step]
    inner = (code >> BITS) & (2**self.bits - 1)
    return code >> (self.bits + BITS), inner, code & (2**BITS - 1)


def table(states: jax.Array) -> Table:
  """Lists what is not SKIPPED in i32[B, outer, inner], by outer, then by inner tiles.

  Bits of an entry: what it is (`STATE`), `FIRST` and `LAST` of its outer tile. An outer
  tile that meets none has one entry that is SKIPPED, with the inner tile of the entry
  before, which is there already.
  """
  B, outer, inner = states.shape
  bits = (inner - 1).bit_length()
  rows, columns = (
    jax.lax.broadcasted_iota(jnp.int32, states.shape, axis) for axis in (1, 2)
  )
  some = states > SKIPPED
  # The last tile met so far: by outer, then by inner tile, so that a maximum finds it.
  met = jnp.max(jnp.where(some, rows << bits | columns, 0), -1)
  before = jax.lax.cummax(met, 1) & (2**bits - 1)
  listed = some | (~some.any(-1, keepdims=True) & (columns == before[..., None]))
  code = jnp.where(listed, rows << (bits + BITS) | columns << BITS | states, _MOST)
  code = jnp.sort(code.reshape(B, -1), -1)
  steps = jnp.sum(listed, (1, 2), dtype=jnp.int32)
  # Steps of no work stay where the row's last one was.
  end = jnp.max(jnp.where(code == _MOST, 0, code), -1, keepdims=True) & -(2**BITS)
  idle = code == _MOST
  tile = code >> (bits + BITS)
  edge = jnp.full((B, 1), -1, jnp.int32)
  first = tile != jnp.concatenate([edge, tile[:, :-1]], 1)
  last = tile != jnp.concatenate([tile[:, 1:], edge], 1)
  code = code | jnp.where(first, FIRST, 0) | jnp.where(last, LAST, 0)
  code = jnp.where(idle, end, code)
  return Table(code.reshape(-1), jnp.max(steps), outer * inner, bits)
