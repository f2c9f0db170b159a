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
