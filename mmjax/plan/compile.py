"""From a config to the compiled train step, for devices that aren't there.

  config + topology --build--> parts --lower--> program --libtpu--> executable

Nothing here is a second version of training: model, optimizer, shardings, budgets and
the step itself are those of `train.build`, only the devices are descriptions. What the
compiler says is read once (`plan.readout`) and kept on disk, by the program's text, the
compiler's version and options: asking again costs tracing alone.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from mmjax import sharding
from mmjax.models.unified import Unified
from mmjax.plan import topology as topology_lib
from mmjax.plan.chips import CHIPS
from mmjax.plan.flops import model_flops
from mmjax.plan.readout import Op, Readout, out_of_memory, read
from mmjax.plan.topology import Topology
from mmjax.plan.wire import Collective
from mmjax.train import build as build_lib
from mmjax.train.loop import refuse_uneven
from mmjax.train.state import TrainState
from mmjax.train.step import lower_step

_FORMAT = 1  # of what is kept; another one is not read
_KEPT_OPS = 40


@dataclasses.dataclass(frozen=True)
class Plan:
  """What one step of a config takes on one device of a topology.

  topology: the slices.
  mesh: sizes of its axes, those of size 1 left out.
  rows: of a step; tokens: slots of the stream in it.
  held: bytes by part that follow from the shapes: 'params', 'optimizer', 'gradients'
    (of the trained parameters, in their dtype), 'batch'.
  model_flops: that a step needs, of one device; see `plan.flops`.
  readout: of the compiled step; None if it doesn't fit.
  needed: bytes that the compiler wanted, if it doesn't fit.
  """

  topology: Topology
  mesh: Mapping[str, int]
  rows: int
  tokens: int
  held: Mapping[str, int]
  model_flops: int
  readout: Readout | None
  needed: int | None = None

  @property
  def fits(self) -> bool:
    return self.readout is not None and self.readout.fits

  @property
  def peak(self) -> int:
    """Bytes of HBM that are needed at once."""
    return self.readout.hbm_peak if self.readout is not None else self.needed

  def mfu(self, seconds: float) -> float:
    """Model FLOPs utilisation of a step that takes so long."""
    return self.model_flops / seconds / self.topology.chip.peak


def plan(
  config: ConfigDict,
  topology: Topology,
  cache: str | os.PathLike | None = None,
  options: Mapping[str, Any] | None = None,
) -> Plan:
  """Compiles the train step of a config for a topology and reads it out.

  Args:
    config: resolved and checked.
    topology: see `plan.topology.parse`.
    cache: a directory for read-outs ('~' = home); None = compile every time.
    options: compiler options of libtpu.

  Raises:
    ValueError: whatever in the config doesn't fit the mesh, in one line.
  """
  devices = topology_lib.devices(topology)
  parts, lowered = lower(config, devices)
  readout, needed = _read_out(lowered, parts, topology, cache, options)
  state = parts.abstract
  trained, _ = parts.optimizer.split(state.params)
  batch = parts.batch_shapes(config.data.rows)
  return Plan(
    topology=topology,
    mesh={axis: n for axis, n in parts.mesh.shape.items() if n > 1},
    rows=config.data.rows,
    tokens=config.data.rows * parts.budget.stream,
    held={
      'params': held(state.params),
      'optimizer': held((state.opt_state, state.ema)),
      'gradients': held(trained),
      'batch': held(batch),
    },
    model_flops=needed_flops(config, parts) // len(devices),
    readout=readout,
    needed=needed,
  )


def vocabulary(config: ConfigDict) -> int:
  """The number of ids of the config's tokenizer, without opening what isn't there.

  Raises:
    ValueError: only the tokenizer's file could tell, and config.data.vocab_size doesn't.
  """
  name = config.data.tokenizer
  if config.data.vocab_size is not None:
    return config.data.vocab_size
  if name == 'bytes':
    return 257
  if known := re.fullmatch(r'bpe:(\d+)', name):
    return int(known[1])
  raise ValueError(
    f'config.data.vocab_size is not set, and how many ids {name!r} has only its file'
    ' could tell'
  )


def lower(config: ConfigDict, devices: Sequence[Any]) -> tuple[build_lib.Parts, Any]:
  """Builds the parts and lowers the step; nothing is computed, no array is made.

  Args:
    config: resolved and checked.
    devices: of a topology, see `plan.topology`.

  Raises:
    ValueError: whatever in the config doesn't fit, in one line.
  """
  parts = build_lib.build(config, vocabulary(config), devices)
  refuse_uneven(config, parts)
  step = parts.step(
    build_lib.step_rng(config)
  )  # its key is made here, not on the devices
  shapes = parts.batch_shapes(config.data.rows)
  with sharding.use(parts.mesh, parts.rules):
    return parts, lower_step(step, parts.abstract, shapes)


def needed_flops(config: ConfigDict, parts: build_lib.Parts) -> int:
  """Model FLOPs of a step over all devices; see `plan.flops.model_flops`."""
  rng = jax.random.key(0)

  def loss(params, batch):
    return parts.loss_fn(params, batch, rng, True)

  batch = parts.batch_shapes(config.data.rows)
  trained = parts.optimizer.trained
  return model_flops(loss, parts.abstract.params, trained, batch, _causal(parts.model))


def _causal(model: Any) -> list[str]:
  """Paths of the Transformers whose stream is causal: of every language model inside."""
  if isinstance(model, Unified):
    return ['transformer']
  inside = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
  return [f'{k}/transformer' for k, v in inside.items() if isinstance(v, Unified)]


def held(tree: Any) -> int:
  """Bytes that one device holds of a tree of shapes with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def _read_out(lowered, parts, topology, cache, options):
  """(Readout, None), or (None, bytes) if it doesn't fit; from the cache if it's there."""
  options = dict(options or {})
  told = (
    lowered.as_text(), importlib.metadata.version('libtpu'), topology.name,
    topology.slices, sorted(options.items()), _FORMAT, _code(),
  )  # fmt: skip
  key = hashlib.sha256(repr(told).encode()).hexdigest()[:32]
  path = cache and pathlib.Path(cache).expanduser() / f'{key}.json'
  if path and path.is_file():
    return _from_json(json.loads(path.read_text()))
  readout, needed = None, None
  try:
    compiled = lowered.compile(compiler_options=options)
    readout = read(compiled, topology.chip, parts.mesh, _labels(parts.abstract))
  except jax.errors.JaxRuntimeError as error:
    sizes = out_of_memory(error)
    if sizes is None:
      raise
    needed = sizes[0]
  if path:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f'.{os.getpid()}')
    fresh.write_text(json.dumps(_to_json(readout, needed)))
    os.replace(fresh, path)
  return readout, needed


