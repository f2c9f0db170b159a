"""Optimizers: who is trained, how fast, and with what decay, all by parameter path.

  update = -lr(step) * multiplier(path) * (direction(gradient) + decay * parameter)

The direction comes from optax. A frozen parameter is taken out of the tree before
the gradient is taken: no gradient, no optimizer memory, no change of a bit.
Patterns are those of the shell (`fnmatch`) on paths like 'layers/mlp/up'; one that
matches nothing is an error. AdamW: Loshchilov & Hutter 1711.05101; Adafactor:
Shazeer & Stern 1804.04235; Lion: Chen et al. 2302.06675; Muon: Jordan 2024, scaled as
by Liu et al. 2502.16982.

What is kept, per trained parameter, in bytes:

                        parameter  adamw  lion, sgd, muon  adafactor
  state_dtype float32       4        8           4         rows + columns
  state_dtype bfloat16      4        4           2         rows + columns

Parameters that are trained are float32: a bfloat16 one would lose every update below
1/512 of it. So `grad_dtype` bfloat16 trains in bfloat16 with a float32 master: the step
works on a cast copy (see `train.step`). Arithmetic of the optimizer is float32 always.
"""

import dataclasses
import fnmatch
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from mmjax.names import closest, pick
from mmjax.train.moments import stored

Schedule = Callable[[jax.Array], jax.Array]


def _adamw(names, *, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8):
  return optax.scale_by_adam(b1, b2, eps)


def _adafactor(
  names,
  *,
  decay_rate: float = 0.8,
  min_dim_size_to_factor: int = 128,
  clipping_threshold: float = 1.0,
  scale_by_parameter: bool = True,
):
  parts = [
    optax.scale_by_factored_rms(
      decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor
    ),
    optax.clip_by_block_rms(clipping_threshold),
  ]
  if scale_by_parameter:
    parts.append(optax.scale_by_param_block_rms())
  return optax.chain(*parts)


def _lion(names, *, b1: float = 0.9, b2: float = 0.99):
  return optax.scale_by_lion(b1, b2)


def _muon(
  names,
  *,
  momentum: float = 0.95,
  ns_steps: int = 5,
  rms: float = 0.2,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
):
  """Momentum, made orthogonal, for kernels of the layers; Adam for all others.

  An update has the root mean square `rms`, which is about Adam's, so that both
  kinds share learning rate and decay.
  """
  dims = jax.tree.map(_matrix, names, is_leaf=_is_spec)

  def over(tree, f):  # leaves that are frozen, or not Muon's, stay what they are
    def one(x, dim):
      return x if x is None or isinstance(x, optax.MaskedNode) else f(dim)

    return jax.tree.map(
      one, tree, dims, is_leaf=lambda x: x is None or isinstance(x, optax.MaskedNode)
    )

  def orthogonal(tree):
    return over(tree, lambda dim: dim)

  def labels(tree):
    return over(tree, lambda dim: 'adam' if dim is None else 'muon')

  def scale(updates, state, params=None):
    del params

    def one(x, dim):
      sides = (math.prod(x.shape[i] for i in axes) for axes in dim)
      return rms * math.sqrt(max(sides)) * x

    return jax.tree.map(one, updates, orthogonal(updates)), state

  matrices = optax.chain(
    optax.contrib.scale_by_muon(
      ns_steps=ns_steps, beta=momentum, weight_dimension_numbers=orthogonal
    ),
    optax.GradientTransformation(lambda _: optax.EmptyState(), scale),
  )
  return optax.partition(
    {'muon': matrices, 'adam': optax.scale_by_adam(b1, b2, eps)}, labels
  )


def _matrix(spec):
  """Which axes of a kernel are the two sides of a matrix; None if it is none.

  One side is the residual stream; what is stacked is many matrices. Tables of the
  vocabulary are none, nor are kernels that read pixels: Adam's, as usual.
  """
  names = list(spec)
  if 'embed' not in names or 'vocab' in names or 'patch' in names:
    return None
  stream = (names.index('embed'),)
  rest = [i for i, n in enumerate(names) if n not in ('embed', 'layers', 'experts')]
  return optax.contrib.MuonDimensionNumbers(stream, tuple(rest)) if rest else None


def _sgd(names, *, momentum: float = 0.9, nesterov: bool = False):
  return optax.trace(momentum, nesterov) if momentum else optax.identity()


DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
OPTIMIZERS = {
  'adamw': _adamw,
  'adafactor': _adafactor,
  'lion': _lion,
  'muon': _muon,
  'sgd': _sgd,
}


