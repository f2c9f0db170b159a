"""Which mesh, what to keep for the backward pass, how many rows at once?

  mesh shapes x remat x microbatches   ->  a guess of each: bytes, seconds
  those that can't fit are left out    ->  the rest are compiled, best guess first
  none that is left can still win      ->  or the time is up: ranked by modelled time

The guess is arithmetic on the traced step, whose residuals and products don't depend on
the mesh: what autodiff keeps of a row, and what it multiplies. Only compiled candidates
are in the result.
"""

import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from mmjax.nn.remat import REMAT
from mmjax.plan import compile as compile_lib
from mmjax.plan import topology as topology_lib
from mmjax.plan.chips import GIB
from mmjax.plan.flops import flops
from mmjax.plan.topology import Topology
from mmjax.train import build as build_lib
from mmjax.train import config as config_lib
from mmjax.train.optim import merge

_TENSOR = (1, 2, 4, 8)
_MATMUL = 0.85  # share of the peak that large products are guessed to reach


@dataclasses.dataclass(frozen=True)
class Choice:
  """What a candidate changes in the config: three axes of the mesh, and the rest."""

  data: int
  fsdp: int
  tensor: int
  remat: str
  accumulate: int

  def apply(self, config: ConfigDict) -> ConfigDict:
    """The config with this choice."""
    new = ConfigDict(json.loads(config_lib.to_json(config)))
    new.sharding.mesh.update(data=self.data, fsdp=self.fsdp, tensor=self.tensor)
    if new.sharding.preset == 'fsdp' and self.tensor > 1:
      new.sharding.preset = 'fsdp+tensor'
    for part in _trained_parts(new):
      part.remat = self.remat
    new.train.accumulate = self.accumulate
    return config_lib.resolve(new)

  def flags(self, config: ConfigDict) -> str:
    """The choice as flags of a command, as far as it differs from the config."""
    a, b = (config_lib.flat(c) for c in (config, self.apply(config)))
    return ' '.join(f'--config.{k}={b[k]}' for k in b if b[k] != a.get(k, 1))


@dataclasses.dataclass(frozen=True)
class Guess:
  """Of a choice: bytes of one device, seconds of a step, and the least that it takes."""

  choice: Choice
  bytes: float
  seconds: float
  least: float


@dataclasses.dataclass(frozen=True)
class Found:
  """A choice that was compiled: flags, whether it fits, bytes, modelled seconds, MFU."""

  flags: str
  fits: bool
  peak: int
  seconds: float
  mfu: float
  wire_bytes: int

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)


def _trained_parts(config: ConfigDict) -> list[ConfigDict]:
  """The model's sections that keep something for a backward pass."""
  frozen = [p.removesuffix('/*') for p in config.optim.freeze]
  model = config.model
  inside = [(k, v) for k, v in model.items() if isinstance(v, ConfigDict)]
  # What is frozen but stands behind something trained has a backward pass too.
  parts = [v for k, v in inside if not (k in frozen and k == 'vision')]
  return [p for p in (model, *parts) if 'remat' in p]


def _bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


class Guesser:
  """Guesses for one config on one topology, made of what is traced once."""

  def __init__(self, config: ConfigDict, topology: Topology):
    self.config, self.topology = config, topology
    self._rows: dict[str, tuple[float, float]] = {}
    one = self._parts(next(iter(REMAT)))
    state = one.abstract
    trained, _ = one.optimizer.split(state.params)
    self.state, self.grads = _bytes(state), _bytes(trained)
    self.weights = sum(x.size for x in jax.tree.leaves(state.params))

  def _parts(self, remat):
    devices = topology_lib.devices(self.topology)[:1]
    config = Choice(1, 1, 1, remat, 1).apply(self.config)
    config.sharding.mesh = ConfigDict({'data': 1})
    return build_lib.build(config, compile_lib.vocabulary(config), devices)

  def _row(self, remat):
    """(bytes that autodiff keeps, FLOPs) of one more row."""
    if remat not in self._rows:
      parts = self._parts(remat)
      trained, frozen = parts.optimizer.split(parts.abstract.params)
      rng = jax.random.key(0)

      def loss(trained, frozen, batch):
        params = merge(trained, frozen)
        return parts.loss_fn(params, batch, rng, True)[0]

      def back(trained, frozen, batch):
        return jax.vjp(lambda t: loss(t, frozen, batch), trained)[1]

      def kept(rows):
        args = trained, frozen, parts.batch_shapes(rows)
        return _bytes(jax.eval_shape(back, *args)), flops(jax.grad(loss), *args)

      one, two = kept(1), kept(2)
      self._rows[remat] = two[0] - one[0], two[1] - one[1]
    return self._rows[remat]

  def __call__(self, choice: Choice) -> Guess:
    chip, n = self.topology.chip, self.topology.num_devices
    kept, work = self._row(choice.remat)
    split = choice.fsdp * choice.tensor
    rows = self.config.data.rows
    local = rows / (n / choice.tensor) / choice.accumulate
    # What is split over tensor beside the weights is about half of what is kept.
    held = (self.state + self.grads) / split
    held += local * kept * (1 if choice.tensor == 1 else (1 + 1 / choice.tensor) / 2)
    compute = rows * work / n / chip.peak
    passes = 2 * choice.accumulate
    share = (choice.fsdp - 1) / choice.fsdp / choice.tensor
    gathered = passes * 2 * self.weights * share
    reduced = choice.accumulate * self.grads * share
    ways = n // split
    reduced += 2 * self.grads / split * (ways - 1) / ways
    rate = 2 * chip.link * (1 if choice.fsdp * choice.data < n else 2)
    seconds = max(compute / _MATMUL, gathered / rate) + reduced / rate
    if choice.tensor > 1:  # activations are summed twice a layer, both ways
      seconds *= 1 + 0.1 * math.log2(choice.tensor)
    return Guess(choice, held, seconds, compute)


