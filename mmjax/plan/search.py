"""Which mesh, what to keep for the backward pass, how many rows at once?

  mesh shapes x remat x microbatches   ->  a guess of each: bytes, seconds
  those that can't fit are left out    ->  the best guess is compiled
  it corrects the guesses near it      ->  and so on, until none that is left is guessed
                                           to win, or the time is up

The guess is arithmetic on the traced step, whose residuals and products don't depend on
the mesh: what autodiff keeps of a row, and what it multiplies. Only compiled candidates
are in the result, ranked by modelled time.
"""

import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Sequence
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
_CLOSE = 1.02  # a guess that is so much worse than the best is compiled all the same
# What the link to the host costs isn't modelled, so 'offload' would look free.
_REMAT = tuple(name for name in REMAT if name != 'offload')


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
  """Of a choice: bytes of one device, seconds of a step."""

  choice: Choice
  bytes: float
  seconds: float


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
    sent = jax.numpy.dtype(config.optim.grad_dtype or 'float32').itemsize
    self.sums = sent * sum(x.size for x in jax.tree.leaves(trained))
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
    ways = n // split
    # An axis over all of a slice has its sums whole on every chip (docs/pods.md).
    reduced = choice.accumulate * self.sums * share * (1 if choice.data > 1 else 2)
    reduced += 2 * self.sums / split * (ways - 1) / ways
    rate = 2 * chip.link * (1 if choice.fsdp * choice.data < n else 2)
    seconds = max(compute / _MATMUL, gathered / rate) + reduced / rate
    if choice.tensor > 1:  # activations are summed twice a layer, both ways
      seconds *= 1 + 0.1 * math.log2(choice.tensor)
    return Guess(choice, held, seconds)


def choices(config: ConfigDict, topology: Topology) -> Iterator[Choice]:
  """Every mesh of powers of two, remat and number of microbatches that divides."""
  n, rows = _split(config, topology), config.data.rows // topology.slices
  tensors = _TENSOR if config.sharding.preset in ('fsdp', 'fsdp+tensor') else (1,)
  for tensor in tensors:
    for fsdp in _powers(n // tensor):
      data = n // tensor // fsdp
      for accumulate in _powers(rows // (data * fsdp) or 1):
        if rows % (data * fsdp * accumulate) == 0 and data * fsdp * accumulate <= rows:
          for remat in _REMAT:
            yield Choice(data, fsdp, tensor, remat, accumulate)


def present(config: ConfigDict, topology: Topology) -> Choice:
  """What the config itself says."""
  sizes = {a: config.sharding.mesh.get(a, 1) for a in ('data', 'fsdp', 'tensor')}
  known = math.prod(n for n in sizes.values() if n > 0)
  free = _split(config, topology) // known
  sizes = {axis: free if n == -1 else n for axis, n in sizes.items()}
  remats = [p.remat for p in _trained_parts(config)] or ['none']
  return Choice(**sizes, remat=remats[0], accumulate=config.train.accumulate)


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
  queue = [g for g in guesses if g.bytes <= topology.chip.hbm]
  print(f'{len(guesses)} choices, {len(queue)} that may fit {topology.name}', flush=True)
  seen: list[tuple[Guess, Found]] = []
  running: dict[concurrent.futures.Future, Guess] = {}
  spawn = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
    one: Guess | None = guess(present(config, topology))
    while one or running:
      if one:
        queue = [g for g in queue if g.choice != one.choice]
        args = config_lib.to_json(config), one.choice, topology, cache
        running[pool.submit(_compiled, *args)] = one
      if not one or len(running) == workers:
        for future in concurrent.futures.wait(
          running, return_when=concurrent.futures.FIRST_COMPLETED
        ).done:
          seen.append((running.pop(future), future.result()))
          print(_line(seen[-1][1]), flush=True)
      late = time.monotonic() > end
      one = None if late else following(queue, seen, topology.chip.hbm)
  return sorted((f for _, f in seen), key=lambda f: (not f.fits, f.seconds))


def following(
  queue: Sequence[Guess], seen: Sequence[tuple[Guess, Found]], hbm: int
) -> Guess | None:
  """Of the guesses in the queue that which to compile next; None: none may win.

  Args:
    seen: what was compiled, with the guess of it; corrects the guesses near it.
    hbm: bytes of a device.
  """
  best = min((f.seconds for _, f in seen if f.fits), default=math.inf)
  made = [(corrected(g, seen), g) for g in queue]
  may = [(c.seconds, g) for c, g in made if c.bytes <= hbm and c.seconds <= _CLOSE * best]
  return min(may, key=lambda pair: pair[0], default=(None, None))[1]


def corrected(guess: Guess, seen: Sequence[tuple[Guess, Found]]) -> Guess:
  """A guess times what was found / what was guessed of the most alike compiled choice.

  Of a `remat` that wasn't compiled yet, times are corrected as those that came out best.
  """

  def unlike(pair: tuple[Guess, Found]) -> tuple[float, ...]:
    a, b = guess.choice, pair[0].choice
    others = sum(
      getattr(a, k) != getattr(b, k) for k in ('remat', 'tensor', 'accumulate')
    )
    return others, abs(math.log2(a.fsdp / b.fsdp))

  held, seconds = guess.bytes, guess.seconds
  if seen:
    other, found = min(seen, key=unlike)
    held *= found.peak / other.bytes
  if fitting := [pair for pair in seen if pair[1].fits]:
    other, found = min(fitting, key=unlike)
    if other.choice.remat != guess.choice.remat:
      other, found = min(fitting, key=lambda pair: pair[1].seconds / pair[0].seconds)
    seconds *= found.seconds / other.seconds
  return Guess(guess.choice, held, seconds)


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


def nearest(
  config: ConfigDict, topology: Topology, cache: Any, peak: int, tries: int = 4
) -> str:
  """One line: the least change of a config that doesn't fit with which it does.

  Changes are tried in the order of what they cost: more made anew, more microbatches,
  parameters split over more chips, all of them. What doesn't fit corrects the guesses.

  Args:
    peak: bytes of a device that the config was found to need.
    tries: changes to compile at most.
  """
  guess, now = Guesser(config, topology), present(config, topology)

  def distance(choice: Choice) -> float:
    return (
      (choice.remat != now.remat) + abs(math.log2(choice.accumulate / now.accumulate))
      + abs(math.log2(choice.fsdp / now.fsdp))
    )  # fmt: skip

  every = [c for c in choices(config, topology) if c.tensor == now.tensor and c != now]
  left = [guess(c) for c in every if c.remat in (now.remat, 'full')]
  seen = [(guess(now), _refused(peak))]
  for done in range(tries):
    made = [(corrected(g, seen), g) for g in left]
    likely = [
      (distance(g.choice), c.bytes, g) for c, g in made if c.bytes <= topology.chip.hbm
    ]
    if not likely:
      compiled = f' ({done} were compiled)' if done else ''
      return (
        f'no mesh, remat or microbatches fit it on {topology.name}{compiled}: more chips,'
        ' or less'
      )
    one = min(likely, key=lambda found: found[:2])[2]
    plan = compile_lib.plan(one.choice.apply(config), topology, cache)
    if plan.fits:
      size = f'{plan.peak / GIB:.2f} GiB'
      return f'nearest change that fits ({size}): {one.choice.flags(config)}'
    left.remove(one)
    seen.append((one, _refused(plan.peak)))
  return f'{tries} nearest changes were compiled and do not fit either'


def _refused(peak: int) -> Found:
  return Found('', False, peak, math.inf, 0.0, 0)
