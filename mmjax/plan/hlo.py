"""Reads the text of an optimised TPU program, as `compiled.as_text()` prints it.

  ENTRY %main (p: f32[8,128]) -> f32[8,128] {
    %p = f32[8,128]{1,0:T(8,128)} parameter(0), metadata={op_name="x"}
    ROOT %w = f32[8,128]{1,0:T(8,128)S(1)} fusion(%p), kind=kLoop, calls=%inner, ...
         name  type, dims, layout, tiles, space   opcode operands   attributes

Space S(1) is the chip's vector memory, none is HBM. A loop's body is printed once; how
often it runs stands in no attribute, so it is taken from the condition (counter < bound),
the counter's first value and its step.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

import numpy as np

_BITS = {
  'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16, 's32': 32,
  'u32': 32, 's64': 64, 'u64': 64, 'bf16': 16, 'f16': 16, 'f32': 32, 'f64': 64,
  'c64': 64, 'c128': 128,
}  # fmt: skip
_ARRAY = re.compile(r'([a-z][a-z0-9]*)\[([0-9,<=]*)\](?:\{([^{}]*)\})?')
_HEAD = re.compile(r'^(ENTRY )?%?([^\s(]+) \(.*\) -> .*\{$')
_NAME = re.compile(r'%([^\s,(){}]+)')


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of an instruction's result: type, dimensions and where it lies."""

  dtype: str
  dims: tuple[int, ...]
  space: int = 0
  tile: tuple[int, ...] = ()
  order: tuple[int, ...] = ()  # dimensions, slowest first

  @property
  def bits(self) -> int:
    if self.dtype.startswith('f8') or self.dtype.startswith('f4'):
      return int(self.dtype[1])
    return _BITS.get(self.dtype, 0)  # tokens and opaque values take nothing

  @property
  def bytes(self) -> int:
    """Bytes in memory: the last dimensions are filled up to whole tiles."""
    dims = [self.dims[i] for i in self.order] if self.order else list(self.dims)
    dims = [1] * (len(self.tile) - len(dims)) + dims
    for i, t in enumerate(reversed(self.tile), 1):
      dims[-i] = -(-dims[-i] // t) * t
    return math.prod(dims) * self.bits // 8

  @property
  def data_bytes(self) -> int:
    """Bytes of the values alone."""
    return math.prod(self.dims) * self.bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line: `arrays` are the leaves of its result, `operands` names."""

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  body: str  # what stood between the parentheses
  attributes: str
  root: bool = False

  def attribute(self, key: str) -> str | None:
    """The text after `key=`: a word, or all within its brackets."""
    found = re.search(rf'(?:^|[ ,]){key}=', self.attributes)
    if not found:
      return None
    rest = self.attributes[found.end() :]
    if rest[:1] in '{(':
      return rest[: _closing(rest, 0) + 1]
    return re.match(r'[^,\s]*', rest)[0]

  @property
  def source(self) -> str:
    """The name in the user's program, '' where the compiler made it."""
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
    return re.sub(r'\\(.)', r'\1', found[1]) if found else ''

  @property
  def cycles(self) -> int | None:
    """libtpu's estimate, None where it makes none (Pallas, collectives)."""
    found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
    return int(found[1]) if found else None

  @property
  def target(self) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
    return found[1] if found else ''

  @property
  def calls(self) -> tuple[str, ...]:
    """Names of the computations that it runs, a loop's condition left out."""
    names = []
    for key in ('calls', 'body', 'branch_computations', 'true_computation',
                'false_computation'):  # fmt: skip
      names += _NAME.findall(self.attribute(key) or '')
    if self.opcode == 'call':
      names += _NAME.findall(self.attribute('to_apply') or '')
    return tuple(names)

  @property
  def cost_estimate(self) -> dict[str, int]:
    """What a Pallas call says of itself: flops, bytes_accessed, ...; {} if nothing."""
    found = re.search(r'"cost_estimate":(\{[^{}]*\})', self.attributes)
    return {k: int(v) for k, v in json.loads(found[1]).items()} if found else {}


@dataclasses.dataclass(frozen=True)
class Computation:
  name: str
  instructions: dict[str, Instruction]

  @functools.cached_property
  def root(self) -> Instruction:
    return next(i for i in self.instructions.values() if i.root)

  @functools.cached_property
  def parameters(self) -> list[Instruction]:
    found = [i for i in self.instructions.values() if i.opcode == 'parameter']
    return sorted(found, key=lambda i: int(i.body))

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
    for instruction in self.instructions.values():
      for name in dict.fromkeys(instruction.operands):
        users[name].append(instruction)
    return users


@dataclasses.dataclass(frozen=True)
class Module:
  """A program; `unknown_loops` lists those whose trips can't be read off."""

  computations: dict[str, Computation]
  entry: Computation

  def executed(self) -> Iterator[tuple[Computation, Instruction, int]]:
    """Each instruction that runs on its own (not inside a fusion), and how often.

    Loops count by their trips (once where these aren't known), of branches the one with
    the most cycles.
    """
    return self._executed(self.entry, 1)

  def _executed(self, computation, times):
    for instruction in computation.instructions.values():
      yield computation, instruction, times
      inner = [self.computations[name] for name in instruction.calls]
      if instruction.opcode == 'while':
        trips = self.trips(computation, instruction)
        yield from self._executed(inner[0], times * (1 if trips is None else trips))
      elif instruction.opcode == 'conditional':
        yield from self._executed(max(inner, key=self._cycles), times)
      elif instruction.opcode == 'call':
        yield from self._executed(inner[0], times)

  def _cycles(self, computation):
    runs = self._executed(computation, 1)
    return sum((i.cycles or 0) * times for _, i, times in runs)

  @functools.cached_property
  def unknown_loops(self) -> tuple[str, ...]:
    return tuple(
      i.source or i.name
      for c, i, _ in self.executed()
      if i.opcode == 'while' and self.trips(c, i) is None
    )

  def trips(self, computation: Computation, loop: Instruction) -> int | None:
    """How often a loop's body runs; None if its condition isn't a count."""
    condition = self.computations[_NAME.findall(loop.attribute('condition'))[0]]
    test = _through(self, condition, condition.root.name)
    if test is None or test[1].opcode != 'compare':
      return None
    where, compare, outer = test
    body = self.computations[loop.calls[0]]
    sides = [_origin(where, name, outer, condition) for name in compare.operands]
    sides = [
      _Bound(_first(self, computation, loop, s)) if _unchanged(body, s) else s
      for s in sides
    ]
    direction = compare.attribute('direction')
    if isinstance(sides[0], _Bound):  # bound > counter
      sides.reverse()
      direction = {'GT': 'LT', 'GE': 'LE', 'LT': 'GT', 'LE': 'GE'}.get(
        direction, direction
      )
    counter, bound = sides
    if not isinstance(counter, int) or not isinstance(bound, _Bound):
      return None
    first = _first(self, computation, loop, counter)
    step = _step(self, body, counter)
    if first is None or bound.value is None or not step:
      return None
    span = bound.value - first
    if direction in ('LT', 'GT', 'NE'):
      return max(0, math.ceil(span / step))
    return max(0, span // step + 1) if direction in ('LE', 'GE') else None


@dataclasses.dataclass(frozen=True)
class _Bound:
  value: int | None


def parse(text: str) -> Module:
  """The program of an optimised module's text.

  Raises:
    ValueError: it has no entry computation, or a line can't be read.
  """
  computations: dict[str, Computation] = {}
  entry, current = None, None
  for line in text.splitlines():
    head = None if line.startswith(' ') else _HEAD.match(line)
    if head:
      current = computations[head[2]] = Computation(head[2], {})
      entry = current if head[1] else entry
    elif line.startswith('}'):
      current = None
    elif current is not None and line.strip():
      instruction = _instruction(line)
      current.instructions[instruction.name] = instruction
  if entry is None:
    raise ValueError('hlo: no ENTRY computation; is this the text of a compiled program?')
  return Module(computations, entry)


def groups(instruction: Instruction) -> np.ndarray:
  """Which devices talk to each other: i[G, n], G groups of n places in the mesh.

  Reads the forms {{0,1},{2,3}}, [2,4]<=[4,2]T(1,0), mesh['a'=4,'b'=2] {'a'} (also with
  device_ids=(...)), and a permute's source_target_pairs.

  Raises:
    ValueError: another form.
  """
  text = instruction.attributes
  pairs = re.search(r'source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}', text)
  if pairs:
    return np.array(re.findall(r'(\d+),(\d+)', pairs[1]), int).reshape(-1, 2)
  lists = re.search(r'replica_groups=\{((?:\{[\d,]*\},?)+)\}', text)
  if lists:
    return np.array([_ints(g) for g in re.findall(r'\{([\d,]*)\}', lists[1])])
  iota = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  if iota:
    return _iota(iota[2], iota[3]).reshape(_ints(iota[1]))
  mesh = re.search(
    r'replica_groups=mesh\[([^\]]*)\]'
    r'(?:, ?device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}',
    text,
  )
  if mesh and ':' not in mesh[4]:
    sizes = {k: int(n) for k, n in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    ids = _iota(mesh[2] or str(math.prod(sizes.values())), mesh[3])
    names, picked = list(sizes), re.findall(r"'([^']+)'", mesh[4])
    ids = ids.reshape(list(sizes.values()))
    last = [names.index(name) for name in picked]
    ids = np.moveaxis(ids, last, range(-len(last), 0)) if last else ids[..., None]
    return ids.reshape(-1, math.prod(sizes[name] for name in picked))
  found = re.search(r'replica_groups=.{0,80}', text)
  raise ValueError(
    f'hlo: {instruction.opcode} {instruction.name} has groups of unknown form: '
    f'{found[0] if found else "none"}'
  )


def _iota(dims, order):
  dims = _ints(dims)
  ids = np.arange(math.prod(dims)).reshape(dims)
  return ids.transpose(_ints(order)) if order else ids


def _ints(text):
  return tuple(int(n) for n in text.split(',') if n)


def _closing(text, start):
  """Where the bracket that opens at `start` closes."""
  depth = 0
  for found in re.compile(r'"(?:[^"\\]|\\.)*"|[(){}]').finditer(text, start):
    depth += {'(': 1, '{': 1, ')': -1, '}': -1}.get(found[0], 0)
    if not depth:
      return found.start()
  raise ValueError(f'hlo: bracket is not closed: {text[start : start + 60]!r}')


def _instruction(line):
  text = re.sub(r'/\*.*?\*/', '', line).strip()
  left, is_there, right = text.partition(' = ')
  if not is_there:
    raise ValueError(f'hlo: not an instruction: {text[:80]!r}')
  root, name = left.startswith('ROOT '), left.removeprefix('ROOT ').lstrip('%')
  end = _closing(right, 0) + 1 if right.startswith('(') else right.index(' ')
  kind, rest = right[:end], right[end:].lstrip()
  opcode = rest[: rest.index('(')]
  close = _closing(rest, len(opcode))
  body = rest[len(opcode) + 1 : close]
  arrays = tuple(_array(m) for m in _ARRAY.finditer(kind))
  operands = () if opcode in ('constant', 'parameter') else tuple(_NAME.findall(body))
  return Instruction(name, opcode, arrays, operands, body, rest[close + 1 :], root)


def _array(match):
  dtype, dims, layout = match.groups()
  order, _, tiles = (layout or '').partition(':')
  tile = re.match(r'T\(([\d,]+)\)', tiles)
  space = re.search(r'S\((\d+)\)', tiles)
  return Array(
    dtype,
    _ints(dims.replace('<=', '')),
    int(space[1]) if space else 0,
    _ints(tile[1]) if tile else (),
    tuple(reversed(_ints(order))),
  )


def _through(module, computation, name, outer=None):
  """Follows copies, bitcasts and fusions inwards to what makes a value.

  Returns the computation, the instruction, and the operands that stand for that
  computation's parameters (None at the top).
  """
  instruction = computation.instructions.get(name)
  while instruction is not None and instruction.opcode in ('copy', 'bitcast', 'convert'):
    instruction = computation.instructions.get(instruction.operands[0])
  if instruction is None:
    return None
  if instruction.opcode == 'fusion':
    inner = module.computations[instruction.calls[0]]
    return _through(module, inner, inner.root.name, instruction.operands)
  return computation, instruction, outer


def _origin(where, name, outer, top):
  """A constant's value as `_Bound`, the index of a loop's value as int, or None."""
  instruction = where.instructions[name]
  while instruction.opcode in ('copy', 'bitcast', 'convert'):
    instruction = where.instructions[instruction.operands[0]]
  if instruction.opcode == 'constant' and re.fullmatch(r'-?\d+', instruction.body):
    return _Bound(int(instruction.body))
  if instruction.opcode == 'get-tuple-element':
    return int(instruction.attribute('index'))
  if instruction.opcode == 'parameter' and outer:
    return _origin(top, outer[int(instruction.body)], None, top)
  return None


def _first(module, computation, loop, index):
  """The counter's first value; None if it is computed."""
  start = computation.instructions[loop.operands[0]]
  if start.opcode != 'tuple':
    return None
  found = _through(module, computation, start.operands[index])
  if found is None or found[1].opcode != 'constant':
    return None
  return int(found[1].body)


def _unchanged(body, index):
  """A loop's body hands on this value as it got it."""
  if not isinstance(index, int) or body.root.opcode != 'tuple':
    return False
  given = body.instructions[body.root.operands[index]]
  return (
    given.opcode == 'get-tuple-element'
    and given.attribute('index') == str(index)
    and body.instructions[given.operands[0]].opcode == 'parameter'
  )


def _step(module, body, index):
  if body.root.opcode != 'tuple':
    return 1
  found = _through(module, body, body.root.operands[index])
  if found is None or found[1].opcode not in ('add', 'subtract'):
    return None
  where, instruction, outer = found
  steps = [_origin(where, name, outer, body) for name in instruction.operands]
  step = next((s.value for s in steps if isinstance(s, _Bound)), None)
  return -step if step and instruction.opcode == 'subtract' else step
