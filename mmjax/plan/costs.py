"""What one instruction costs: FLOPs of its products, bytes to and from HBM.

  convolution  2 x outputs x inputs of each, over the window's places inside the image
               (libtpu prints every matrix product as a convolution)
  fusion       FLOPs of all inside; bytes of what goes in and out: of an operand that is
               only sliced inside, the slices; of one updated in place, the update
  Pallas       what the call says of itself (`cost_estimate`)

Bytes are those of whole tiles, and only of arrays in HBM, not in vector memory.
"""

import math
import re
from collections.abc import Iterable

from mmjax.plan.hlo import Array, Computation, Instruction, Module

COLLECTIVES = (
  'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
  'collective-permute', 'collective-broadcast',
)  # fmt: skip
# Names and bookkeeping: nothing is moved and nothing runs.
FREE = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'while',
  'conditional', 'call', 'partition-id', 'replica-id', 'opt-barrier', 'add-dependency',
}  # fmt: skip
_SLICES = {'dynamic-slice', 'slice', 'gather'}
_MARKS = {'AsyncCollectiveStart', 'AsyncCollectiveDone', 'AllocateBuffer'}
_VIEWS = {
  'ConcatBitcast', 'AssumeGatherIndicesInBound', 'GatherScatterIndicesBitpacked',
}  # fmt: skip


def collective(opcode: str) -> str | None:
  """The kind of a collective, of `-start` forms too; None of anything else."""
  kind = opcode.removesuffix('-start')
  return kind if kind in COLLECTIVES else None


def is_kernel(instruction: Instruction) -> bool:
  """Something runs on arrays: not a name, nor the end of what was started before, nor
  the scalar core's arithmetic on one number."""
  if instruction.opcode == 'custom-call':
    return instruction.target not in _MARKS | _VIEWS
  if instruction.opcode in FREE or instruction.opcode.endswith('-done'):
    return False
  makes_arrays = any(a.dims for a in instruction.arrays)
  whole = instruction.opcode in ('fusion', 'reduce') or collective(instruction.opcode)
  return makes_arrays or bool(whole)


def flops(module: Module, computation: Computation, instruction: Instruction) -> int:
  """FLOPs of the products of an instruction, one run."""
  if instruction.opcode in ('convolution', 'dot'):
    left, right = (computation.instructions[n].arrays[0] for n in instruction.operands)
    count = _convolution if instruction.opcode == 'convolution' else _dot
    return count(instruction, left, right)
  if instruction.opcode == 'custom-call':
    return instruction.cost_estimate.get('flops', 0)
  if instruction.opcode in ('fusion', 'async-start'):
    called = (module.computations[name] for name in instruction.calls)
    return sum(flops(module, c, i) for c in called for i in c.instructions.values())
  return 0


def _dot(instruction, left, right):
  contracted = re.findall(r'\d+', instruction.attribute('lhs_contracting_dims') or '')
  inner = math.prod(left.dims[int(i)] for i in contracted)
  return 2 * math.prod(instruction.arrays[0].dims) * inner


def _convolution(instruction, image, kernel):
  """As XLA counts: a place of the window outside of the image, or in a gap between the
  image's rows (`lhs_dilate`), isn't multiplied."""
  left, right, out = re.split('_|->', instruction.attribute('dim_labels'))
  batch = image.dims[left.index('b')]
  inputs, outputs = kernel.dims[right.index('i')], kernel.dims[right.index('o')]
  groups = int(instruction.attribute('batch_group_count') or 1)
  window = _window(instruction.attribute('window') or '{}')
  places = 1
  for axis in (c for c in out if c.isdigit()):
    given = {key: value[int(axis)] for key, value in window.items()}
    places *= _places(
      image.dims[left.index(axis)],
      kernel.dims[right.index(axis)],
      instruction.arrays[0].dims[out.index(axis)],
      **given,
    )
  return 2 * batch // groups * inputs * outputs * places


def _window(text):
  """{'stride': [1, 2], 'pad': [0, 1], ...}: only what is given."""
  found = {}
  for key in ('stride', 'pad', 'lhs_dilate', 'rhs_dilate'):
    match = re.search(rf'\b{key}=([-\d_x]+)', text)
    if match:
      found[key] = [int(v.split('_')[0]) for v in match[1].split('x')]
  return found