def _constant(peak, steps, final):
  return optax.constant_schedule(peak)


def _cosine(peak, steps, final):
  return optax.cosine_decay_schedule(peak, steps, final)


def _linear(peak, steps, final):
  return optax.linear_schedule(peak, peak * final, steps)


SCHEDULES = {
  'constant': _constant,
  'cosine': _cosine,
  'linear': _linear,
  'rsqrt': None,  # peak * sqrt(warmup / step): has no end, see `make_schedule`
}


def make_schedule(
  name: str, peak: float, steps: int, warmup_steps: int = 0, final_share: float = 0.0
) -> Schedule:
  """The learning rate as a function of the number of updates made.

  Args:
    name: 'constant', 'cosine', 'linear' or 'rsqrt'.
    peak: learning rate after the warm-up.
    steps: all steps, warm-up included; where the decay ends.
    warmup_steps: linear from 0; the first update already gets peak / warmup_steps.
    final_share: the end, as a share of the peak.

  Raises:
    ValueError: an unknown name, or a warm-up that leaves no steps to decay.
  """
  if name not in SCHEDULES:
    raise ValueError(f'unknown schedule {name!r}{closest(name, SCHEDULES)}')
  if name == 'rsqrt':
    origin = max(warmup_steps, 1)

    def after(count):
      return peak * jnp.sqrt(origin / (origin + jnp.maximum(count, 0.0)))

  elif name != 'constant' and warmup_steps >= steps:
    raise ValueError(f'schedule: warmup_steps = {warmup_steps} of {steps} steps')
  else:
    after = SCHEDULES[name](peak, steps - warmup_steps, final_share)

  def rate(count):
    count = jnp.asarray(count, jnp.float32)
    warm = peak * (count + 1) / max(warmup_steps, 1)
    return jnp.where(count < warmup_steps, warm, after(count - warmup_steps))

  return rate


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """How the parameters are updated.

  tx:       the optax transformation, for the trained part of the tree.
  schedule: learning rate by the number of updates.
  trained:  tree of bool, like the parameters; False = frozen.
  decayed:  tree of bool; True = weight decay.
  ema:      decay of the moving average of the trained parameters, or None.
  grad_dtype: of the parameters that the loss gets and of their gradients, as devices
    send them to each other; None = as they are kept.
  """

  tx: optax.GradientTransformation
  schedule: Schedule
  trained: Any
  decayed: Any
  ema: float | None = None
  grad_dtype: Any = None

  def split(self, params) -> tuple[Any, Any]:
    """(trained, frozen): both like params, with None at the other's leaves."""
    trained = jax.tree.map(lambda t, p: p if t else None, self.trained, params)
    frozen = jax.tree.map(lambda t, p: None if t else p, self.trained, params)
    return trained, frozen


def merge(first: Any, second: Any) -> Any:
  """Puts the two halves of `Optimizer.split` together; the first one goes before."""
  return jax.tree.map(
    lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None
  )


