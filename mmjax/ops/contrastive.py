"""Contrastive losses over all pairs of the global batch, none of them held at once.

  infonce   x_i against all y_j, and y_j against all x_i    (CLIP, 2103.00020)
  sigmoid   each (i, j) alone: a pair or not a pair         (SigLIP, 2303.15343)

Each device keeps its own x. The y travel round the ring of devices, and what is
summed up over them (the normaliser of each y; in the backward pass its gradient)
travels with them, so that after one round all are home:

  device   0       1       2           logits[i, j] = scale * x_i . y_j + bias
  round 0  x0 y0   x1 y1   x2 y2
  round 1  x0 y2   x1 y0   x2 y1       of which a device holds, at one time,
  round 2  x0 y1   x1 y2   x2 y0       [its rows, `chunk`]

Normalisers are kept as running maximum and sum (Milakov & Gimelshein, 1805.02867).
The gradient is written out below, one more round of the ring from the normalisers;
so its memory is that of the loss. On one device the ring has one place.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mmjax import sharding
from mmjax.names import closest
from mmjax.shape import check

LOSSES = ('infonce', 'sigmoid')
_LOW = -1e30  # of logits that don't count: finite, so that no difference is NaN


class Stats(NamedTuple):
  """The running log-sum-exp of rows, `peak` + log(`total`), and what is beside it.

  peak, total: f32[n]
  own:  f32[n] the logit of the pair itself
  best: f32[n] the largest of the other logits
  """

  peak: jax.Array
  total: jax.Array
  own: jax.Array
  best: jax.Array

  @property
  def log_z(self) -> jax.Array:
    return self.peak + jnp.log(jnp.maximum(self.total, 1e-30))


class Block(NamedTuple):
  """One side of some pairs: values f32[n, E], weights f32[n], groups and index i32[n]."""

  values: jax.Array
  weights: jax.Array
  groups: jax.Array
  index: jax.Array


def contrastive_loss(
  x: jax.Array,
  y: jax.Array,
  weights: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  *,
  loss: str = 'infonce',
  groups: jax.Array | None = None,
  chunk: int = 1024,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
  """Sum over the pairs of weight * loss.

  Args:
    x, y: f[N, E], the two sides of N pairs, normalised by the caller. Inside of
      `sharding.use` the N pairs are split as the rows of a batch are.
    weights: f[N]; 0 = no pair, which is no negative either.
    scale, bias: f32[], see the picture. (InfoNCE's value doesn't depend on the bias.)
    loss: one of `LOSSES`. 'infonce' is the mean of both directions; 'sigmoid' sums,
      for each x, over all y.
    groups: i32[N]; other pairs of the same group are no negatives. None = all are.
    chunk: most y that a device holds logits of at one time.

  Returns:
    (loss, weight, sums): f32 scalars over the whole batch; weight is the sum of the
    weights. sums holds 'x_to_y' and 'y_to_x', the weights of those whose own
    partner has a larger logit than every other (ties don't count).

  Raises:
    ValueError: an unknown loss, shapes that don't fit, chunk < 1, or pairs that
      don't divide over the mesh.
  """
  if loss not in LOSSES:
    raise ValueError(f'unknown contrastive loss {loss!r}{closest(loss, LOSSES)}')
  N = check('N E', x, 'N E', y, 'N', weights)['N']
  axes = sharding.mesh_axes('batch')
  ways = sharding.parts('batch')
  if chunk < 1 or N % ways:
    raise ValueError(
      f'contrastive_loss: {N} pairs over {ways} devices in chunks of {chunk}; they must'
      ' divide, and chunks be >= 1'
    )
  groups = jnp.arange(N, dtype=jnp.int32) if groups is None else groups
  f32 = jnp.float32
  args = (x.astype(f32), y.astype(f32), weights.astype(f32), groups)
  scalars = scale.astype(f32), bias.astype(f32)
  total, sums = _loss((loss, axes, chunk), *args, *scalars)
  return total, jnp.sum(args[2]), sums


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(how, x, y, weights, groups, scale, bias):
  return _forward(how, x, y, weights, groups, scale, bias)[0]


def _forward(how, x, y, weights, groups, scale, bias):
  args = (x, y, weights, groups, scale, bias)
  total, sums, *log_z = _over_devices(how, _forward_ring, args, (P(), P(), 0, 0))
  return (total, sums), (*args, *log_z)


def _backward(how, kept, cotangents):
  out = (0, 0, P(), P())
  dx, dy, dscale, dbias = _over_devices(how, _backward_ring, (*kept, cotangents[0]), out)
  return dx, dy, None, None, dscale, dbias


_loss.defvjp(_forward, _backward)


def _over_devices(how, run, args, out):
  """run(how, *args) with arrays split over the devices; `out`: 0 = split, P() = whole."""
  axes = how[1]
  if not axes:
    return run(how, *args)
  split = P(axes)
  in_specs = tuple(P() if a.ndim == 0 else split for a in args)
  out_specs = tuple(split if o == 0 else o for o in out)
  run = functools.partial(run, how)
  return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)(
    *args
  )


def _index(how, n):
  """The places of this device's pairs in the whole batch, i32[n]."""
  axes = how[1]
  first = jax.lax.axis_index(axes) * n if axes else 0
  return first + jnp.arange(n, dtype=jnp.int32)


def _sum(how, x):
  return jax.lax.psum(x, how[1]) if how[1] else x


def _ring(how, visit, mine, travel):
  """Folds mine = visit(mine, piece) over all pieces of all devices' `travel`.

  visit gives (mine, piece): what it changes of a piece travels on, and comes home.
  Pieces have at most `chunk` columns; what fills the last one has weight 0. On a mesh of
  several axes it is a ring of rings, the last axis innermost: so between slices, which
  are the first, pieces go once for all the rounds inside of them.
  """
  _, axes, chunk = how
  n = jax.tree.leaves(travel)[0].shape[0]
  count = math.ceil(n / chunk)
  size = math.ceil(n / count)

  def cut(a):
    a = jnp.pad(a, [(0, count * size - n)] + [(0, 0)] * (a.ndim - 1))
    return a.reshape(count, size, *a.shape[1:])

  def rounds(carry, axes):
    if not axes:
      return jax.lax.scan(visit, *carry)
    axis, ways = axes[0], jax.lax.axis_size(axes[0])
    onward = [(i, (i + 1) % ways) for i in range(ways)]

    def one_round(carry, _):
      mine, travel = rounds(carry, axes[1:])
      return (mine, jax.lax.ppermute(travel, axis, onward)), None

    return jax.lax.scan(one_round, carry, None, length=ways)[0]

  mine, travel = rounds((mine, jax.tree.map(cut, travel)), axes)
  return mine, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], travel)


