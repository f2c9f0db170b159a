"""A batch as one piece of memory, which is how worker processes hand it over.

  block   u8[ tokens . segment_ids . order ... image/items . image/values . ]
  batch   views of it; each array begins at a multiple of 64 bytes

Fresh memory costs more than what is written into it: the system clears each page, and
again for a copy. So blocks are used again, in a ring of memory that all processes share:

  ring      flags  block 0  block 1  block 2  ...      worker w has blocks w, w+W, ...
  worker    sets the flag of a block that is free, packs into it, sends its number
  parent    makes a batch of views; with the last of them the flag is cleared

The ring is a file without a name (memfd_create), so whoever dies, nothing is left behind.
"""

import dataclasses
import functools
import mmap
import os
import weakref

import jax
import numpy as np

from mmjax.batch import Budget, PackedBatch

_ALIGNED = 64  # bytes: a line of the processor's cache, and what JAX asks for


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where the arrays of a batch of `rows` rows lie in a block."""

  budget: Budget
  rows: int

  @functools.cached_property
  def _arrays(self):
    """([(first byte, end, dtype, shape)], bytes in all, the tree)."""
    leaves, tree = jax.tree.flatten(self.budget.empty(self.rows))
    arrays, at = [], 0
    for leaf in leaves:
      arrays.append((at, at + leaf.nbytes, leaf.dtype, leaf.shape))
      at += -(-leaf.nbytes // _ALIGNED) * _ALIGNED
    return arrays, max(at, _ALIGNED), tree

  @property
  def size(self) -> int:
    """Bytes of a block."""
    return self._arrays[1]

  def batch(self, block: np.ndarray) -> PackedBatch:
    """The batch in a block u8[size]; its arrays are views."""
    arrays, _, tree = self._arrays
    flat = np.asarray(block).view(np.ndarray)
    return tree.unflatten(
      [flat[start:end].view(dtype).reshape(shape) for start, end, dtype, shape in arrays]
    )

  def __getstate__(self):
    return {'budget': self.budget, 'rows': self.rows}


class Ring:
  """Blocks that a process and its workers use again and again.

  Made by the parent, who lends; pickled to the workers, who take.

  Args:
    size: bytes of a block.
    blocks: of each worker.
    workers: how many.

  Where there is no such memory (not Linux), or a worker can't reach it, there is never
  a free block.
  """

  def __init__(self, size: int, blocks: int, workers: int):
    self._workers, self._count = workers, blocks * workers
    self._size, self._apart = size, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    self._start = -(-self._count // mmap.PAGESIZE) * mmap.PAGESIZE
    self._path = self._memory = None
    if hasattr(os, 'memfd_create'):
      self._name = f'mmjax-{os.urandom(8).hex()}'
      file = os.memfd_create(self._name)
      weakref.finalize(self, os.close, file)
      os.ftruncate(file, self._start + self._count * self._apart)
      self._path = f'/proc/{os.getpid()}/fd/{file}'
      self._memory = mmap.mmap(file, 0)

  def __getstate__(self):
    return {**self.__dict__, '_memory': None}

  def take(self, worker: int) -> tuple[int, np.ndarray] | None:
    """(number, block u8) of a free block of a worker; None = there is none."""
    if self._memory is None and self._path is not None:
      try:
        with open(self._path, 'r+b') as file:
          # If the parent has closed it by now, the number may be another file's.
          if self._name in os.readlink(f'/proc/self/fd/{file.fileno()}'):
            self._memory = mmap.mmap(file.fileno(), 0)
      except OSError:
        pass
      if self._memory is None:
        self._path = None
    if self._memory is None:
      return None
    for number in range(worker % self._workers, self._count, self._workers):
      if not self._memory[number]:
        self._memory[number] = 1
        return number, self._block(number)
    return None

  def lend(self, number: int) -> np.ndarray:
    """A block u8 that was taken; free again once it and all views of it are gone."""
    block = self._block(number)
    weakref.finalize(block, self._free, number).atexit = False
    return block

  def _free(self, number: int):
    self._memory[number] = 0

  def _block(self, number: int) -> np.ndarray:
    start = self._start + number * self._apart
    return np.frombuffer(self._memory, np.uint8, self._size, start)
