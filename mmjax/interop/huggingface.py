"""Models of Hugging Face in and out, without torch or transformers.

  model, params = load('path/to/SmolLM', mesh=mesh, rules=rules)
  export(model, params, 'path/to/mine')         transformers opens it

A tensor goes from its file straight to its place on the mesh, slice by slice: a
process reads what its devices hold, and of stacked layers one at a time, so that
the host never holds more than a tensor's slices. Which names and layouts belong
together stands in `interop.families`, in both directions at once; loading what was
exported gives the same bits.
"""

import dataclasses
import difflib
import fnmatch
import math
import pathlib
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmjax import sharding
from mmjax.interop import files
from mmjax.interop.families import FAMILIES, Family
from mmjax.interop.leaf import Leaf, join
from mmjax.interop.place import place
from mmjax.models import ENCODERS, MODELS, build, fields_of, padding
from mmjax.names import closest

# Fields that change no parameter, and that a config.json says nothing of.
FREE = {
  'dtype', 'param_dtype', 'dropout', 'remat', 'scan', 'unroll', 'chunk', 'reach',
  'attention',  'rope_sections', 'temperature_init', 'bias_init', 'max_scale',
}  # fmt: skip


def load(
  path: str | pathlib.Path,
  *,
  mesh: Mesh | None = None,
  rules: sharding.Rules | None = None,
  param_dtype: Any = None,
  **fields: Any,
) -> tuple[nn.Module, dict[str, Any]]:
  """A model and its parameters from config.json and safetensors.

  Args:
    path: a directory, or one .safetensors file with config.json beside it.
    mesh: where the parameters go, by `rules`; None = the first device.
    rules: see `sharding.rules_for`; None = every parameter whole on every device.
    param_dtype: of storage; None = what config.json says, which must be the files'.
    **fields: of the model, over those from config.json, e.g. dtype='bfloat16'.

  Returns:
    (model, params), with layers stacked; see the model's `unscanned`.

  Raises:
    ValueError: what is missing, extra, of a wrong shape or type, unknown, damaged
      or a pickle; one line.
  """
  source = files.Source(path)
  dtype = param_dtype or source.config.get('dtype') or source.config.get('torch_dtype')
  try:
    dtype = np.dtype(jnp.dtype(dtype or 'float32'))
  except TypeError as error:
    raise ValueError(f'{source.directory}: unknown dtype {dtype!r}') from error
  stored = None if param_dtype else dtype
  return assemble(source, family_of(source), dtype, stored, mesh, rules, fields)


def assemble(
  source: Any,
  family: Family,
  dtype: np.dtype,
  stored: np.dtype | None,
  mesh: Mesh | None,
  rules: sharding.Rules | None,
  fields: dict[str, Any],
) -> tuple[nn.Module, dict[str, Any]]:
  """The model that a source describes, and its parameters; see `load`.

  Args:
    source: as `interop.files.Source`.
    dtype: of the parameters.
    stored: which type the tensors must have; None = any floating one.
  """
  if fields.get('scan') is False:
    raise ValueError('load: layers come stacked; take `model.unscanned(params)` after it')
  model = model_of(source, family, param_dtype=dtype.name, **fields)
  shapes = shapes_of(model)
  leaves = leaves_of(family, model, shapes, source.names())
  check(source, family, model, leaves, shapes, stored)

  if mesh is None:
    mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  with sharding.outside():
    names = sharding.axis_names(model.init, jax.random.key(0), padding(model))['params']
  names = flax.traverse_util.flatten_dict(names, sep='/')
  rules = sharding.rules_for('dp') if rules is None else rules
  where = sharding.shardings(names, shapes, mesh, rules)
  params = {
    leaf.ours: place(source, leaf, shapes[leaf.ours], where[leaf.ours]) for leaf in leaves
  }
  return model, flax.traverse_util.unflatten_dict(params, sep='/')