def _product(equation, a, b):
  # In full float32 also where the default is less (TPU); it is little beside the towers.
  return jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST)


def _chunk_logits(a: Block, b: Block, scale, bias):
  """(cosines, logits, same pair?, does it count?), each [n, m]."""
  cosines = _product('nE,mE->nm', a.values, b.values)
  same = a.index[:, None] == b.index[None]
  other = a.groups[:, None] != b.groups[None]
  real = (a.weights > 0)[:, None] & (b.weights > 0)[None]
  return cosines, scale * cosines + bias, same, real & (same | other)


def _update(stats: Stats, logits, same, counts, axis) -> Stats:
  """The statistics with more logits, which are reduced over `axis`."""
  logits = jnp.where(counts, logits, _LOW)
  peak = jnp.maximum(stats.peak, jnp.max(logits, axis))
  grown = jnp.exp(logits - jnp.expand_dims(peak, axis))
  added = jnp.sum(jnp.where(counts, grown, 0.0), axis)
  return Stats(
    peak,
    stats.total * jnp.exp(stats.peak - peak) + added,
    stats.own + jnp.sum(jnp.where(same & counts, logits, 0.0), axis),
    jnp.maximum(stats.best, jnp.max(jnp.where(same, _LOW, logits), axis)),
  )