def _labels(state: TrainState) -> tuple[Any, str]:
  """Names of the parts of a step's arguments."""
  ema = None if state.ema is None else 'optimizer'
  return TrainState('counts', 'params', 'optimizer', ema, 'counts', 'counts'), 'batch'


def _code() -> str:
  """A hash of what reads programs out: other code reads other numbers."""
  here = pathlib.Path(__file__).parent
  names = ('chips', 'hlo', 'costs', 'wire', 'readout')
  code = b''.join((here / f'{name}.py').read_bytes() for name in names)
  return hashlib.sha256(code).hexdigest()


def _to_json(readout: Readout | None, needed: int | None) -> dict[str, Any]:
  if readout is None:
    return {'needed': needed}
  tree = dataclasses.asdict(readout) | {'chip': readout.chip.name}
  return tree | {'ops': tree['ops'][:_KEPT_OPS]}


def _from_json(tree: dict[str, Any]) -> tuple[Readout | None, int | None]:
  if 'needed' in tree:
    return None, tree['needed']
  tree |= dict(
    chip=CHIPS[tree['chip']],
    ops=tuple(Op(**op) for op in tree['ops']),
    collectives=tuple(
      Collective(**c | {'axes': tuple(c['axes'])}) for c in tree['collectives']
    ),
    uncounted=tuple(tree['uncounted']),
    unknown_loops=tuple(tree['unknown_loops']),
  )
  return Readout(**tree), None
