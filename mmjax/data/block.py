"""A batch as one piece of memory, which is how worker processes hand it over.

  block   u8[ tokens . segment_ids . order ... image/items . image/values . ]
  batch   views of it; each array begins at a multiple of 64 bytes

A segment of shared memory costs its making, opening and removal, whatever its size, and
a batch has fourteen arrays and more. So there is one for all of them, and the worker
packs into it: what it makes is never copied on its side.
"""

import contextlib
import dataclasses
import functools

import jax
import numpy as np

from mmjax.batch import Budget, PackedBatch

_MADV_POPULATE_WRITE = 23  # madvise(2)
_ALIGNED = 64  # bytes: a line of the processor's cache, and what JAX asks for


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where the arrays of a batch of `rows` rows lie in a block."""

  budget: Budget
  rows: int

  @functools.cached_property
  def _arrays(self):
    """([(first byte, end, dtype, shape, padding)], bytes in all, the tree)."""
    leaves, tree = jax.tree.flatten(self.budget.empty(self.rows))
    arrays, at = [], 0
    for leaf in leaves:
      padding = leaf.flat[0] if leaf.size else leaf.dtype.type(0)
      arrays.append((at, at + leaf.nbytes, leaf.dtype, leaf.shape, padding))
      at += -(-leaf.nbytes // _ALIGNED) * _ALIGNED
    return arrays, max(at, 1), tree

  def batch(self, block: np.ndarray) -> PackedBatch:
    """The batch in a block u8[n]; its arrays are views."""
    arrays, _, tree = self._arrays
    flat = np.asarray(block).view(np.ndarray)
    return tree.unflatten(
      [
        flat[start:end].view(dtype).reshape(shape)
        for start, end, dtype, shape, _ in arrays
      ]
    )

  def shared(self) -> np.ndarray:
    """A block in shared memory that holds nothing but padding."""
    import grain

    arrays, size, _ = self._arrays
    block = grain.multiprocessing.SharedMemoryArray((size,), np.uint8)
    # All pages at once, in two thirds of the time that asking for each takes. They are
    # zeros; where the system can't do it (Linux before 5.14), they come one by one.
    with contextlib.suppress(OSError, ValueError, AttributeError):
      block.shm.buf.obj.madvise(_MADV_POPULATE_WRITE)
    for view, (*_, padding) in zip(jax.tree.leaves(self.batch(block)), arrays):
      if padding:  # it begins as zeros
        view.fill(padding)
    return block

  def __getstate__(self):
    return {'budget': self.budget, 'rows': self.rows}