def build(
  params: Any,
  names: Any,
  *,
  name: str,
  learning_rate: float,
  steps: int,
  schedule: Mapping[str, Any] | None = None,
  weight_decay: float = 0.0,
  clip_norm: float | None = None,
  no_decay: Sequence[str] = (),
  multipliers: Sequence[tuple[str, float]] = (),
  freeze: Sequence[str] = (),
  ema: float | None = None,
  options: Mapping[str, Any] | None = None,
  state_dtype: str | None = None,
  grad_dtype: str | None = None,
) -> Optimizer:
  """Builds the optimizer of a tree of parameters.

  Args:
    params: the tree (arrays or shapes).
    names: the same tree of axis names (`sharding.axis_names`); by them the decay
      leaves out what is a vector per layer (norms, biases), however it is stacked.
    name: a key of `OPTIMIZERS`; `options` are its arguments.
    steps: steps of the run, the end of the decay unless schedule.decay_steps.
    state_dtype, grad_dtype: keys of `DTYPES`, or None; see the table above.
    others: see `config.defaults`.

  Raises:
    ValueError: an unknown name or option, a pattern that matches nothing, or a trained
      parameter of less than 32 bits.
  """
  kind = pick('optimizer', name, OPTIMIZERS)
  options = dict(options or {})
  allowed = list(inspect.signature(kind).parameters)[1:]
  for key in options:
    if key not in allowed:
      raise ValueError(f'optimizer {name!r} has no option {key!r}{closest(key, allowed)}')
  trained = jax.tree.map(lambda hit: not hit, match(params, freeze, 'optim.freeze'))
  if not any(jax.tree.leaves(trained)):
    raise ValueError(f'optim.freeze = {tuple(freeze)} freezes every parameter')
  _refuse_narrow(params, trained)
  state_dtype = state_dtype and pick('optim.state_dtype', state_dtype, DTYPES)
  grad_dtype = grad_dtype and pick('optim.grad_dtype', grad_dtype, DTYPES)
  plain = dict(schedule or {'name': 'constant'})
  rate = make_schedule(
    plain['name'],
    learning_rate,
    plain.get('decay_steps') or steps,
    plain.get('warmup_steps', 0),
    plain.get('final_share', 0.0),
  )
  decayed = decay_mask(params, names, no_decay)
  factors = _factors(params, multipliers)

  def live(tree):
    return jax.tree.map(lambda t, x: x if t else None, trained, tree)

  parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  direction = kind(names, **options)
  parts.append(stored(direction) if state_dtype == jnp.bfloat16 else direction)
  if weight_decay:
    parts.append(optax.add_decayed_weights(weight_decay, live(decayed)))
  if multipliers:
    parts.append(_scale_by(live(factors)))
  parts.append(optax.scale_by_learning_rate(rate))
  tx = _lenient(optax.chain(*parts))
  return Optimizer(tx, rate, trained, decayed, ema, grad_dtype)


def _refuse_narrow(params, trained):
  leaves = zip(paths(params), jax.tree.leaves(params), jax.tree.leaves(trained))
  for path, leaf, live in leaves:
    if live and jnp.dtype(leaf.dtype).itemsize < 4:
      raise ValueError(
        f'{path} is trained in {leaf.dtype}: updates would be lost; keep it in float32'
        " (param_dtype), with optim.grad_dtype='bfloat16' to compute and send less"
      )


def _lenient(tx):
  """Optax mixes dtypes of scalars, which a caller's strict promotion would refuse."""

  def update(updates, state, params=None):
    with jax.numpy_dtype_promotion('standard'):
      return tx.update(updates, state, params)

  return optax.GradientTransformation(tx.init, update)


def _is_spec(x) -> bool:
  return isinstance(x, PartitionSpec)


def by_path(tree: Any) -> dict[str, Any]:
  """{'a/b': leaf}; the same for a tree of any containers and for nested dicts."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def paths(tree: Any) -> list[str]:
  return list(by_path(tree))


def match(params: Any, patterns: Sequence[str], what: str) -> Any:
  """Tree of bool: which leaves' paths match any of the patterns.

  Raises:
    ValueError: a pattern matches no path; lists the paths.
  """
  every = paths(params)
  for pattern in patterns:
    if not fnmatch.filter(every, pattern):
      raise ValueError(
        f'{what}: {pattern!r} matches no parameter (there are: {", ".join(every)})'
      )
  hits = [any(fnmatch.fnmatchcase(p, q) for q in patterns) for p in every]
  return jax.tree.unflatten(jax.tree.structure(params), hits)


def decay_mask(params: Any, names: Any, no_decay: Sequence[str] = ()) -> Any:
  """Tree of bool: True = weight decay.

  Left out: leaves with fewer than two axes beside 'layers' (norms, gates), biases,
  embeddings (a 'vocab' axis first, beside 'layers'), and what `no_decay` matches.
  """
  named = match(params, no_decay, 'optim.no_decay')

  specs = jax.tree.leaves(names, is_leaf=_is_spec)

  def one(path, spec, hit):
    axes = [a for a in spec if a != 'layers']
    vector = len(axes) < 2 or 'bias' in path.rpartition('/')[2]
    return not (vector or axes[0] == 'vocab' or hit)

  flat = map(one, paths(params), specs, jax.tree.leaves(named))
  return jax.tree.unflatten(jax.tree.structure(params), flat)


def _factors(params, multipliers):
  match(params, [pattern for pattern, _ in multipliers], 'optim.multipliers')

  def one(path):
    hits = (f for pattern, f in multipliers if fnmatch.fnmatchcase(path, pattern))
    return next(hits, 1.0)

  return jax.tree.unflatten(jax.tree.structure(params), [one(p) for p in paths(params)])


def _scale_by(factors):
  def update(updates, state, params=None):
    del params
    return jax.tree.map(lambda f, u: f * u, factors, updates), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)
