"""One parameter under two names and two layouts, declared once.

  Leaf('transformer/layers/attention/query',       ours
       'model.layers.{}.self_attn.q_proj.weight',  theirs, one tensor per layer
       '(N H) D -> D N H')                         their axes -> our axes

Axes in parentheses are one axis of theirs, the first the slowest. A number is the
count of things fused in one tensor, of which the leaf is `part`: GPT-2's query is
'D (3 N H) -> D N H', part 0, Persimmon's '(N 3 H) D -> D N H'. With {} in
their name, ours are stacked, [L, ...].
Only moves of numbers can be said this way, so every leaf goes back bit by bit:
`take` makes any slice of ours from the slice of theirs that holds it, `give` makes
theirs of ours.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Index = Sequence[slice]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """See the top of the file; `ours` is a path, `theirs` a tensor's name."""

  ours: str
  theirs: str
  axes: str
  part: int = 0

  def __post_init__(self):
    letters = [a for group in self._groups for a in group if not a.isdigit()]
    if sorted(letters) != sorted(self._letters) or len(set(letters)) < len(letters):
      raise ValueError(f"{self.ours}: '{self.axes}' has not the same axes on both sides")

  @property
  def stacked(self) -> bool:
    """Whether their tensors are one per layer."""
    return '{}' in self.theirs

  @property
  def slowest(self) -> int:
    """Our axis of which a part is a stretch of their file: their first one; else 0."""
    letters = [a for group in self._groups for a in group if not a.isdigit()]
    return self._letters.index(letters[0]) if letters else 0

  @property
  def _letters(self) -> list[str]:
    return self.axes.split('->')[1].split()

  @property
  def _groups(self) -> list[list[str]]:
    """Their axes, each the list of its factors."""
    left = re.findall(r'\(([^)]*)\)|(\w+)', self.axes.split('->')[0])
    return [(group or axis).split() for group, axis in left]

  def _sizes(self, shape) -> dict[str, int]:
    if len(shape) != len(self._letters):
      raise ValueError(f"{self.ours}: shape {tuple(shape)} does not fit '{self.axes}'")
    return dict(zip(self._letters, shape))

  def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of their tensor for our shape (of one layer, if stacked).

    Raises:
      ValueError: the shape has not our axes.
    """
    sizes = self._sizes(shape)
    return tuple(
      math.prod(int(a) if a.isdigit() else sizes[a] for a in group)
      for group in self._groups
    )

  def take(self, theirs: Any, shape: Sequence[int], index: Index) -> np.ndarray:
    """Ours[index] of one layer, from as little of their tensor as holds it.

    Args:
      theirs: what gives an np.ndarray for a tuple of slices.
      shape: our shape, of one layer.
      index: a slice per axis of ours, in steps of 1.
    """
    sizes = self._sizes(shape)
    spans = {
      a: (i.indices(n)[0], i.indices(n)[1]) for (a, n), i in zip(sizes.items(), index)
    }
    where, local, inner, order = [], [], [], []
    for group in self._groups:
      count = [int(a) if a.isdigit() else sizes[a] for a in group]
      span = [(self.part, self.part + 1) if a.isdigit() else spans[a] for a in group]
      low, deep = 0, 0  # axes of which one entry is wanted are passed by
      while deep < len(group) - 1 and span[deep][1] - span[deep][0] == 1:
        low += span[deep][0] * math.prod(count[deep + 1 :])
        deep += 1
      step = math.prod(count[deep + 1 :])
      start, stop = span[deep]
      where.append(slice(low + start * step, low + stop * step))
      local += [1] * deep + [stop - start] + count[deep + 1 :]
      inner += [slice(None)] * (deep + 1) + [slice(*s) for s in span[deep + 1 :]]
      order += group
    x = theirs[tuple(where)].reshape(local)[tuple(inner)]
    x = x.reshape([n for n, a in zip(x.shape, order) if not a.isdigit()])
    order = [a for a in order if not a.isdigit()]
    return x.transpose([order.index(a) for a in self._letters])

  def give(self, ours: np.ndarray) -> np.ndarray:
    """Their tensor, or this leaf's part of it, of our array (of one layer)."""
    letters, groups = self._letters, self._groups
    shape = [
      math.prod(ours.shape[letters.index(a)] for a in group if not a.isdigit())
      for group in groups
    ]
    order = [letters.index(a) for group in groups for a in group if not a.isdigit()]
    return ours.transpose(order).reshape(shape)


def join(leaves: Sequence[Leaf], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
  """Their tensor of all leaves that are parts of it; arrays by our paths."""
  leaves = sorted(leaves, key=lambda leaf: leaf.part)
  parts = [leaf.give(arrays[leaf.ours]) for leaf in leaves]
  for axis, group in enumerate(leaves[0]._groups):
    if number := next((a for a in group if a.isdigit()), None):
      sizes = leaves[0]._sizes(arrays[leaves[0].ours].shape)
      slower = math.prod(sizes[a] for a in group[: group.index(number)])
      before, after = parts[0].shape[:axis], parts[0].shape[axis + 1 :]
      apart = [x.reshape(*before, slower, -1, *after) for x in parts]
      whole = np.stack(apart, axis + 1).reshape(*before, -1, *after)
      return np.ascontiguousarray(whole)
  return np.ascontiguousarray(parts[0]).reshape(parts[0].shape)  # a scalar stays one
