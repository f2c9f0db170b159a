"""What a loop's body makes of parameters alone is made once, before the loop.

XLA moves some of it out of loops by itself, but nothing that only lays an array out
otherwise, which on a CPU is what costs.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal


def once(f: Callable[..., Any], known: Any, *rest: Any) -> Callable[..., Any]:
  """f(known, *rest) as a function of `rest`, what depends on `known` alone already made.

  Args:
    f: a pure function of trees of arrays.
    known: the same at every call.
    rest: examples of what changes, of the shapes that will come.
  """
  closed, shapes = jax.make_jaxpr(f, return_shape=True)(known, *rest)
  jaxpr, tree = closed.jaxpr, jax.tree.structure(shapes)
  leaves = jax.tree.leaves(known)
  made = dict(zip(jaxpr.invars, leaves))  # by variable
  consts = dict(zip(jaxpr.constvars, closed.consts))
  later = []
  for eqn in jaxpr.eqns:
    needs = [v for v in eqn.invars if not isinstance(v, Literal)]
    if needs and all(v in made for v in needs) and not eqn.effects:
      _run(eqn, made)
    else:
      later.append(eqn)

  def go_on(*rest):
    values = {**consts, **made}
    values |= zip(jaxpr.invars[len(leaves) :], jax.tree.leaves(rest), strict=True)
    for eqn in later:
      _run(eqn, values)
    return jax.tree.unflatten(tree, [_read(v, values) for v in jaxpr.outvars])

  return go_on


def _read(v, values):
  return v.val if isinstance(v, Literal) else values[v]


def _run(eqn, values):
  """Adds an equation's results to the values by variable."""
  inputs = [_read(v, values) for v in eqn.invars]
  with eqn.ctx.manager:
    made = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
  made = made if eqn.primitive.multiple_results else [made]
  values |= zip(eqn.outvars, made, strict=True)
