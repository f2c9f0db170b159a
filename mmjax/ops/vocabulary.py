"""Log-probabilities of single words, without the logits of all.

  log p(w) = x . W[w] - log_z        log_z = log sum_v exp(x . W[v])

The vocabulary is walked in blocks of words. The way there keeps, per token, running
statistics (as of online softmax, Milakov & Gimelshein 1805.02867); the way back makes
each block's logits anew and turns them at once into the gradient of the block's kernel,
which no other block adds to, and into a part of the hidden's:

  words     0 ......... V      blocks of words, over all tokens of a device
  logits    |####|....|...     [tokens, block] is all that exists, <= `limit` bytes
  d hidden  sum over blocks    [tokens, D], f32
  d kernel  |####|....|...     written once, added up over devices once

Where the words are split over devices ('act_vocab'), each device walks its own, and
statistics and hidden gradients are joined after the last block: logits never move. If
one block holds all words, its logits are kept for the way back.

A kernel whose width is split (fsdp) would be gathered whole by every device, twice, and
its gradient added up over all. Where those devices have far fewer places than there are
words, the places move instead: each device gets those of all, for its share of words.

  places    a | b | c | d      moved: a b c d, and back d hidden of each
  words     0 | 1 | 2 | 3      stay, once a kernel's pieces of width are pieces of words

Of places that no row uses most are left out: `ops.places`.
"""

import contextlib
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmjax.ops.linear import linear, rounded, turned
from mmjax.ops.places import compute_used
from mmjax.shape import check
from mmjax.sharding import changed, constrain, device, mesh_axes, one_cpu, parts

