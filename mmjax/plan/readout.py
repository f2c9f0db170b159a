"""What a compiled program tells of one step on one device, without running it.

  memory      peak in HBM, and of what it is made
  work        FLOPs, bytes to and from HBM, bytes on the wire by kind and mesh axis
  roofline    the longest of FLOPs / peak, HBM bytes / rate, wire bytes / link rate
  modelled    max(cycles / clock, HBM bytes / rate, async wire) + synchronous wire

A loop's body counts as often as it runs. The first two are facts of the program; the
roofline is a bound; the modelled time rests on libtpu's own estimates of cycles, on link
rates that are assumed, and on Pallas kernels at half of the peak. It ranks designs; it is
never a measured step time.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from mmjax.plan import costs, hlo, wire
from mmjax.plan.chips import GIB, Chip
from mmjax.plan.wire import Collective

PALLAS = 0.5  # share of the peak that a Pallas kernel is taken to reach: assumed


@dataclasses.dataclass(frozen=True)
class Op:
  """An instruction's share of a step.

  Attributes:
    name: of the instruction.
    source: name in the user's program, '' if the compiler made it.
    seconds: modelled, of all runs.
    times: runs in a step.
    flops, hbm_bytes: of all runs.
  """

  name: str
  source: str
  seconds: float
  times: int
  flops: int
  hbm_bytes: int


@dataclasses.dataclass(frozen=True)
class Readout:
  """One step on one device.

  Attributes:
    chip: what it was compiled for.
    num_devices: of the mesh.
    hbm_peak: bytes, the most at any moment.
    hbm: bytes by part: each label's arguments, 'outputs' (those that don't take an
      argument's place) and 'temporaries' (activations, gradients, gathered weights).
    flops: of products, as compiled (what is made anew counts again).
    hbm_bytes: read from and written to HBM.
    collectives: what is sent, see `mmjax.plan.wire`.
    compute_seconds: libtpu's cycles / clock, plus Pallas calls.
    ops: all that takes time, costliest first.
    kernels: instructions that run something, each counted once.
    uncounted: Pallas calls without a cost estimate; they are in no number here.
    unknown_loops: loops whose trips can't be read; their bodies count once.
  """

  chip: Chip
  num_devices: int
  hbm_peak: int
  hbm: Mapping[str, int]
  flops: int
  hbm_bytes: int
  collectives: tuple[Collective, ...]
  compute_seconds: float
  ops: tuple[Op, ...]
  kernels: int
  uncounted: tuple[str, ...] = ()
  unknown_loops: tuple[str, ...] = ()

  @property
  def fits(self) -> bool:
    return self.hbm_peak <= self.chip.hbm

  @property
  def wire_bytes(self) -> int:
    """Bytes that one device sends in a step."""
    return wire.total(self.collectives)

  def wire_by(self, key: Callable[[Collective], Any]) -> dict[Any, int]:
    """Bytes on the wire by kind, axes, ...: `wire_by(lambda c: (c.kind, c.axes))`."""
    sums: dict[Any, int] = {}
    for c in self.collectives:
      sums[key(c)] = sums.get(key(c), 0) + c.bytes
    return sums

  @property
  def roofline(self) -> dict[str, float]:
    """Seconds that each resource alone would take at its full rate."""
    links = [c for c in self.collectives if not c.between_slices]
    slices = [c for c in self.collectives if c.between_slices]
    return {
      'peak': self.flops / self.chip.peak,
      'hbm': self.hbm_bytes / self.chip.hbm_rate,
      'link': sum(c.seconds for c in links),
      'slices': sum(c.seconds for c in slices),
    }

  @property
  def roofline_seconds(self) -> float:
    return max(self.roofline.values())

  @property
  def modelled_seconds(self) -> float:
    """See above; never a measured time."""
    overlapped = max(
      self.compute_seconds,
      self.roofline['hbm'],
      wire.seconds(self.collectives, asynchronous=True),
    )
    return overlapped + wire.seconds(self.collectives, asynchronous=False)


def read(
  compiled: Any,
  chip: Chip,
  mesh: Mesh,
  labels: Any = None,
) -> Readout:
  """Reads a program that was compiled for TPUs.

  Args:
    compiled: of `jax.jit(f).lower(...).compile()`.
    chip: that of the mesh's devices.
    mesh: what the arguments were sharded over.
    labels: names of parts of the positional arguments, for `hbm`: a tuple that is a
      prefix of them, as ({'params': 'params', 'opt': 'optimizer'}, 'batch'); without
      it they are 'argument 0', 'argument 1', ...

  Raises:
    ValueError: the program's text can't be read (`hlo.parse`, `hlo.groups`), or
      `labels` isn't a prefix of the arguments.
  """
  module = hlo.parse(compiled.as_text())
  memory = compiled.memory_analysis()
  sent = wire.collectives(module, chip, mesh)
  starts = {c.name: c for c in sent}
  ops, uncounted, compute = [], [], 0.0
  for computation, instruction, times in module.executed():
    if not costs.is_kernel(instruction):
      continue
    name, source = instruction.name, instruction.source
    flops = costs.flops(module, computation, instruction) * times
    moved = costs.hbm_bytes(module, computation, instruction) * times
    seconds = (instruction.cycles or 0) * times / chip.clock
    if instruction.target == 'tpu_custom_call':
      if not instruction.cost_estimate:
        uncounted.append(source or name)
      seconds = max(flops / (PALLAS * chip.peak), moved / chip.hbm_rate)
    compute += seconds
    seconds = max(seconds, moved / chip.hbm_rate)
    if name in starts:
      seconds = max(seconds, starts[name].seconds)
      source = source or starts[name].source
    ops.append(Op(name, source, seconds, times, flops, moved))
  ops.sort(key=lambda op: -op.seconds)
  return Readout(
    chip=chip,
    num_devices=mesh.size,
    hbm_peak=memory.peak_memory_in_bytes,
    hbm=_parts(module, compiled, labels),
    flops=sum(op.flops for op in ops),
    hbm_bytes=sum(op.hbm_bytes for op in ops),
    collectives=sent,
    compute_seconds=compute,
    ops=tuple(ops),
    kernels=len(ops),
    uncounted=tuple(uncounted),
    unknown_loops=module.unknown_loops,
  )


def _parts(module, compiled, labels):
  sizes = [
    sum(a.bytes for a in parameter.arrays if a.space == 0)
    for parameter in module.entry.parameters
  ]
  names = _names(compiled, labels)
  # Arrays that the function closes over come first.
  names = ['constants'] * (len(sizes) - len(names)) + names
  parts: dict[str, int] = {}
  for name, size in zip(names, sizes, strict=True):
    parts[name] = parts.get(name, 0) + size
  memory = compiled.memory_analysis()
  outputs = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
  held = sum(sizes) + outputs
  parts['outputs'] = outputs
  parts['temporaries'] = max(0, memory.peak_memory_in_bytes - held)
  return parts


def _names(compiled, labels):
  """The label of each argument that the program kept; unused ones are dropped."""
  positional, named = compiled.in_avals
  if labels is None:
    labels = tuple(f'argument {i}' for i in range(len(positional)))
  try:
    names = jax.tree.leaves(jax.tree.broadcast(labels, positional))
  except ValueError as error:
    raise ValueError(f'labels are no prefix of the arguments: {error}') from error
  names += ['keywords'] * len(jax.tree.leaves(named))
  tree = jax.tree.structure((positional, named))
  shardings = tree.flatten_up_to(compiled.input_shardings)  # None: dropped
  return [n for n, s in zip(names, shardings, strict=True) if s is not None]


def out_of_memory(error: BaseException | str) -> tuple[int, int] | None:
  """(needed, available) bytes of one device, of a compiler's refusal; None of others.

  libtpu says "(16.00G) exceeds available HBM (15.75G)" or "Used 16.00G of 15.75G hbm";
  where only a part was counted (temporaries), needed is that part.
  """
  text = str(error)
  if 'RESOURCE_EXHAUSTED' not in text:
    return None
  size = r'([\d.]+)([KMGT]?)'
  for form in (
    rf'\({size}\) exceeds available HBM \({size}\)',
    rf'Used {size} of {size} hbm',
  ):
    found = re.search(form, text)
    if found:
      unit = {'': 1, 'K': 2**10, 'M': 2**20, 'G': GIB, 'T': 2**40}
      needed, a, available, b = found.groups()
      return round(float(needed) * unit[a]), round(float(available) * unit[b])
  return None
