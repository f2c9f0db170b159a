"""What encoders of media return: tokens of items, and maybe one vector per item.

  bank      a a a a b b .        patches of two pictures a and b, padding
  values    a a a a b b .        a ViT: as many tokens as patches
            A A A A B B B B      a CNN: its grid for every item; items 1 and 2
  pooled    a b                  I = 2

Every encoder is a module with

  channels         C, values of a patch
  width            D, of the tokens
  grid(item)       the grid (time, rows, columns) of tokens it makes of an item
  __call__(bank)   Bank -> Features

and tokens stand item after item, in reading order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmjax.batch import Bank, PackedBatch


class Features(NamedTuple):
  """Tokens of a row's items.

  values:    f[B, P, D]
  items:     i32[B, P] which item of the row owns the token, from 1; 0 = padding
  positions: i32[B, P, 3] time, row, column inside the item
  pooled:    f[B, I, E], one vector per item, or None
  """

  values: jax.Array
  items: jax.Array
  positions: jax.Array
  pooled: jax.Array | None = None


def bank_of(batch: PackedBatch, media: tuple[tuple[str, int], ...]) -> Bank:
  """The bank of a model's one kind of media; one of padding if the batch has none.

  Args:
    media: ((kind, channels),).

  Raises:
    ValueError: the batch has media of another kind.
  """
  [(kind, channels)] = media
  for other in batch.bank:
    if other != kind:
      raise ValueError(f'batch has media {other!r}, the model looks at {kind!r}')
  if kind in batch.bank:
    return batch.bank[kind]
  B = len(batch.stream.tokens)
  zeros = jnp.zeros((B, 1), jnp.int32)
  values = jnp.zeros((B, 1, channels), jnp.uint8)
  return Bank(values, zeros, jnp.zeros((B, 1, 3), jnp.int32), zeros, zeros)