def choices(config: ConfigDict, topology: Topology) -> Iterator[Choice]:
  """Every mesh of powers of two, remat and number of microbatches that divides."""
  n, rows = _split(config, topology), config.data.rows // topology.slices
  tensors = _TENSOR if config.sharding.preset in ('fsdp', 'fsdp+tensor') else (1,)
  for tensor in tensors:
    for fsdp in _powers(n // tensor):
      data = n // tensor // fsdp
      for accumulate in _powers(rows // (data * fsdp) or 1):
        if rows % (data * fsdp * accumulate) == 0 and data * fsdp * accumulate <= rows:
          for remat in REMAT:
            yield Choice(data, fsdp, tensor, remat, accumulate)


def _split(config: ConfigDict, topology: Topology) -> int:
  """Devices of a slice that are shared among data, fsdp and tensor."""
  ours = ('slice', *(f.name for f in dataclasses.fields(Choice)))
  others = math.prod(n for a, n in config.sharding.mesh.items() if a not in ours)
  return topology.num_devices // topology.slices // others


def _powers(most: int) -> Iterator[int]:
  return (2**i for i in range(max(1, most).bit_length()) if 2**i <= most)


def search(
  config: ConfigDict,
  topology: Topology,
  cache: Any,
  minutes: float = 15,
  workers: int = 2,
) -> list[Found]:
  """The candidates that were compiled, best modelled throughput first.

  Args:
    config: resolved and checked; rows of the global batch stay what they are.
    topology: to plan for.
    cache: of read-outs, see `compile.plan`.
    minutes: no compile is begun after it.
    workers: compiles at once, each of 1 to 2 GB.
  """
  end = time.monotonic() + 60 * minutes
  guess = Guesser(config, topology)
  guesses = [guess(c) for c in choices(config, topology)]
  queue = sorted(
    (g for g in guesses if g.bytes <= topology.chip.hbm), key=lambda g: g.seconds
  )
  print(f'{len(guesses)} choices, {len(queue)} that may fit {topology.name}', flush=True)
  found: list[Found] = []
  best = math.inf
  spawn = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
    running: set[concurrent.futures.Future] = set()
    while queue or running:
      while queue and len(running) < workers and time.monotonic() < end:
        one = queue.pop(0)
        if one.least < best:
          args = config_lib.to_json(config), one.choice, topology, cache
          running.add(pool.submit(_compiled, *args))
      if not running:
        break
      done, running = concurrent.futures.wait(
        running, return_when=concurrent.futures.FIRST_COMPLETED
      )
      for future in done:
        made = future.result()
        found.append(made)
        print(_line(made), flush=True)
        if made.fits:
          best = min(best, made.seconds)
  return sorted(found, key=lambda f: (not f.fits, f.seconds))


def _compiled(config: str, choice: Choice, topology: Topology, cache: Any) -> Found:
  base = config_lib.from_json(config)
  made = compile_lib.plan(choice.apply(base), topology, cache)
  seconds = made.readout.modelled_seconds if made.readout else math.inf
  return Found(
    choice.flags(base), made.fits, made.peak, seconds,
    made.mfu(seconds), made.readout.wire_bytes if made.readout else 0,
  )  # fmt: skip


def table(found: Iterable[Found]) -> str:
  """The result as lines, best first."""
  return '\n'.join(['', 'best modelled throughput first:', *map(_line, found)])


def _line(one: Found) -> str:
  if not one.fits:
    return f'  {one.peak / GIB:6.2f} GiB  does not fit        {one.flags}'
  return (
    f'  {one.peak / GIB:6.2f} GiB  {one.seconds * 1e3:7.0f} ms  MFU {one.mfu:.3f}'
    f'  {one.flags}'
  )


def nearest(config: ConfigDict, topology: Topology, cache: Any, tries: int = 4) -> str:
  """One line: the least change of a config that doesn't fit with which it does.

  Changes are tried in the order of what they cost: more made anew, more microbatches,
  parameters split over more chips, all of them.
  """
  guess = Guesser(config, topology)
  sizes = {a: config.sharding.mesh.get(a, 1) for a in ('data', 'fsdp', 'tensor')}
  known = math.prod(n for n in sizes.values() if n > 0)
  free = _split(config, topology) // known
  sizes = {axis: free if n == -1 else n for axis, n in sizes.items()}
  tensor = sizes['tensor']
  remats = [p.remat for p in _trained_parts(config)] or ['none']
  now = Choice(sizes['data'], sizes['fsdp'], tensor, remats[0], config.train.accumulate)

  def distance(choice: Choice) -> float:
    return (
      (choice.remat != now.remat) + abs(math.log2(choice.accumulate / now.accumulate))
      + abs(math.log2(choice.fsdp / now.fsdp))
    )  # fmt: skip

  every = [c for c in choices(config, topology) if c.tensor == tensor and c != now]
  guesses = [guess(c) for c in every if c.remat in (now.remat, 'full')]
  likely = [g for g in guesses if g.bytes <= topology.chip.hbm]
  likely.sort(key=lambda g: (distance(g.choice), g.bytes))
  for one in likely[:tries]:
    made = compile_lib.plan(one.choice.apply(config), topology, cache)
    if made.fits:
      peak = f'{made.peak / GIB:.2f} GiB'
      return f'nearest change that fits ({peak}): {one.choice.flags(config)}'
  if not likely:
    return (
      f'no mesh, remat or microbatches fit it on {topology.name}: more chips, or less'
    )
  return f'{min(tries, len(likely))} nearest changes were compiled and do not fit either'