def export(
  model: nn.Module,
  params: dict[str, Any],
  directory: str | pathlib.Path,
  *,
  max_shard_bytes: int = 5_000_000_000,
  **config: Any,
) -> None:
  """Writes a directory that transformers opens.

  Args:
    model, params: as from `load`.
    directory: made if absent; must not hold a model.
    max_shard_bytes: a file's size, which is also what the host holds at once.
    **config: what config.json says besides, e.g. max_position_embeddings=4096.

  Raises:
    ValueError: the model is no known architecture (says why it is none of them),
      or its parameters are not the model's, or not all of this process.
  """
  if not all(getattr(part, 'scan', True) for part in _parts(model)):
    raise ValueError('export: the layers are one by one; take the scanned model')
  shapes = shapes_of(model)
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  wrong = [
    k
    for k in sorted(flat.keys() | shapes.keys())
    if getattr(flat.get(k), 'shape', None) != getattr(shapes.get(k), 'shape', None)
  ]
  if wrong:
    raise ValueError(f'export: not the parameters of the model: {", ".join(wrong[:5])}')
  whole = [k for k, x in flat.items() if not getattr(x, 'is_fully_addressable', True)]
  if whole:
    raise ValueError(f'export: {whole[0]} is spread over processes; gather it first')
  kind, family, said = _architecture(model, shapes)
  leaves = leaves_of(family, model, shapes, None)
  groups: dict[tuple[str, int | None], list[Leaf]] = {}
  for leaf in leaves:
    for i in range(shapes[leaf.ours].shape[0]) if leaf.stacked else [None]:
      groups.setdefault((leaf.theirs.format(i), i), []).append(leaf)

  def tensors():
    for (name, i), parts in groups.items():
      arrays = {
        p.ours: np.asarray(flat[p.ours] if i is None else flat[p.ours][i]) for p in parts
      }
      yield name, join(parts, arrays)

  sizes = {
    name: sum(math.prod(flat[p.ours].shape[p.stacked :]) for p in parts)
    * np.dtype(flat[parts[0].ours].dtype).itemsize
    for (name, _), parts in groups.items()
  }
  dtypes = sorted({np.dtype(x.dtype).name for x in flat.values()})
  if len(dtypes) > 1 or dtypes[0] not in files.FLOATS.values():
    raise ValueError(f'export: parameters must be of one floating type, not {dtypes}')
  said = {**said, 'model_type': kind, 'dtype': dtypes[0], **config}
  files.write(pathlib.Path(directory), said, sizes, tensors(), max_shard_bytes)


def model_of(source: Any, family: Family, **given: Any) -> nn.Module:
  """The model that a source's config describes.

  Args:
    **given: fields over those; what is no field of the model goes to all parts that
      have it.

  Raises:
    ValueError: the config lacks a key, or says what the model can't do.
  """
  try:
    said = family.fields(source.config, source.names())
  except KeyError as error:
    raise ValueError(f'{source.config_name} has no {error}') from error
  known = fields_of((MODELS | ENCODERS)[family.model])
  own = {k: v for k, v in given.items() if k in known}
  shared = {k: v for k, v in given.items() if k not in known or k == 'param_dtype'}
  model = build(family.model, shared=shared, **{**said, **own})
  for name in shared:
    if not any(hasattr(part, name) for part in _parts(model)):
      raise ValueError(
        f'model {family.model!r} has no field {name!r}{closest(name, known)}'
      )
  return model


def _parts(model: nn.Module):
  """The module and the modules that are its fields, and theirs."""
  yield model
  for name in fields_of(type(model)):
    if isinstance(getattr(model, name), nn.Module):
      yield from _parts(getattr(model, name))


