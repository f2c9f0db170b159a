"""FLOPs of a function, counted in its jaxpr: products only, loops by their trips.

  x f[5, 3] @ w f[3, 7]        2 * 5 * 3 * 7
  scan of 4 of them            4 times that
  jax.grad                     what the backward pass really multiplies

A compiler's own count takes a loop's body once, and depends on the backend; this one
doesn't. Additions, exponentials and the like are left out, as in model FLOPs (PaLM,
2204.02311, appendix B). What is made anew under `jax.checkpoint` counts again.
"""

import math
from collections.abc import Callable
from typing import Any

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
