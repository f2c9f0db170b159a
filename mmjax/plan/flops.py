"""FLOPs of a function, counted in its jaxpr: products only, loops by their trips.

  x f[5, 3] @ w f[3, 7]        2 * 5 * 3 * 7
  scan of 4 of them            4 times that
  jax.grad                     what the backward pass really multiplies

A compiler's own count takes a loop's body once, and depends on the backend; this one
doesn't. Additions, exponentials and the like are left out, as in model FLOPs (PaLM,
2204.02311, appendix B). What is made anew under `jax.checkpoint` counts again.

`model_flops` counts what a training step is for, whatever the program repeats: each
product of the forward pass, and once more for each of its sides that the gradient has
to pass (6 x weights x tokens, if all is trained; a frozen encoder counts 2 x):

  x @ w     x from data: 2 times, w trained;  x from trained layers: 3 times
  q @ k     both of trained layers: 3 times, half of that where attention is causal
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core


def flops(fn: Callable, *args: Any, **kwargs: Any) -> int:
  """FLOPs of the products in `fn(*args)`, over all devices.

  Args:
    fn: a function of arrays; nothing is computed.
    *args, **kwargs: arrays or `jax.ShapeDtypeStruct`s.

  Raises:
    ValueError: a loop whose number of trips isn't known.
  """
  return _count(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr)


def _count(jaxpr: Any) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    if name == 'dot_general':
      total += _dot(eqn)
    elif name == 'conv_general_dilated':
      total += _conv(eqn)
    elif name == 'scan':
      total += params['length'] * _count(params['jaxpr'].jaxpr)
    elif name == 'cond':
      total += max(_count(branch.jaxpr) for branch in params['branches'])
    elif name == 'while':
      inside = sum(_count(params[k].jaxpr) for k in ('cond_jaxpr', 'body_jaxpr'))
      if inside:
        raise ValueError('flops: products in a while loop, whose trips are not known')
    elif name == 'shard_map':  # its shapes are those of one device
      total += params['mesh'].size * _count(params['jaxpr'])
    else:
      total += sum(_count(inner) for inner in _inside(params))
  return total


def _inside(params: dict[str, Any]):
  """The jaxprs that a primitive calls once: jit, checkpoint, custom derivatives."""
  for value in params.values():
    if isinstance(value, core.ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
      yield value


def _dot(eqn: Any) -> int:
  (contracted, _), _ = eqn.params['dimension_numbers']
  left = eqn.invars[0].aval.shape
  return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _conv(eqn: Any) -> int:
  """Each output is a product with the kernel's window over its group's inputs."""
  kernel = eqn.invars[1].aval.shape
  _, inputs, *window = eqn.params['dimension_numbers'].rhs_spec
  size = kernel[inputs] * math.prod(kernel[i] for i in window)
  return 2 * math.prod(eqn.outvars[0].aval.shape) * size


class _From(NamedTuple):
  """What a value depends on: parameters that are trained, the batch."""

  trained: bool = False
  data: bool = False

  def __or__(self, other: '_From') -> '_From':
    return _From(self.trained or other.trained, self.data or other.data)


def model_flops(
  loss_fn: Callable, params: Any, trained: Any, batch: Any, causal: Sequence[str] = ()
) -> int:
  """FLOPs that one step needs, over all devices, as model FLOPs utilisation has them.

  Args:
    loss_fn: (params, batch) -> scalars; nothing is computed.
    params, batch: trees of shapes.
    trained: tree of bool like params.
    causal: paths of modules, e.g. 'lm/transformer', whose products of two activations
      count half.

  Raises:
    ValueError: a loop whose number of trips isn't known.
  """
  closed = jax.make_jaxpr(loss_fn)(params, batch)
  tags = [_From(trained=bool(t)) for t in jax.tree.leaves(trained)]
  tags += [_From(data=True)] * len(jax.tree.leaves(batch))
  return _needed(closed.jaxpr, tags, '', tuple(causal))[0]


def _needed(jaxpr, tags, path, causal):
  """(FLOPs, what the outputs are from) of a jaxpr whose inputs are from `tags`."""
  known = dict(zip(jaxpr.invars, tags, strict=True))
  total = 0

  def of(atom):
    return known.get(atom, _From()) if isinstance(atom, core.Var) else _From()

  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    ins = [of(a) for a in eqn.invars]
    here = f'{path}/{eqn.source_info.name_stack}'
    every = functools.reduce(_From.__or__, ins, _From())
    outs = [every] * len(eqn.outvars)
    if name in ('dot_general', 'conv_general_dilated'):
      left, right = ins
      cost = _dot(eqn) if name == 'dot_general' else _conv(eqn)
      cost *= 1 + left.trained + right.trained
      both = left.data and right.data
      half = both and any(f'/{where}/' in f'{here}/' for where in causal)
      total += cost // 2 if half else cost
    elif name == 'scan':
      count, outs = _needed_scan(params, ins, here, causal)
      total += params['length'] * count
    elif name == 'cond':
      made = [_needed(b.jaxpr, ins[1:], here, causal) for b in params['branches']]
      total += max(count for count, _ in made)
    elif name == 'while':
      if sum(_count(params[k].jaxpr) for k in ('cond_jaxpr', 'body_jaxpr')):
        raise ValueError('flops: products in a while loop, whose trips are not known')
    elif (inner := next(_inside(params), None)) and len(inner.invars) == len(ins):
      ways = params['mesh'].size if name == 'shard_map' else 1
      count, outs = _needed(inner, ins, here, causal)
      total += ways * count
    for var, tag in zip(eqn.outvars, outs, strict=True):
      real = jax.numpy.issubdtype(var.aval.dtype, jax.numpy.floating)
      known[var] = _From(tag.trained and real, tag.data)
  return total, [of(a) for a in jaxpr.outvars]


def _needed_scan(params, ins, path, causal):
  """As `_needed`, of one trip; what goes round is from all that it ever was from."""
  constants, carried = params['num_consts'], params['num_carry']
  ins = list(ins)
  while True:
    count, outs = _needed(params['jaxpr'].jaxpr, ins, path, causal)
    grown = [a | b for a, b in zip(ins[constants:], outs[:carried])]
    if grown == ins[constants : constants + carried]:
      return count, outs
    ins[constants : constants + carried] = grown