def _places(image, kernel, out, stride=1, pad=0, lhs_dilate=1, rhs_dilate=1):
  """Pairs of an output and a place of the window that meet a value, on one axis."""
  if kernel == out == 1 and pad == 0:
    return 1
  span = (image - 1) * lhs_dilate + 1
  count = 0
  for k in range(kernel):
    start = k * rhs_dilate - pad
    if lhs_dilate == 1:  # outputs o with 0 <= o * stride + start < image
      low = max(0, -(start // stride))
      high = min(out - 1, (span - 1 - start) // stride)
      count += max(0, high - low + 1)
    else:
      at = (o * stride + start for o in range(out))
      count += sum(0 <= a < span and a % lhs_dilate == 0 for a in at)
  return count


def hbm_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
  """Bytes that one run reads from HBM and writes there."""
  if not is_kernel(instruction) or instruction.opcode in ('send', 'recv'):
    return 0
  said = instruction.cost_estimate.get('bytes_accessed')
  if instruction.opcode == 'custom-call' and said is not None:
    return said
  operands = [computation.instructions[name] for name in instruction.operands]
  out = instruction.arrays
  if instruction.opcode == 'copy-start':  # (destination, source, flag)
    return _hbm(out[:2])
  if instruction.opcode == 'slice-start':  # ((source), destination, flag)
    source, moved = out[0], out[1]
    return (moved.bytes if source.space == 0 else 0) + _hbm([moved])
  if instruction.opcode.endswith('-start') and collective(instruction.opcode):
    return _hbm(out[: 2 * len(operands)])  # (operands, results, flags)
  if instruction.opcode == 'async-start':  # ((operands), result, flags)
    return _hbm(out)
  if instruction.opcode in _SLICES:
    source = operands[0].arrays[0]
    return (out[0].bytes if source.space == 0 else 0) + _hbm(out)
  if instruction.opcode in ('dynamic-update-slice', 'scatter'):
    update = operands[1 if instruction.opcode == 'dynamic-update-slice' else 2].arrays
    return _hbm(update) + (update[0].bytes if out[0].space == 0 else 0)
  if instruction.opcode == 'fusion':
    return _fusion(module, operands, instruction)
  return sum(_hbm(o.arrays) for o in operands) + _hbm(out)


def _hbm(arrays: Iterable[Array]) -> int:
  return sum(a.bytes for a in arrays if a.space == 0)


def _fusion(module, operands, fusion):
  inner = module.computations[fusion.calls[0]]
  if any(i.target == 'AsyncCollectiveStart' for i in inner.instructions.values()):
    return _hbm(fusion.arrays)  # (operand, result, flags), for all of its pieces
  total = 0
  for operand, parameter in zip(operands, inner.parameters):
    if any(a.space == 0 for a in operand.arrays):
      whole = sum(a.bytes for a in operand.arrays)
      total += min(whole, _read(module, inner, parameter))
  roots = [inner.root]
  if inner.root.opcode == 'tuple':
    roots = [inner.instructions[name] for name in inner.root.operands]
  if len(roots) != len(fusion.arrays):
    return total + _hbm(fusion.arrays)
  for root, array in zip(roots, fusion.arrays):
    if array.space == 0:
      total += _written(module, inner, root, array)
  return total


def _read(module, computation, value):
  """Bytes that are read of a value by all who use it, at most."""
  total = 0
  for user in computation.users[value.name]:
    if user.opcode == 'bitcast':
      total += _read(module, computation, user)
    elif user.opcode == 'tuple' or user.target in _MARKS:
      continue  # handed on
    elif collective(user.opcode) and is_piece(user):
      continue
    elif user.opcode in _SLICES and user.operands[0] == value.name:
      total += user.arrays[0].bytes
    elif user.opcode == 'dynamic-update-slice' and user.operands[0] == value.name:
      continue  # changed in place
    elif user.opcode == 'fusion':
      inner = module.computations[user.calls[0]]
      for name, parameter in zip(user.operands, inner.parameters):
        if name == value.name and _is_root(inner, parameter):
          total += _read(module, computation, user)
        elif name == value.name:
          total += _read(module, inner, parameter)
    else:
      return sum(a.bytes for a in value.arrays)
  return total


def is_piece(instruction):
  """A collective that was started by another fusion goes on in this one."""
  return 'async_collective_fusion_config' in instruction.attributes


def _is_root(computation, value):
  """The computation gives the value back, perhaps in another shape."""
  root = computation.root
  while root.opcode == 'bitcast':
    root = computation.instructions[root.operands[0]]
  return root is value


def _written(module, computation, root, array):
  while root.opcode == 'bitcast':
    root = computation.instructions[root.operands[0]]
  if root.opcode == 'parameter' or root.target in _MARKS:
    return 0  # handed on
  if collective(root.opcode) and is_piece(root):
    return 0
  if root.opcode == 'dynamic-update-slice':
    return computation.instructions[root.operands[1]].arrays[0].bytes
  if root.opcode == 'fusion':
    inner = module.computations[root.calls[0]]
    if inner.root.opcode != 'tuple':
      return _written(module, inner, inner.root, array)
  return array.bytes