def _no_stats(n) -> Stats:
  zeros = jnp.zeros(n, jnp.float32)
  return Stats(zeros + _LOW, zeros, zeros, zeros + _LOW)


def _forward_ring(how, x, y, weights, groups, scale, bias):
  n = len(x)
  index = _index(how, n)
  mine = Block(x, weights, groups, index)

  def visit(carry, piece):
    rows, total = carry
    block, columns = piece
    _, logits, same, counts = _chunk_logits(mine, block, scale, bias)
    rows = _update(rows, logits, same, counts, 1)
    columns = _update(columns, logits, same, counts, 0)
    if how[0] == 'sigmoid':
      sign = jnp.where(same, 1.0, -1.0).astype(logits.dtype)
      terms = jnp.where(counts, jax.nn.softplus(-sign * logits), 0.0)
      total = total + jnp.sum(weights * jnp.sum(terms, 1))
    return (rows, total), (block, columns)

  start = (_no_stats(n), jnp.zeros((), jnp.float32))
  travel = (Block(y, weights, groups, index), _no_stats(n))
  (rows, total), (_, columns) = _ring(how, visit, start, travel)
  if how[0] == 'infonce':
    losses = (rows.log_z - rows.own + columns.log_z - columns.own) / 2
    total = jnp.sum(jnp.where(weights > 0, weights * losses, 0.0))
  right = [jnp.sum(jnp.where(s.own > s.best, weights, 0.0)) for s in (rows, columns)]
  sums = {'x_to_y': _sum(how, right[0]), 'y_to_x': _sum(how, right[1])}
  return _sum(how, total), sums, rows.log_z, columns.log_z


def _backward_ring(how, x, y, weights, groups, scale, bias, row_z, column_z, cotangent):
  index = _index(how, len(x))
  mine = Block(x, weights, groups, index)

  def visit(carry, piece):
    dx, dscale, dbias = carry
    block, log_z, dy = piece
    cosines, logits, same, counts = _chunk_logits(mine, block, scale, bias)
    one = jnp.where(same, 1.0, 0.0).astype(logits.dtype)
    if how[0] == 'infonce':
      by_row = weights[:, None] * (jnp.exp(logits - row_z[:, None]) - one)
      by_column = block.weights[None] * (jnp.exp(logits - log_z[None]) - one)
      slope = (by_row + by_column) / 2
    else:
      slope = weights[:, None] * (jax.nn.sigmoid(logits) - one)
    slope = jnp.where(counts, cotangent * slope, 0.0)
    dx = dx + scale * _product('nm,mE->nE', slope, block.values)
    dy = dy + scale * _product('nm,nE->mE', slope, x)
    carry = dx, dscale + jnp.sum(slope * cosines), dbias + jnp.sum(slope)
    return carry, (block, log_z, dy)

  zero = jnp.zeros((), jnp.float32)
  start = (jnp.zeros_like(x), zero, zero)
  travel = (Block(y, weights, groups, index), column_z, jnp.zeros_like(y))
  (dx, dscale, dbias), (_, _, dy) = _ring(how, visit, start, travel)
  return dx, dy, _sum(how, dscale), _sum(how, dbias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def clipped_exp(log_scale: jax.Array, most: float) -> jax.Array:
  """exp(log_scale), at most `most` (CLIP, section 2.5: 100), f32[].

  Beyond the bound the gradient still passes where a step against it leads back, so
  that the parameter is neither stuck there nor driven further.
  """
  return jnp.minimum(jnp.exp(log_scale.astype(jnp.float32)), most)


def _clipped_exp(log_scale, most):
  value = clipped_exp(log_scale, most)
  return value, (value, log_scale)


def _clipped_exp_back(most, kept, g):
  value, log_scale = kept
  g = jnp.where((value >= most) & (g < 0), 0.0, g * value)
  return (g.astype(log_scale.dtype),)


clipped_exp.defvjp(_clipped_exp, _clipped_exp_back)
