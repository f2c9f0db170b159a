"""Projectors: from an encoder's tokens to what a language model takes in its stream.

  linear      P tokens of width C -> P of width D           PaliGemma, 2407.07726
  mlp         the same, through a hidden layer               LLaVA-1.5, 2310.03744
  pool        the mean of each s x s, then linear: P / s^2   Gemma 3, 2503.19786
  resampler   an item's tokens -> R of width D, R learned queries that look at them,
              as a Q-Former's do                             BLIP-2, 2301.12597

An item's tokens stay together and in order, so the k-th media slot of a row's stream
takes the k-th of its projected tokens.
"""

from typing import Any

import flax.linen as nn
import jax

from mmjax.names import closest
from mmjax.nn.dense import project
from mmjax.nn.features import Features
from mmjax.nn.resampler import Resampler
from mmjax.nn.transformer import ACTIVATIONS
from mmjax.ops.grid import pool_squares
from mmjax.sharding import constrain

Grid = tuple[int, int, int]


class Projector(nn.Module):
  """What the projectors share."""

  def slots(self, grid: Grid) -> Grid:
    """The grid of stream slots for an encoder's grid of tokens."""
    return grid


class LinearProjector(Projector):
  """One product and a bias."""

  dtype: Any = 'float32'
  param_dtype: Any = 'float32'

  @nn.compact
  def __call__(self, features: Features, num_items: int, width: int) -> jax.Array:
    """Tokens for the stream.

    Args:
      features: values f[B, P, C].
      num_items: I of the row, static.
      width: D of the language model, static.

    Returns:
      f[B, P, D]
    """
    x = features.values.astype(self.dtype)
    out = 'out', (width,), (None, 'embed')
    (y,) = project(self, x, [out], True, self.param_dtype)
    return constrain(y, 'batch', 'seq', 'act_embed')


class PoolProjector(Projector):
  """The mean of every side x side tokens, and a product with a bias.

  Fields: side: s; rows and columns of every item are multiples of it.
  """

  side: int = 4
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'

  def slots(self, grid: Grid) -> Grid:
    """As of `Projector`.

    Raises:
      ValueError: rows or columns that are no multiples of the side.
    """
    times, rows, columns = grid
    if rows % self.side or columns % self.side:
      raise ValueError(
        f'projector: {rows} x {columns} tokens have no whole squares of {self.side}'
      )
    return (times, rows // self.side, columns // self.side)

  @nn.compact
  def __call__(self, features: Features, num_items: int, width: int) -> jax.Array:
    """As `LinearProjector`, but f[B, P / s^2, D]."""
    pooled = pool_squares(
      features.values, features.items, features.positions, num_items, self.side
    )
    return LinearProjector(self.dtype, self.param_dtype, name='linear')(
      features._replace(values=pooled), num_items, width
    )


class MlpProjector(Projector):
  """act(x up + b) down + c.

  Fields: mlp_dim: width of the hidden layer, by default D; activation: see
    `nn.transformer.ACTIVATIONS`.
  """

  mlp_dim: int | None = None
  activation: str = 'gelu'
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'

  def __post_init__(self):
    super().__post_init__()
    if self.activation not in ACTIVATIONS:
      raise ValueError(
        f'projector: unknown activation {self.activation!r}'
        f'{closest(self.activation, ACTIVATIONS)}'
      )

  @nn.compact
  def __call__(self, features: Features, num_items: int, width: int) -> jax.Array:
    """As `LinearProjector`."""
    x = features.values.astype(self.dtype)
    up = 'up', (self.mlp_dim or width,), (None, 'mlp')
    (y,) = project(self, x, [up], True, self.param_dtype)
    y = ACTIVATIONS[self.activation](constrain(y, 'batch', 'seq', 'act_mlp'))
    down = 'down', (width,), ('mlp', 'embed')
    (y,) = project(self, y, [down], True, self.param_dtype)
    return constrain(y, 'batch', 'seq', 'act_embed')


class ResamplerProjector(Projector):
  """A `Resampler` and a product: R slots for every item, whatever its size."""

  resampler: Resampler
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'

  def slots(self, grid: Grid) -> Grid:
    return (1, 1, self.resampler.num_latents)

  @nn.compact
  def __call__(self, features: Features, num_items: int, width: int) -> jax.Array:
    """As `LinearProjector`, but f[B, I * R, D]."""
    times = features.positions[..., 0] if self.resampler.num_frames else None
    x = self.resampler(features.values, features.items, num_items, times)
    x = x.astype(self.dtype)
    out = 'out', (width,), (None, 'embed')
    (y,) = project(self, x, [out], True, self.param_dtype)
    return constrain(y, 'batch', 'seq', 'act_embed')
