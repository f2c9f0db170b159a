"""Names beside shapes: how every array finds its place on a mesh.

A parameter is made with the names of its axes; an activation names its axes
where it is constrained. One strict table of rules turns names into mesh axes:

  param(self, 'up', init, (D, F), ('embed', 'mlp'))     weight axes
  constrain(h, 'batch', 'seq', 'act_mlp')               activation axes
  RULES['fsdp+tensor'] = {'embed': 'fsdp', 'mlp': 'tensor', 'act_mlp': 'tensor', ...}

The names stay off the tree: `init` gives plain arrays, and `axis_names` gives
the same tree of names, without computing anything. Weight axes and activation
axes are separate words, since an 'embed' that is split over fsdp in a weight
is whole in an activation. Every mistake (unknown name, two names on one mesh
axis, a size that does not divide) is a `ValueError` that names the parameter.
"""

import collections
import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.batch import Bank, Stream
from mmjax.names import closest, pick

MESH_AXES = ('slice', 'data', 'fsdp', 'tensor', 'context', 'expert')
_ROWS = ('slice', 'data', 'fsdp')  # what the rows of a batch are split over

MeshAxes = str | tuple[str, ...] | None
Rules = Mapping[str, MeshAxes]

_PARAM_AXES = (
  'embed', 'mlp', 'heads', 'kv_heads', 'head_dim', 'layers', 'vocab', 'experts',
  'latents', 'patch', 'channels',
)  # fmt: skip
_ACT_AXES = (
  'batch', 'seq', 'kv_seq', 'act_embed', 'act_mlp', 'act_heads', 'act_kv_heads',
  'attend_heads', 'act_experts', 'act_vocab',
)  # fmt: skip
_DP = {
  **dict.fromkeys(_PARAM_AXES + _ACT_AXES),
  'batch': _ROWS,
  'seq': 'context',
  # 'kv_seq': None gathers keys, 'attend_heads': 'context' swaps slots for heads in
  # attention, and as it is keys go round a ring: see `ops.context`.
  'kv_seq': 'context',
}
_FSDP = {**_DP, 'embed': 'fsdp', 'channels': 'fsdp'}
_TENSOR = {
  **dict.fromkeys(('heads', 'kv_heads', 'mlp', 'vocab'), 'tensor'),
  **dict.fromkeys(('act_heads', 'act_kv_heads', 'act_mlp', 'act_vocab'), 'tensor'),
}
RULES: dict[str, Rules] = {
  'dp': _DP,
  'fsdp': _FSDP,
  'fsdp+tensor': {**_FSDP, **_TENSOR},
}

_naming = contextvars.ContextVar('naming', default=False)
_rules: contextvars.ContextVar[Rules | None] = contextvars.ContextVar(
  'rules', default=None
)


def param(
  module: nn.Module,
  name: str,
  init: nn.initializers.Initializer,
  shape: Sequence[int],
  axes: Sequence[str | None],
  dtype: Any = jnp.float32,
) -> jax.Array:
  """Makes a parameter with the names of its axes; the value is a plain array.

  Raises:
    ValueError: the names don't match the shape one to one.
  """
  if len(axes) != len(shape):
    raise ValueError(f'{name}: axes {tuple(axes)} do not name shape {tuple(shape)}')
  if _naming.get():
    init = nn.with_logical_partitioning(init, tuple(axes))
  return module.param(name, init, tuple(shape), dtype)


def axis_names(init_fn, *args) -> Any:
  """The tree of axis names of `init_fn(*args)`, traced but not computed.

  Leaves are `PartitionSpec`s that hold names, not mesh axes.
  """
  token = _naming.set(True)
  try:
    # A fresh function, so that no cached trace without names is reused.
    boxed = jax.eval_shape(lambda *a: init_fn(*a), *args)
  finally:
    _naming.reset(token)
  return nn.get_partition_spec(boxed)


def rules_for(preset: str, overrides: Rules | None = None) -> Rules:
  """The rule table of a preset, with overrides.

  Raises:
    ValueError: unknown preset, axis name or mesh axis.
  """
  rules = dict(pick('sharding preset', preset, RULES))
  for name, axes in (overrides or {}).items():
    if name not in rules:
      raise ValueError(f'sharding rule for unknown axis {name!r}{closest(name, rules)}')
    for axis in _tuple(axes):
      if axis not in MESH_AXES:
        raise ValueError(
          f'sharding rule {name!r} names mesh axis {axis!r}{closest(axis, MESH_AXES)}'
        )
    rules[name] = tuple(axes) if isinstance(axes, list) else axes
  return rules


