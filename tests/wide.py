"""mmjax in float64, to tell rounding from leaks.

Logits, softmax, norms, rotations and losses are pinned to float32 in the code, so a
model with dtype='float64' alone still rounds to 1e-7. Here the pins are moved: where
the code says `jnp.float32` it gets float64, and what then differs by more than 1e-12
is no rounding.
"""

import contextlib
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

_ROOMS = ('mmjax.ops', 'mmjax.nn', 'mmjax.models', 'mmjax.generate')


class _Wide:
  """`jax.numpy`, but for one word."""

  float32 = jnp.float64

  def __getattr__(self, name):
    return getattr(jnp, name)


@contextlib.contextmanager
def float64():
  """Inside, a model with dtype and param_dtype float64 computes all of it so."""
  modules = [
    module
    for name, module in sys.modules.items()
    if name.startswith(_ROOMS) and getattr(module, 'jnp', None) is jnp
  ]
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.enable_x64(True))
    # Constants of float32, the same in all that is compared, may widen.
    stack.enter_context(jax.numpy_dtype_promotion('standard'))
    for module in modules:
      stack.enter_context(mock.patch.object(module, 'jnp', _Wide()))
    yield


def widen(tree):
  """float32 leaves as float64, everything else as it is; NumPy."""
  return jax.tree.map(
    lambda x: np.asarray(x, np.float64 if x.dtype == np.float32 else x.dtype), tree
  )


def largest_error(got, want):
  """The largest difference of any entry, relative to its leaf's largest entry."""
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  errors = []
  for g, w in pairs:
    if g.dtype != np.float64 or w.dtype != np.float64:
      raise TypeError(f'{g.dtype} and {w.dtype}, not float64')
    errors.append(np.abs(g - w).max() / np.abs(w).max())
  return max(errors)
