"""TPU slices by name, without a TPU: 'v5e:16x16', 'v5p-128', 'v6e-64' -> devices.

  v5p-128      64 chips (v4, v5p and tpu7x are counted by cores), 4x4x4
  v5e-256      256 chips, 16x16; also v5litepod-256
  v5e:16x16    the shape itself

libtpu compiles for a slice that isn't there, but it aborts the process on some shapes
it doesn't know (a v5e axis longer than 16) and asks the network for its surroundings
unless told not to. So shapes are checked against the vendor's list first, and the
environment is set before libtpu is loaded; call `devices` before JAX is used.
"""

import dataclasses
import importlib.util
import itertools
import math
import os
import re
from typing import Any

from mmjax.names import pick
from mmjax.plan.chips import CHIPS, Chip

# Several processes may compile at once; nothing is asked of a metadata server.
QUIET = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_LOG_DIR': 'disabled',
  'TPU_MIN_LOG_LEVEL': '3',
}
_ALIASES = {'v5litepod': 'v5e', 'v5lite': 'v5e', 'v7x': 'tpu7x', '7x': 'tpu7x'}
_FLAT = ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_SMALL_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4')


@dataclasses.dataclass(frozen=True)
class Topology:
  """Some equal slices of one chip.

  Attributes:
    chip: its rates.
    shape: chips along each physical axis of a slice.
    slices: how many.
  """

  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def name(self) -> str:
    return f'{self.chip.name}:{"x".join(map(str, self.shape))}'

  @property
  def num_devices(self) -> int:
    return math.prod(self.shape) * self.chip.devices * self.slices


def parse(name: str, slices: int = 1) -> Topology:
  """The topology that a name means.

  Args:
    name: chip and shape ('v5e:16x16') or chip and size as users say it ('v5p-128').
    slices: number of equal slices.

  Raises:
    ValueError: a chip or shape that isn't known, with the nearest ones that are.
  """
  match = re.fullmatch(r'([a-z0-9]+)[:-](\d+(?:x\d+)*)', name)
  if not match:
    raise ValueError(f"topology {name!r} is not like 'v5e:16x16' or 'v5p-128'")
  family, size = match.groups()
  chip = pick('chip', _ALIASES.get(family, family), CHIPS)
  if slices < 1:
    raise ValueError(f'topology {name!r} has {slices} slices; at least 1 is needed')
  shapes = _shapes(chip)
  if 'x' not in size:
    sizes = {math.prod(_ints(s)) * chip.cores: s for s in shapes}
    if int(size) not in sizes:
      near = sorted(sorted(sizes, key=lambda n: abs(n - int(size)))[:3])
      near = ', '.join(f'{chip.name}-{n} = {sizes[n]}' for n in near)
      raise ValueError(f'no slice is named {name!r} (nearest: {near})')
    size = sizes[int(size)]
  if size not in shapes:
    flipped = 'x'.join(map(str, sorted(_ints(size))))
    hint = f'; did you mean {flipped!r}?' if flipped in shapes else ''
    chips = math.prod(_ints(size))
    near = sorted(shapes, key=lambda s: abs(math.prod(_ints(s)) - chips))[:4]
    raise ValueError(
      f'{chip.name} has no slice of shape {size!r}{hint} (nearest: {", ".join(near)})'
    )
  return Topology(chip, _ints(size), slices)


def devices(topology: Topology) -> list[Any]:
  """Devices to compile for, slice by slice; they hold no memory and run nothing.

  Sets the environment that keeps libtpu quiet (`QUIET`), as far as it isn't set.

  Raises:
    ValueError: libtpu isn't installed, or refuses the topology.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError("planning for TPUs needs libtpu: pip install 'mmjax[plan]'")
  for key, value in QUIET.items():
    os.environ.setdefault(key, value)
  from jax.experimental import topologies

  options: dict[str, Any] = {}
  if topology.slices > 1:
    options['num_slices'] = topology.slices
  if topology.chip.name == 'v4':  # one device a chip, as a v4 is used
    options['chip_config_name'] = 'megacore'
  try:
    found = topologies.get_topology_desc(
      platform='tpu', topology_name=topology.name, **options
    ).devices
  except RuntimeError as error:
    first = str(error).splitlines()[0]
    raise ValueError(f'libtpu refuses topology {topology.name!r}: {first}') from error
  if len(found) != topology.num_devices:
    raise ValueError(
      f'{topology.name!r} x {topology.slices} has {len(found)} devices, '
      f'not {topology.num_devices}'
    )
  return sorted(found, key=lambda d: (getattr(d, 'slice_index', 0), d.id))


def _ints(shape: str) -> tuple[int, ...]:
  return tuple(map(int, shape.split('x')))


def _shapes(chip: Chip) -> tuple[str, ...]:
  """Shapes of one slice: the vendor's list in 2-D; in 3-D also all of whole cubes."""
  if chip.axes == 2:
    return _FLAT
  sides = range(4, 25, 4)
  cubes = [
    c
    for c in itertools.combinations_with_replacement(sides, 3)
    if math.prod(c) <= chip.largest
  ]
  # Of the shapes with as many chips, the roundest is what the size alone means.
  cubes.sort(key=lambda c: (math.prod(c), -sum(c)))
  return _SMALL_CUBES + tuple('x'.join(map(str, c)) for c in cubes)