def shapes_of(model: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a model's parameters by path."""
  with sharding.outside():
    made = jax.eval_shape(model.init, jax.random.key(0), padding(model))['params']
  return flax.traverse_util.flatten_dict(made, sep='/')


def family_of(source: files.Source) -> Family:
  """The family of a directory.

  Raises:
    ValueError: an architecture that isn't known.
  """
  kind = source.config.get('model_type')
  if kind not in FAMILIES:
    raise ValueError(
      f'{source.directory}: unknown architecture {kind!r}{closest(kind, FAMILIES)}'
    )
  return FAMILIES[kind]


def leaves_of(family, model, shapes, stored) -> list[Leaf]:
  """The leaves that the model has, under the names that the files use."""
  found = [leaf for leaf in family.table(model) if leaf.ours in shapes]
  if lost := sorted(set(shapes) - {leaf.ours for leaf in found}):
    raise ValueError(f'the architecture has no weights for {", ".join(lost)}')
  if stored is None:
    return found
  return [dataclasses.replace(f, theirs=family.spell(f.theirs, stored)) for f in found]


def check(source, family, model, leaves, shapes, dtype) -> None:
  """Compares the tensors there are with those there should be."""
  want = {}
  for leaf in leaves:
    shape = shapes[leaf.ours].shape
    for i in range(shape[0]) if leaf.stacked else [None]:
      want[leaf.theirs.format(i)] = leaf.their_shape(shape[leaf.stacked :])
  there = source.names()
  ignored = list(family.unused(model))
  for leaf in family.table(model):  # tied: a copy of the table says nothing new
    if leaf.ours.rpartition('/')[2] == 'head' and leaf.ours not in shapes:
      ignored.append(family.spell(leaf.theirs, there))
  extra = [
    name
    for name in sorted(there - want.keys())
    if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)
  ]
  problems = []
  for name in want.keys() - there:
    near = difflib.get_close_matches(name, extra, n=1)
    hint = f' (nearest: {near[0]})' if near else ''
    if name == 'lm_head.weight':
      hint = ', and config.json does not tie it (tie_word_embeddings)'
    problems.append(f'{name} is missing{hint}')
  for name in extra:
    near = difflib.get_close_matches(name, want.keys(), n=1)
    problems.append(f'{name} is extra' + (f' (nearest: {near[0]})' if near else ''))
  for name in want.keys() & there:
    if source.shape(name) != want[name]:
      problems.append(f'{name} is {list(source.shape(name))}, not {list(want[name])}')
    stored = source.dtype(name)
    if stored not in files.FLOATS:
      problems.append(f'{name} is of type {stored}, not one of {", ".join(files.FLOATS)}')
    elif dtype is not None and files.FLOATS[stored] != dtype.name:
      problems.append(
        f'{name} is of type {stored}, config.json says {dtype.name}; give param_dtype'
      )
  if problems:
    more = f'; and {len(problems) - 8} more' if len(problems) > 8 else ''
    raise ValueError(f'{source.directory}: {"; ".join(sorted(problems)[:8])}{more}')


def _architecture(model, shapes) -> tuple[str, Family, dict[str, Any]]:
  """The family whose config.json gives back this model."""
  reasons = []
  for kind, family in FAMILIES.items():
    if not isinstance(model, (MODELS | ENCODERS)[family.model]):
      continue
    try:
      config = family.config(model)
      names = {leaf.theirs for leaf in family.table(model) if leaf.ours in shapes}
      again = build(family.model, **family.fields(config, names))
    except ValueError as error:
      reasons.append(f'{kind} ({error})')
      continue
    differ = list(differences(model, again))
    if not differ:
      return kind, family, config
    reasons.append(f'{kind} ({", ".join(differ)})')
  raise ValueError(
    f'export: {type(model).__name__} is none of {", ".join(sorted(FAMILIES))}'
    + (f': {"; ".join(reasons)}' if reasons else '')
  )


def differences(model: nn.Module, other: nn.Module, prefix: str = '', free=FREE):
  """The fields in which two models of one class are not the same, as text."""
  for k in fields_of(type(model)):
    a, b = getattr(model, k), getattr(other, k)
    if isinstance(a, nn.Module) and type(a) is type(b):
      yield from differences(a, b, f'{prefix}{k}.', free)
    elif k not in free and a != b:
      yield f'{prefix}{k}={a!r}, not {b!r}'
