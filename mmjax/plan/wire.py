"""What a compiled program sends between chips: kind, mesh axes, bytes, time.

Bytes on the wire are those that one device sends, for n devices that hold b bytes each:

  all-gather          (n - 1) b          result n b
  reduce-scatter      (n - 1) / n b      operand b
  all-reduce          2 (n - 1) / n b    a reduce-scatter and an all-gather
  all-to-all          (n - 1) / n b
  collective-permute  b
  between slices      the same of `send`s; 'slices all-reduce' and so on

One asynchronous collective is printed as several fusions; only that which starts it
counts. A gradient's reduce-scatter is printed as an all-reduce inside of a fusion that
is called all-reduce-scatter. Chan et al., "Collective communication", 2007.
"""

import dataclasses
import math
import re
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mmjax.plan import costs, hlo
from mmjax.plan.chips import Chip


@dataclasses.dataclass(frozen=True)
class Collective:
  """All runs of one collective instruction.

  Attributes:
    kind: 'all-gather', ..., 'slices all-reduce', ...
    axes: mesh axes that it goes along; () if its places don't move.
    bytes: that one device sends, in all runs.
    seconds: of all runs, at the links' full rate.
    asynchronous: other work can go on meanwhile.
    times: runs in a step.
    name: of the instruction.
    source: its name in the user's program.
  """

  kind: str
  axes: tuple[str, ...]
  bytes: int
  seconds: float
  asynchronous: bool
  times: int
  name: str
  source: str

  @property
  def between_slices(self) -> bool:
    return self.kind.startswith('slices')


def collectives(module: hlo.Module, chip: Chip, mesh: Mesh) -> tuple[Collective, ...]:
  """Every collective of a program, in the order of its text.

  Raises:
    ValueError: groups of devices that can't be read (`hlo.groups`).
  """
  network = _Network(chip, mesh)
  runs = list(module.executed())
  # Channels with a start: the fusions in between carry the same channel.
  started = {
    i.attribute('channel_id')
    for _, instruction, _ in runs
    for i in _starting(module, instruction)
  }
  found = []
  for computation, instruction, times in runs:
    if instruction.opcode == 'send':
      found.append(_between(network, computation, instruction, times))
    elif costs.collective(instruction.opcode):
      asynchronous = instruction.opcode.endswith('-start')
      found.append(
        _collective(network, computation, instruction, times, asynchronous, instruction)
      )
    elif instruction.opcode in ('fusion', 'async-start'):
      inside = module.computations[instruction.calls[0]]
      starts = _starting(module, instruction)
      for inner in inside.instructions.values():
        if not costs.collective(inner.opcode):
          continue
        part = inner.attribute('channel_id') in started and (costs.is_piece(inner))
        if inner in starts or not part:
          asynchronous = inner in starts or instruction.opcode == 'async-start'
          found.append(
            _collective(network, inside, inner, times, asynchronous, instruction)
          )
  return tuple(found)


def _starting(module, instruction):
  """The collectives that a fusion starts."""
  if instruction.opcode != 'fusion':
    return []
  inside = module.computations[instruction.calls[0]]
  return [
    inside.instructions[name]
    for i in inside.instructions.values()
    if i.target == 'AsyncCollectiveStart'
    for name in i.operands
    if costs.collective(inside.instructions[name].opcode)
  ]


def _collective(network, computation, instruction, times, asynchronous, outer):
  kind = costs.collective(instruction.opcode)
  held = sum(
    a.data_bytes
    for name in instruction.operands
    for a in computation.instructions[name].arrays
  )
  if kind == 'all-reduce' and 'all-reduce-scatter' in computation.name:
    kind = 'reduce-scatter'
  groups = hlo.groups(instruction)
  n = groups.shape[1]
  if kind == 'collective-permute':
    moving = int((groups[:, 0] != groups[:, 1]).sum())
    sent = held * moving // max(1, len(groups))
    links = 1
  else:
    share = {'all-gather': n - 1, 'all-reduce': 2 * (n - 1) / n}
    sent = round(held * share.get(kind, (n - 1) / n))
    links = network.links(groups[0])
  rate = links * network.chip.link / network.chip.devices
  return Collective(
    kind, network.axes(groups), sent * times, sent * times / rate, asynchronous, times,
    outer.name, instruction.source or outer.source,
  )  # fmt: skip


def _between(network, computation, send, times):
  """A `send` to the other slices' hosts, which reduce or gather there."""
  held = sum(a.data_bytes for a in computation.instructions[send.operands[0]].arrays)
  kind = re.search(r'_xla_megascale_transfer_type="([A-Z_]+)"', send.attributes)
  kind = kind[1].lower().replace('_', '-') if kind else 'send'
  n = network.slices
  share = {'all-reduce': 2 * (n - 1) / n, 'all-gather': n - 1, 'send': 1}
  share['reduce-scatter'] = share['all-to-all'] = (n - 1) / n
  sent = round(held * share.get(kind, 1)) * times
  return Collective(
    f'slices {kind}', network.slice_axes, sent, sent / network.chip.dcn, True, times,
    send.name, send.source,
  )  # fmt: skip


class _Network:
  """Places of the mesh -> its axes and the torus' links."""

  def __init__(self, chip: Chip, mesh: Mesh):
    self.chip = chip
    self._names = mesh.axis_names
    self._sizes = mesh.devices.shape
    flat: list[Any] = list(mesh.devices.flat)
    self._coords = np.array([getattr(d, 'coords', (0,)) for d in flat])
    slices = np.array([getattr(d, 'slice_index', 0) for d in flat])
    self.slices = len(set(slices.tolist()))
    self.slice_axes = tuple(
      name
      for i, name in enumerate(self._names)
      if (np.diff(slices.reshape(self._sizes), axis=i) != 0).any()
    )
    self._shape = self._coords.max(0) - self._coords.min(0) + 1

  def axes(self, groups: np.ndarray) -> tuple[str, ...]:
    """The mesh axes along which the places of a group differ."""
    places = np.stack(np.unravel_index(groups, self._sizes), -1)  # [G, n, axes]
    moves = (places != places[:, :1]).any((0, 1))
    return tuple(name for name, m in zip(self._names, moves) if m)

  def links(self, group: np.ndarray) -> int:
    """Links that a group's device can receive through at once."""
    coords = self._coords[group]
    total = 0
    for i, length in enumerate(self._shape):
      spanned = len(set(coords[:, i].tolist()))
      if spanned > 1:
        ring = spanned == length and length % self.chip.wrap == 0
        total += 2 if ring else 1
    return max(1, total)


def total(found: tuple[Collective, ...]) -> int:
  """Bytes that one device sends in a step."""
  return sum(c.bytes for c in found)


def seconds(found: tuple[Collective, ...], asynchronous: bool) -> float:
  """Time of the asynchronous ones or the others; slices' network and links overlap."""
  links = math.fsum(
    c.seconds for c in found if c.asynchronous == asynchronous and not c.between_slices
  )
  slices = math.fsum(
    c.seconds for c in found if c.asynchronous == asynchronous and c.between_slices
  )
  return max(links, slices)