LIMIT = 2**28  # bytes of f32 logits that a device holds at one time
_CACHED = 2**24  # that a CPU walks without waiting for memory
_SIZES = (128, 125, 100, 64)  # of blocks of words, see `largest`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
  """What turns hidden states into logits.

  kernels:  f[D, V] or f[V, D] each; their words, one kernel's after the other's.
  axes:     the names of each kernel's axes; one is 'embed', the other of words.
  soft_cap: c * tanh(logits / c) (Gemma 2, 2408.00118), None = off.
  """

  kernels: tuple[jax.Array, ...]
  axes: tuple[tuple[str | None, str | None], ...] = dataclasses.field(
    metadata=dict(static=True)
  )
  soft_cap: float | None = dataclasses.field(default=None, metadata=dict(static=True))

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Those of all words, f[..., D] -> f32[..., V]."""
    made = []
    for kernel, axes in zip(self.kernels, self.axes):
      kernel = kernel if axes[0] == 'embed' else kernel.T
      made.append(linear(hidden, kernel, dtype=jnp.float32))
    logits = made[0] if len(made) == 1 else jnp.concatenate(made, -1)
    if logits.ndim == 3:
      logits = constrain(logits, 'batch', 'seq', 'act_vocab')
    return _cap(logits, self.soft_cap)


class LogProbs(NamedTuple):
  """Of each place: log_z f32[...]; right f32[...], the logit of its token; best i32[...],
  the first of the words with the largest logit."""

  log_z: jax.Array
  right: jax.Array
  best: jax.Array


def log_probs(
  hidden: jax.Array,
  head: Head,
  tokens: jax.Array,
  used: jax.Array | None = None,
  *,
  limit: int = LIMIT,
) -> LogProbs:
  """Softmax statistics of the words `tokens`; log_z and right have gradients.

  Args:
    hidden: f[B, K, D]
    head: of V words in all.
    tokens: i32[B, K] in 0..V-1.
    used: bool[B, K], default all. Others have 0 (best: -1), and no gradient; where the
      logits are too many to be kept, most of them aren't computed.
    limit: bytes of f32 logits that a device may hold at one time; at least one word of
      each of its tokens.

  Raises:
    ValueError: shapes that don't fit, limit < 1, or words that don't divide over the
      devices they are split over.
  """
  B, K, D = (check('B K D', hidden, 'B K', tokens)[x] for x in 'BKD')
  if limit < 1:
    raise ValueError(f'log_probs: limit must be at least 1 byte, got {limit}')
  for kernel, axes in zip(head.kernels, head.axes, strict=True):
    if axes.count('embed') != 1 or kernel.shape[axes.index('embed')] != D:
      raise ValueError(f'log_probs: a kernel {kernel.shape} of {axes} for width {D}')
    if kernel.size // D % _devices(axes):
      raise ValueError(
        f'log_probs: {kernel.size // D} words do not divide over {_devices(axes)} devices'
      )
  if used is None:
    return _of_rows(limit, hidden, head, tokens, None)
  check('B K', tokens, 'B K', used)
  made = _of_rows(limit, hidden, head, tokens, used)
  return LogProbs(*(jnp.where(used, x, none) for x, none in zip(made, (0.0, 0.0, -1))))


def _of_rows(limit, hidden, head, tokens, used):
  B, K, D = hidden.shape
  seq = parts('seq')
  limit = _of_block(limit, hidden, head)
  if seq == 1:  # products of whole matrices, see `ops.linear`
    flat = hidden.reshape(-1, D), head, tokens.reshape(-1)
    some = used is not None and _bytes(hidden, head) > limit
    made = (
      _stats_of_used(limit, *flat, used.reshape(-1)) if some else _stats(limit, *flat)
    )
    return LogProbs(*(x.reshape(B, K) for x in made))
  # Every device of the sequence takes a share of the places.
  fill = ((0, 0), (0, -K % seq))
  hidden, tokens = jnp.pad(hidden, (*fill, (0, 0))), jnp.pad(tokens, fill)
  hidden = constrain(hidden, 'batch', 'seq', None)
  return LogProbs(*(x[:, :K] for x in _stats(limit, hidden, head, tokens)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stats(limit, hidden, head, tokens):
  return _forward(limit, hidden, head, tokens)[0]


def _forward(limit, hidden, head, tokens):
  """hidden f[..., D], tokens i32[...] -> `LogProbs`, and what the way back needs."""
  lead = _lead(hidden)
  with _meeting(limit, hidden, head):
    out, kept = _walk(
      limit, constrain(hidden, *lead, None), head, constrain(tokens, *lead)
    )
  return LogProbs(*(constrain(x, *lead) for x in out)), (
    hidden,
    head,
    tokens,
    out.log_z,
    kept,
  )


def _walk(limit, hidden, head, tokens):
  found, kept, first = [], [], 0
  for kernel, axes in zip(head.kernels, head.axes):
    part = _Part(limit, hidden, kernel, axes, head.soft_cap)
    zeros = jnp.zeros((*tokens.shape, part.devices), jnp.float32)
    start = zeros - jnp.inf, zeros, zeros, jnp.full(zeros.shape, -1, jnp.int32)
    logits = part.logits(0, part.size) if part.size == part.words else None
    kept.append(logits)
    stats = part.walk(functools.partial(_fold, part, logits, tokens, first), start)
    found.append(_join(*stats))
    first += part.devices * part.words
  top, total, right, best = _join(
    *map(functools.partial(jnp.concatenate, axis=-1), zip(*found))
  )
  log_z = (top + jnp.log(total))[..., 0]
  return LogProbs(log_z, right[..., 0], best[..., 0]), tuple(kept)


def _backward(limit, residuals, cotangents):
  hidden, head, tokens, log_z, kept = residuals
  lead, cotangents = _lead(hidden), cotangents[:2]
  with _meeting(limit, hidden, head):
    moved = (constrain(x, *lead) for x in (tokens, log_z, *cotangents))
    d_hidden, d_kernels = _walk_back(
      limit, constrain(hidden, *lead, None), head, kept, *moved
    )
  d_hidden = constrain(d_hidden, *lead, None).astype(hidden.dtype)
  d_kernels = (constrain(d, *axes) for d, axes in zip(d_kernels, head.axes))
  return d_hidden, dataclasses.replace(head, kernels=tuple(d_kernels)), None


def _walk_back(limit, hidden, head, kept, tokens, log_z, d_log_z, d_right):
  d_hidden, d_kernels, first = jnp.zeros(hidden.shape, jnp.float32), [], 0
  for kernel, axes, logits in zip(head.kernels, head.axes, kept):
    part = _Part(limit, hidden, kernel, axes, head.soft_cap)

    def step(carry, i, size, part=part, logits=logits, first=first):
      d_hidden, d_kernel = carry
      x = part.logits(i, size) if logits is None else logits
      right = part.ids(i, size, first) == tokens[..., None, None]
      d = d_log_z[..., None, None] * jnp.exp(x - log_z[..., None, None])
      d = d + jnp.where(right, d_right[..., None, None], 0.0)
      if head.soft_cap is not None:
        d = d * (1 - jnp.square(x / head.soft_cap))
      d = rounded(d, hidden.dtype)
      d_hidden = d_hidden + part.to_hidden(d, i, size)
      return d_hidden, part.put(d_kernel, part.to_kernel(d), i)

    mine = jnp.zeros((*tokens.shape, part.devices, hidden.shape[-1]), jnp.float32)
    mine, d_kernel = part.walk(step, (mine, part.split(jnp.zeros_like(kernel))))
    # What devices add up is sent as narrow as the hidden states are.
    mine = mine.astype(hidden.dtype)
    zero = jnp.zeros((), mine.dtype)
    mine = jax.lax.reduce(mine, zero, jax.lax.add, (mine.ndim - 2,))
    d_hidden = d_hidden + mine.astype(jnp.float32)
    d_kernels.append(d_kernel.reshape(kernel.shape))
    first += part.devices * part.words
  return d_hidden, d_kernels


_stats.defvjp(_forward, _backward)


def _of_block(limit, hidden, head):
  """Bytes of the logits of a block. A CPU's fit into its caches, and are made anew for
  the way back, unless float32 ones of all words may be kept: those products are slow."""
  kept = hidden.dtype == jnp.float32 and _bytes(hidden, head) <= limit
  return limit if device()[0] != 'cpu' or kept else min(limit, _CACHED)


def _bytes(hidden, head):
  """Of a device's logits, f32, of all words of the largest kernel."""
  B, K, D = hidden.shape
  words = (k.size // D // _devices(a) for k, a in zip(head.kernels, head.axes))
  return 4 * max(words) * B * K // (parts('batch') * parts('seq'))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stats_of_used(limit, hidden, head, tokens, used):
  """`_stats` of the places f[X, D], i32[X], bool[X] that are used; of others anything."""
  return _forward_of_used(limit, hidden, head, tokens, used)[0]


def _forward_of_used(limit, hidden, head, tokens, used):
  def run(few):
    made, _ = _forward(limit, few.pick(hidden), head, few.pick(tokens))
    return LogProbs(*map(few.put, made))

  made = compute_used(run, used)
  return made, (hidden, head, tokens, used, made.log_z)


def _backward_of_used(limit, residuals, cotangents):
  hidden, head, tokens, used, log_z = residuals

  def run(few):
    kept = (None,) * len(head.kernels)
    picked = few.pick(hidden), head, few.pick(tokens), few.pick(log_z), kept
    d_hidden, d_head, _ = _backward(limit, picked, [few.pick(c) for c in cotangents[:2]])
    return jnp.where(used[:, None], few.put(d_hidden), 0), d_head

  return *compute_used(run, used), None, None


_stats_of_used.defvjp(_forward_of_used, _backward_of_used)


def _lead(hidden):
  return ('batch', 'seq')[: hidden.ndim - 1]


def _meeting(limit, hidden, head):
  """The rules under which places and words meet: those in use, or those of above."""
  rows, width, words = (mesh_axes(x) for x in ('batch', 'embed', 'act_vocab'))
  others = rows[: len(rows) - len(width)]
  if not width or rows[len(others) :] != width:
    return contextlib.nullcontext()
  stay = dict(batch=others, act_vocab=words + width, embed=None)
  with changed(**stay):
    places = math.prod(hidden.shape[:-1]) // math.prod(map(parts, _lead(hidden)))
    devices = parts('act_vocab')
  fewer = 4 * places * hidden.shape[-1] <= limit  # their gradient's bytes
  for kernel, axes in zip(head.kernels, head.axes):
    V = kernel.size // hidden.shape[-1]
    # A quarter, since what moves is wider: the places' gradient is f32, and the kernel's
    # pieces change from width to words and back.
    fewer &= 4 * places <= V // parts('act_vocab')
    fewer &= 'vocab' in axes and V % devices == 0
  return changed(**stay) if fewer else contextlib.nullcontext()


class _Part:
  """One kernel of a head: its blocks and products.

  Letters: X = the places' axes, Q = devices the words are split over, V = words of a
  block on one of them, D = width. Kernels become [Q, V, D] or [D, Q, V].
  """

  def __init__(self, limit, hidden, kernel, axes, soft_cap):
    self.hidden, self.soft_cap, self.dtype = hidden, soft_cap, kernel.dtype
    self.devices = _devices(axes)
    self.words = kernel.size // hidden.shape[-1] // self.devices
    self.name = 'act_vocab' if self.devices > 1 else None
    self.first = axes[0] != 'embed'  # the words' axis is
    self.lead = ('batch', 'seq')[: hidden.ndim - 1]
    self.spec = 'QVD' if self.first else 'DQV'
    self.axis = self.spec.index('V')
    places = math.prod(hidden.shape[:-1])
    places //= math.prod(map(parts, self.lead))
    most = max(limit // (4 * places), 1)
    size = math.ceil(self.words / math.ceil(self.words / most))
    # Whole lanes of a TPU, unless all fits at once.
    self.size = (
      size
      if size == self.words or most < 128
      else min(math.ceil(size / 128) * 128, most // 128 * 128)
    )
    self.kernel = self.split(kernel)

  def split(self, kernel):
    D, Q, V = self.hidden.shape[-1], self.devices, self.words
    kernel = kernel.reshape((Q, V, D) if self.first else (D, Q, V))
    return constrain(kernel, *self._names('embed'))

  def _names(self, embed):
    return tuple({'Q': self.name, 'V': None, 'D': embed}[x] for x in self.spec)

  def block(self, i, size):
    """Words i, i + 1, ... of every device, [D, Q, V], whole in D.

    What devices gather of a table [V, D] is turned first: pieces of the last axis would
    be turned afterwards, all of them on every device.
    """
    block = jax.lax.dynamic_slice_in_dim(self.kernel, i, size, self.axis)
    block = constrain(block, *self._names('embed')).astype(self.hidden.dtype)
    if self.first:
      block = constrain(jnp.moveaxis(block, -1, 0), 'embed', self.name, None)
    return constrain(block, None, self.name, None)

  def put(self, d_kernel, block, i):
    block = constrain(block.astype(d_kernel.dtype), 'embed', self.name, None)
    if self.first:
      block = constrain(jnp.moveaxis(block, 0, -1), *self._names('embed'))
    return jax.lax.dynamic_update_slice_in_dim(d_kernel, block, i, self.axis)

  def ids(self, i, size, first):
    """i32[1.., Q, V]: which word each entry of a block's logits is of."""
    device = jnp.arange(self.devices, dtype=jnp.int32)[:, None]
    ids = first + device * self.words + i + jnp.arange(size, dtype=jnp.int32)[None]
    return ids.reshape((1,) * (self.hidden.ndim - 1) + ids.shape)

  def right(self, logits, tokens, i, first):
    """f32[..., Q]: the logit of each token; 0 where another block or device has it."""
    size = logits.shape[-1]
    if self.devices > 1 or device()[0] != 'cpu':
      here = self.ids(i, size, first) == tokens[..., None, None]
      return jnp.sum(jnp.where(here, logits, 0.0), -1)
    # A CPU would write all of what that adds up.
    j = tokens[..., None] - first - i
    found = jnp.take_along_axis(logits, jnp.clip(j, 0, size - 1)[..., None], -1)[..., 0]
    return jnp.where((j >= 0) & (j < size), found, 0.0)

  def logits(self, i, size):
    """f32[..., Q, V]"""
    block = self.block(i, size)
    y = self._einsum('XD', self.hidden, 'DQV', block, 'XQV', jnp.float32)
    y = constrain(y, *self.lead, self.name, None)
    return _cap(y, self.soft_cap)

  def to_hidden(self, d, i, size):
    """f32[..., Q, D]: every device's own part, not yet added up."""
    block = self.block(i, size)
    y = self._einsum('XQV', d, 'DQV', block, 'XQD', jnp.float32)
    return constrain(y, *self.lead, self.name, None)

  def to_kernel(self, d):
    # In the kernel's precision, so that this is what devices send each other.
    dtype = max(self.dtype, self.hidden.dtype, key=lambda dtype: dtype.itemsize)
    if device()[0] == 'cpu' and self.hidden.dtype != jnp.float32:
      hidden = turned(self.hidden, self.hidden.ndim - 1)  # see `ops.linear`
      return self._einsum('DX', hidden, 'XQV', d, 'DQV', jnp.float32)
    return self._einsum('XD', self.hidden, 'XQV', d, 'DQV', dtype)

  def _einsum(self, a, x, b, y, out, dtype):
    lead = 'BK'[: self.hidden.ndim - 1]
    spec = f'{a},{b}->{out}'.replace('X', lead)
    if self.devices > 1:
      return jnp.einsum(spec, x, y, preferred_element_type=dtype)
    # Without the axis of one: XLA would make a batch of it, in an order in which a CPU
    # first turns the gradient of the logits.
    a, b, kept = (z.replace('X', lead) for z in (a, b, out))
    x, y = (z.squeeze(k.find('Q')) if 'Q' in k else z for k, z in ((a, x), (b, y)))
    made = jnp.einsum(spec.replace('Q', ''), x, y, preferred_element_type=dtype)
    return jnp.expand_dims(made, kept.find('Q'))

  def walk(self, step, carry):
    """step(carry, first word, words) over all blocks; the last may be smaller."""
    whole, rest = divmod(self.words, self.size)
    if whole == 1:
      carry = step(carry, 0, self.size)
    else:
      starts = jnp.arange(whole, dtype=jnp.int32) * self.size
      carry, _ = jax.lax.scan(lambda c, i: (step(c, i, self.size), None), carry, starts)
    return step(carry, whole * self.size, rest) if rest else carry


def _devices(axes) -> int:
  return parts('act_vocab') if 'vocab' in axes else 1


def _cap(logits, soft_cap):
  return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def largest(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The largest of f[..., V] and the first place that has it, f[...] and i32[...].

  Where one is NaN, any place or V.

  In plain reductions, as argmax is one slow loop on a CPU. There those of blocks are made
  first: the places of all, which would be written, are then asked for in one block alone.
  """
  V = logits.shape[-1]
  size = next((n for n in _SIZES if V % n == 0), None)
  if size is None or not one_cpu():
    return _largest(logits)
  blocks = logits.reshape(*logits.shape[:-1], V // size, size)
  high, block = _largest(jnp.max(blocks, -1))
  block = jnp.minimum(block, V // size - 1)
  _, place = _largest(jnp.take_along_axis(blocks, block[..., None, None], -2)[..., 0, :])
  return high, block * size + place


def _largest(logits):
  V = logits.shape[-1]
  high = jnp.max(logits, -1)
  places = jnp.arange(V, dtype=jnp.int32).reshape((1,) * (logits.ndim - 1) + (V,))
  return high, jnp.min(jnp.where(logits == high[..., None], places, V), -1)


def _fold(part, kept, tokens, first, stats, i, size):
  """Statistics f32[..., Q] with those of one more block of words."""
  top, total, right, best = stats
  logits = part.logits(i, size) if kept is None else kept
  high, place = largest(logits)
  found = part.ids(i, size, first)[..., 0] + place
  new = jnp.maximum(top, high)
  total = total * jnp.exp(top - new) + jnp.sum(jnp.exp(logits - new[..., None]), -1)
  right = right + part.right(logits, tokens, i, first)
  return new, total, right, jnp.where(high > top, found, best)


def _join(top, total, right, best):
  """[..., Q] statistics of words side by side -> [..., 1]."""
  high = jnp.max(top, -1, keepdims=True)
  total = jnp.sum(total * jnp.exp(top - high), -1, keepdims=True)
  never = jnp.iinfo(jnp.int32).max
  best = jnp.min(jnp.where(top == high, best, never), -1, keepdims=True)
  return high, total, jnp.sum(right, -1, keepdims=True), best
