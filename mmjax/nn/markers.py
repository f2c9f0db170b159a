"""Media that take one slot of the stream, a marker: who sees which item.

  stream       i  a  b  i  c | d  i  e      two documents, i = a marker
  item_order   0        3         1
  until        ~        ~         ~         of the marker: items in branches end there

The language model reads a word of its own at the markers, and looks at what an
encoder made of the items apart from the stream (Flamingo, late fusion).
"""

import dataclasses

import jax
import jax.numpy as jnp

from mmjax.batch import FOREVER, PLACEHOLDER, Bank, KeyTags, PackedBatch, Stream


def item_tags(stream: Stream, bank: Bank, kind: str) -> KeyTags:
  """Tags of the items, i32[B, I]; `until` is the marker's."""
  B, I = bank.item_order.shape
  until = jnp.full((B, I), FOREVER, jnp.int32)
  here = stream.tokens == PLACEHOLDER[kind]
  place = jnp.where(here, stream.source, I)  # I is outside, and dropped
  # By vmap the compiler knows that rows stay by themselves, where they are split.
  until = jax.vmap(lambda x, at, new: x.at[at].set(new, mode='drop'))(
    until, place, jnp.asarray(stream.until)
  )
  return KeyTags(jnp.asarray(bank.item_segments), jnp.asarray(bank.item_order), until)


def words(batch: PackedBatch, marker: int) -> PackedBatch:
  """What the language model reads: text, and its word for an item."""
  s = batch.stream
  tokens = jnp.where(s.tokens < 0, marker, s.tokens)
  return PackedBatch(dataclasses.replace(s, tokens=tokens), {})