def to_spec(
  names: Sequence[str | None],
  rules: Rules,
  where: str = 'array',
  shape: Sequence[int] | None = None,
  mesh: Mesh | None = None,
) -> P:
  """Turns axis names into a `PartitionSpec` of mesh axes, strictly.

  Args:
    names: one axis name, or None, per dimension.
    rules: from names to mesh axes.
    where: what to call the array in errors (its path).
    shape, mesh: if given, each size is checked to divide over its mesh axes.

  Raises:
    ValueError: see above; one line.
  """
  if shape is not None and len(names) != len(shape):
    raise ValueError(f'{where}: names {tuple(names)} do not name shape {tuple(shape)}')
  for name in names:
    if name is not None and name not in rules:
      raise ValueError(
        f'{where}: no sharding rule for axis {name!r}{closest(name, rules)}'
      )
  axes = [None if name is None else rules[name] for name in names]
  used = [a for entry in axes for a in _tuple(entry)]
  if len(set(used)) != len(used):
    raise ValueError(f'{where}: axes {tuple(names)} use a mesh axis twice: {axes}')
  if shape is not None and mesh is not None:
    for name, size, entry in zip(names, shape, axes):
      parts = math.prod(mesh.shape[a] for a in _tuple(entry))
      if size % parts:
        near = [n for n in (size // parts * parts, -(-size // parts) * parts) if n]
        raise ValueError(
          f'{where}: axis {name!r} of size {size} does not divide over {entry} = {parts};'
          f' {" or ".join(map(str, near))} would'
        )
  return P(*axes)


def shardings(names: Any, abstract: Any, mesh: Mesh, rules: Rules) -> Any:
  """A tree of `NamedSharding` for a tree of arrays (or shapes) and its names.

  Raises:
    ValueError: a rule is missing, doubled or does not divide (with the path).
  """

  def one(path, spec, leaf):
    where = jax.tree_util.keystr(path, simple=True, separator='/')
    return NamedSharding(mesh, to_spec(tuple(spec), rules, where, leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(
    one, names, abstract, is_leaf=lambda x: isinstance(x, P)
  )


def make_mesh(sizes: Mapping[str, int] | None = None, devices=None) -> Mesh:
  """A mesh over all devices with every axis of `MESH_AXES`; -1 fills one axis.

    {'data': 4, 'fsdp': -1} on two slices of 16 devices

               fsdp                         fsdp
            +---------+                  +---------+
      data  |  4 x 4  |  <-- slice 2 --> |  4 x 4  |     networks: slice slow, others fast
            +---------+                  +---------+

  A slice is what a fast network joins: a TPU slice, or GPUs on one NVLink (as a rule a
  node), by `slice_index` of the devices. The axis `slice` is outermost and as large as
  there are slices, without being given.

  Args:
    sizes: e.g. {'data': -1, 'tensor': 2}; axes not named have size 1. Empty means all
      devices on 'data'. With 'slice' 1, an axis may reach over several nodes of GPUs.
      CPU devices stand in for any number of slices.
    devices: default `jax.devices()`.

  Raises:
    ValueError: unknown axis, two -1, a 'slice' that isn't the number of slices, slices
      of different sizes, or sizes that don't multiply to the number of devices; says
      which would.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = dict(sizes or {'data': -1})
  for axis, size in sizes.items():
    if axis not in MESH_AXES:
      raise ValueError(f'unknown mesh axis {axis!r}{closest(axis, MESH_AXES)}')
    if size < 1 and size != -1:
      raise ValueError(f'mesh axis {axis!r} has size {size}; it must be positive, or -1')
  held = collections.Counter(getattr(d, 'slice_index', 0) for d in devices)
  slices = len(held)
  sizes = _filled({'slice': slices, **sizes}, len(devices))
  platform = devices[0].platform
  may = {'tpu': (slices,), 'cpu': (sizes['slice'],)}.get(platform, (1, slices))
  if sizes['slice'] not in may:
    raise ValueError(
      f"mesh axis 'slice' is {sizes['slice']}, but the number of slices is {slices};"
      ' leave it out'
    )
  shape = tuple(sizes.get(a, 1) for a in MESH_AXES)
  if sizes['slice'] == slices > 1:
    if len(set(held.values())) > 1:
      raise ValueError(f'slices of different sizes: {sorted(held.values())} devices')
    outer = (slices,) + (1,) * (len(shape) - 1)
    grid = mesh_utils.create_hybrid_device_mesh(
      (1, *shape[1:]), outer, devices, allow_split_physical_axes=True
    )
  else:
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def _filled(sizes: dict[str, int], n: int) -> dict[str, int]:
  """The sizes with -1 filled, so that their product is n."""
  free = [a for a, size in sizes.items() if size == -1]
  if len(free) > 1:
    raise ValueError(f'mesh axes {free} are all -1; only one can be filled')
  known = math.prod(size for size in sizes.values() if size != -1)
  if n % known == 0 and (free or n == known):
    return {a: n // known if size == -1 else size for a, size in sizes.items()}
  fits = []
  for axis, size in sizes.items():
    room, rest = divmod(n, known // size)
    if axis != 'slice' and size != -1 and not rest:
      good = [k for k in range(1, room + 1) if room % k == 0] if free else [room]
      fits.append(f'{axis} = {" or ".join(map(str, good))}')
  told = ', '.join(f'{a} = {size}' for a, size in sizes.items() if size != 1)
  would = '; or '.join(fits) or f'sizes whose product divides {n}'
  takes = f'a multiple of {known}' if free else str(known)
  raise ValueError(f'mesh {told} needs {takes} devices, there are {n}; fits: {would}')


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules):
  """Inside, `constrain` acts; outside it does nothing."""
  token = _rules.set(dict(rules))
  try:
    with jax.set_mesh(mesh):
      yield
  finally:
    _rules.reset(token)


@contextlib.contextmanager
def outside():
  """As outside of `use`, for shapes of a model that are asked for inside of it."""
  token = _rules.set(None)
  try:
    yield
  finally:
    _rules.reset(token)


@contextlib.contextmanager
def changed(**axes: MeshAxes):
  """Inside, `constrain` goes by the rules in use but for these."""
  token = _rules.set({**(_rules.get() or {}), **axes})
  try:
    yield
  finally:
    _rules.reset(token)


def inside() -> bool:
  """Whether this is inside of `use`."""
  return _rules.get() is not None


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Places an activation by the names of its axes; nothing outside of `use`.

  Raises:
    ValueError: inside of `use`, if the names don't fit the array or the mesh.
  """
  rules = _rules.get()
  if rules is None:
    return x
  mesh = jax.sharding.get_abstract_mesh()
  spec = to_spec(names, rules, f'activation {x.shape}', x.shape, mesh)
  return jax.lax.with_sharding_constraint(x, spec)


def device() -> tuple[str, str]:
  """(platform, kind) of what is computed on here, e.g. ('tpu', 'TPU v5 lite').

  Inside of `use` these are the mesh's devices, present or not: programs are compiled
  ahead of time for those that aren't. Else it is this process' default.
  """
  one = jax.sharding.get_abstract_mesh().abstract_device or jax.local_devices()[0]
  return one.platform, one.device_kind


def one_cpu() -> bool:
  """Whether all is computed by one CPU."""
  return device()[0] == 'cpu' and jax.sharding.get_abstract_mesh().size <= 1


def mesh_axes(name: str) -> tuple[str, ...]:
  """The mesh axes, those of several devices, that an axis is split over here.

  None outside of `use`.
  """
  rules = _rules.get()
  if rules is None:
    return ()
  shape = jax.sharding.get_abstract_mesh().shape
  return tuple(a for a in _tuple(to_spec((name,), rules)[0]) if shape[a] > 1)


def parts(name: str) -> int:
  """Into how many parts an axis is split here: 1 outside of `use`."""
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape[a] for a in mesh_axes(name))


def batch_names(batch: Any) -> Any:
  """The names of a batch's axes, as a tree of `PartitionSpec`s like `axis_names`.

  The slots of a stream and the patches of a bank are 'seq'; items are whole, and so is
  all but the rows of what is no part of a `PackedBatch`.
  """

  def rows(leaf):
    return P('batch', *[None] * (leaf.ndim - 1))

  def slots(leaf):
    return P('batch', 'seq', *[None] * (leaf.ndim - 2))

  def one(part):
    if not isinstance(part, Stream | Bank):
      return rows(part)
    names = jax.tree.map(slots, part)
    if isinstance(part, Stream):
      return names
    items = {f: rows(getattr(part, f)) for f in ('item_segments', 'item_order')}
    return dataclasses.replace(names, **items)

  return jax.tree.map(one, batch, is_leaf=lambda x: isinstance(x, Stream | Bank))


def batch_shardings(batch: Any, mesh: Mesh, rules: Rules) -> Any:
  """Shardings of a batch: rows over the row axes, slots and patches as 'seq'.

  Raises:
    ValueError: a size doesn't divide over the mesh (with the field and what would).
  """

  def one(path, leaf, names):
    where = 'batch' + jax.tree_util.keystr(path)
    return NamedSharding(mesh, to_spec(tuple(names), rules, where, leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(one, batch, batch_names(batch))


def whole_stream(rules: Rules) -> Rules:
  """The rules with streams and their keys not split, for streams of any length."""
  return {**rules, 'seq': None, 'kv_seq': None}


def row_block(rows: int, mesh: Mesh, rules: Rules) -> tuple[int, int]:
  """Which block of a batch's rows this process loads: (index, number of blocks).

  One block per process, unless the model is split over processes: those whose
  devices hold the same rows load the same block.

  Raises:
    ValueError: the rows don't divide over the mesh, or processes hold rows that
      partly overlap.
  """
  where = NamedSharding(mesh, to_spec(('batch',), rules, 'batch', (rows,), mesh))
  held = {}
  for device, (part,) in where.devices_indices_map((rows,)).items():
    held.setdefault(device.process_index, set()).add(part.indices(rows)[:2])
  blocks = sorted({tuple(sorted(parts)) for parts in held.values()})
  spans = [span for block in blocks for span in block]
  if len({len(block) for block in blocks}) > 1 or len(set(spans)) < len(spans):
    raise ValueError(
      f'rows over {where.spec}: processes hold overlapping rows {blocks}; give the mesh'
      ' axes of the rows, or of the model, whole processes'
    )
  return blocks.index(tuple(sorted(held[jax.process_index()]))), len(blocks)


def place_batch(local: Any, global_rows: int, mesh: Mesh, rules: Rules) -> Any:
  """Builds the global batch from the rows that this process has loaded.

  Args:
    local: a batch of NumPy arrays, [rows of this process' `row_block`, ...], with
      whole streams and banks, also where this process holds a part of them.
    global_rows: rows over all processes.
  """

  def shape(leaf):
    return jax.ShapeDtypeStruct((global_rows, *leaf.shape[1:]), leaf.dtype)

  specs = batch_shardings(jax.tree.map(shape, local), mesh, rules)
  return jax.tree.map(
    lambda s, leaf: jax.make_array_from_process_local_data(
      s, leaf, (global_rows, *leaf.shape[1:])
    ),
    specs,
    local,
  )


def table(abstract: Any, shardings_: Any) -> str:
  """A printable table: path, shape, spec and bytes per device of each leaf."""
  rows = [('parameter', 'shape', 'spec', 'bytes/device')]
  total = 0
  for path, leaf, s in _leaves(abstract, shardings_):
    size = math.prod(s.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
    total += size
    spec = ', '.join('-' if e is None else '+'.join(_tuple(e)) for e in s.spec)
    rows.append((path, 'x'.join(map(str, leaf.shape)), spec, f'{size:,}'))
  rows.append(('total', '', '', f'{total:,}'))
  widths = [max(len(r[i]) for r in rows) for i in range(4)]
  return '\n'.join(
    '  '.join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows
  )


def refuse_replicated(abstract: Any, shardings_: Any, limit: float) -> None:
  """Refuses a layout that leaves many parameter bytes whole on every device.

  Raises:
    ValueError: the share of bytes in unsplit leaves is over `limit`, though the
      mesh has axes to split parameters over.
  """
  total, whole, worst = 0, 0, []
  for path, leaf, s in _leaves(abstract, shardings_):
    if s.mesh.size == 1:
      return
    size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    total += size
    if s.is_fully_replicated:
      whole += size
      worst.append((size, path))
  if total and whole / total > limit:
    names = ', '.join(path for _, path in sorted(worst, reverse=True)[:3])
    raise ValueError(
      f'{whole / total:.0%} of parameter bytes are replicated on every device, over'
      f' sharding.max_replicated = {limit:.0%}; the largest: {names}'
    )


def _leaves(abstract, shardings_):
  flat = jax.tree_util.tree_leaves_with_path(abstract)
  for (path, leaf), s in zip(flat, jax.tree.leaves(shardings_), strict=True):
    yield jax.tree_util.keystr(path, simple=True, separator='/'), leaf, s


def _tuple(entry: MeshAxes) -> tuple[str, ...]:
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)
