"""Pretrained parts for a larger model: a file's parameters, as a module wants them.

  spec                      what
  a directory               Hugging Face, see `interop.huggingface`
  model.gguf                see `interop.gguf`
  efficientnet-lite0-*.pth  see `interop.efficientnet`
  package:NAME/FILE         one of these inside an installed package

The module says what it is and the file what it holds; where that differs in what is
computed, it is an error that names both values. Where only sizes differ, parameters
are fitted (`interop.surgery`): positions are read on another grid or cut, words added.
"""

import dataclasses
import fnmatch
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from mmjax.files import find
from mmjax.interop import files, gguf, huggingface, surgery
from mmjax.interop.leaf import Leaf
from mmjax.interop.place import place
from mmjax.models import fields_of
from mmjax.names import closest

# Fields that show in the tree of parameters, and nowhere else.
_IN_TREE = {
  'vocab_size', 'max_positions', 'position_grid', 'media', 'pooler', 'mlm_head',
  'num_types', 'tie_embeddings', 'modality_embedding', 'pool', 'class_token',
  'give_class', 'num_classes',
}  # fmt: skip
# By the end of a path, where the words are.
_WORDS = {'embed/text': 0, 'head': 1, 'head_bias': 0}


@dataclasses.dataclass(frozen=True)
class Part:
  """Where a part's parameters come from; `config.init` holds these by name.

  Fields:
    spec: see the top of the file.
    take: which part of the file's model is meant, a name of its fields, as 'vision' of
      CLIP; '' = all of it.
    allow_missing: patterns of the module's paths that the file need not have.
    ignore: patterns of the file's parameters, by our paths, that the module need not
      have.
    grow: new words are added where the module has more than the file.
    seed: of what the new words are.
  """

  spec: str
  take: str = ''
  allow_missing: Sequence[str] = ()
  ignore: Sequence[str] = ()
  grow: bool = False
  seed: int = 0


def load_into(
  module: nn.Module,
  abstract_params: Any,
  spec: str | Part,
  *,
  initial: Any = None,
  **options: Any,
) -> Any:
  """The module's parameters from a file, each at its place.

  Args:
    module: a model or an encoder, its layers stacked.
    abstract_params: shapes and dtypes with shardings (arrays do); without shardings,
      everything goes to the first device.
    spec: see the top of the file.
    initial: a tree to take from what the file need not have.
    **options: the other fields of `Part`.

  Raises:
    ValueError: another architecture, missing or extra parameters, sizes that can't be
      fitted, a file that can't be read; one line.
  """
  part = spec if isinstance(spec, Part) else Part(spec, **options)
  found = read(module, abstract_params, part)
  paths = flax.traverse_util.flatten_dict(abstract_params, sep='/')
  kept = flax.traverse_util.flatten_dict(initial or {}, sep='/')
  if lost := sorted(paths.keys() - found.keys() - kept.keys()):
    raise ValueError(f'{part.spec} has no {lost[0]}; give `initial` to take it from')
  whole = {k: found[k] if k in found else kept[k] for k in paths}
  return flax.traverse_util.unflatten_dict(whole, sep='/')


def load_parts(
  model: nn.Module, abstract_params: Any, init: Mapping[str, Any]
) -> dict[str, jax.Array]:
  """What `config.init` names: {path in the model's tree: parameter}.

  Args:
    init: {name of a field, or 'model' for all of it: a spec, or the fields of `Part`}.

  Raises:
    ValueError: no such part, or what `load_into` raises, with the part's name.
  """
  found = {}
  inner = {k: x for k, x in parts_of(model).items() if k in abstract_params}
  known = [field.name for field in dataclasses.fields(Part)]
  for name, said in init.items():
    if name not in {'model', *inner}:
      raise ValueError(f'init: no part {name!r}{closest(name, ["model", *inner])}')
    said = {'spec': said} if isinstance(said, str) else dict(said)
    for key in said:
      if key not in known:
        raise ValueError(f'init.{name} has no {key!r}{closest(key, known)}')
    if not isinstance(said.get('spec'), str):
      raise ValueError(f'init.{name} needs a spec: a path or package:NAME/FILE')
    whole = name == 'model'
    module = model if whole else inner[name]
    params = abstract_params if whole else abstract_params[name]
    try:
      part = read(module, params, Part(**said))
    except ValueError as error:
      raise ValueError(f'init.{name}: {error}') from error
    found |= part if whole else {f'{name}/{k}': x for k, x in part.items()}
  return found


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
  """The modules that are a model's fields, by name."""
  found = {name: getattr(model, name) for name in fields_of(type(model))}
  return {name: x for name, x in found.items() if isinstance(x, nn.Module)}


def read(module: nn.Module, abstract_params: Any, part: Part) -> dict[str, jax.Array]:
  """What the file has of the module's parameters, by path; see `load_into`."""
  want = flax.traverse_util.flatten_dict(abstract_params, sep='/')
  path = find(part.spec)
  if path.suffix == '.pth':
    return _read_pth(path, module, want, part)
  if not getattr(module, 'scan', True):
    raise ValueError(f'{part.spec}: layers come stacked; the module must have scan=True')
  if path.suffix == '.gguf':
    source, family = gguf.read(path)
  else:
    source = files.Source(path)
    family = huggingface.family_of(source)
  theirs = huggingface.model_of(source, family)
  shapes = huggingface.shapes_of(theirs)
  leaves = huggingface.leaves_of(family, theirs, shapes, source.names())
  huggingface.check(source, family, theirs, leaves, shapes, None)
  shapes = {k: x.shape for k, x in shapes.items()}
  leaves = {leaf.ours: leaf for leaf in leaves}
  if part.take:
    inner = parts_of(theirs)
    if part.take not in inner:
      raise ValueError(
        f'{part.spec} has no part {part.take!r}{closest(part.take, inner)}'
      )
    theirs, top = inner[part.take], f'{part.take}/'
    shapes = {k.removeprefix(top): x for k, x in shapes.items() if k.startswith(top)}
    leaves = {k.removeprefix(top): x for k, x in leaves.items() if k.startswith(top)}
  if type(theirs) is not type(module):
    raise ValueError(
      f'{part.spec} holds {type(theirs).__name__}, the part is {type(module).__name__}'
    )
  free = huggingface.FREE | _IN_TREE
  if differ := list(huggingface.differences(module, theirs, free=free)):
    raise ValueError(f'{part.spec} holds another model: here {"; here ".join(differ)}')
  _compare(want, leaves, part)
  grids = [getattr(m, 'position_grid', None) for m in (theirs, module)]
  return {
    k: _fit(source, leaves[k], shapes[k], x, part, grids)
    for k, x in want.items()
    if k in leaves and not _matches(k, part.ignore)
  }


def _compare(want, have, part: Part) -> None:
  """Refuses parameters that only one side has, unless a pattern lets them be."""
  for what, patterns, paths in (
    ('allow_missing', part.allow_missing, want),
    ('ignore', part.ignore, have),
  ):
    for pattern in patterns:
      if not fnmatch.filter(paths, pattern):
        told = ', '.join(sorted(paths))
        raise ValueError(
          f'{part.spec}: {what}={pattern!r} matches no parameter (there are: {told})'
        )
  taken = {k for k in have if not _matches(k, part.ignore)}
  lost = sorted(k for k in want.keys() - taken if not _matches(k, part.allow_missing))
  more = sorted(taken - want.keys())
  told = [f'it lacks {", ".join(lost)} (see allow_missing)'] if lost else []
  told += [f'the model lacks {", ".join(more)} (see ignore)'] if more else []
  if told:
    raise ValueError(f'{part.spec}: {"; ".join(told)}')


def _matches(path, patterns) -> bool:
  return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _fit(source, leaf: Leaf, shape, abstract, part: Part, grids) -> jax.Array:
  """A parameter at its place, fitted if only its size is another."""
  if tuple(shape) == tuple(abstract.shape):
    return place(source, leaf, abstract, _where(abstract))
  name, have, want = leaf.ours, list(shape), list(abstract.shape)
  words = [a for k, a in _WORDS.items() if f'/{name}'.endswith(f'/{k}')]
  whole = tuple(slice(0, n) for n in shape)

  def all_of_it():
    return leaf.take(source[leaf.theirs], shape, whole)

  if words and want[words[0]] > have[words[0]]:
    size, old = want[words[0]], have[words[0]]
    if not part.grow:
      raise ValueError(
        f'{part.spec} has {old} words, the model {size}; grow=True adds new ones'
      )
    x = surgery.grow_vocabulary(all_of_it(), size, axis=words[0], seed=part.seed)
  elif words:
    raise ValueError(
      f'{part.spec} has {have[words[0]]} words, the model only {want[words[0]]}; set its'
      ' vocab_size'
    )
  elif name.endswith('embed/positions') and want[0] < have[0]:
    x = surgery.cut_positions(all_of_it(), want[0])
  elif name.endswith('position') and None not in grids:
    x = surgery.resize_positions(all_of_it(), *grids)
  else:
    raise ValueError(f'{part.spec}: {name} is {have}, the model wants {want}')
  return _put(x, abstract)


def _read_pth(path: pathlib.Path, module, want, part: Part) -> dict[str, jax.Array]:
  from mmjax.interop.efficientnet import load_efficientnet

  found = flax.traverse_util.flatten_dict(load_efficientnet(path, module), sep='/')
  _compare(want, found, part)
  found = {k: x for k, x in found.items() if k in want and not _matches(k, part.ignore)}
  for name, x in found.items():
    if tuple(x.shape) != tuple(want[name].shape):
      raise ValueError(
        f'{part.spec}: {name} is {list(x.shape)}, the model wants'
        f' {list(want[name].shape)}'
      )
  return {name: _put(np.asarray(x), want[name]) for name, x in found.items()}


def _put(x: np.ndarray, abstract) -> jax.Array:
  x = x.astype(abstract.dtype, copy=False)
  return jax.make_array_from_callback(x.shape, _where(abstract), lambda i: x[i])


def _where(abstract) -> jax.sharding.NamedSharding:
  found = getattr(abstract, 'sharding', None)
  if isinstance(found, jax.sharding.NamedSharding):
    return found
  mesh = jax.make_mesh((1,), ('data',), devices=jax.devices()[:1])
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
