"""A plan as a table to read and as plain data to keep.

  HBM of one device         what it holds, against what it has
  work, wire, time          what a step computes and sends, and how fast that could be
  costliest ops             where the modelled time goes

Times and everything that follows from them are named as what they are: 'roofline' is a
bound, 'modelled' rests on estimates of the compiler. Nothing here was measured.
"""

import collections
from typing import Any

from mmjax.plan.chips import GIB
from mmjax.plan.compile import Plan


def to_json(plan: Plan) -> dict[str, Any]:
  """The plan as plain data: bytes, FLOPs and seconds, of one device and one step."""
  chip, read = plan.topology.chip, plan.readout
  tree = {
    'topology': plan.topology.name,
    'slices': plan.topology.slices,
    'devices': plan.topology.num_devices,
    'mesh': dict(plan.mesh),
    'rows': plan.rows,
    'tokens': plan.tokens,
    'fits': plan.fits,
    'hbm': {'capacity': chip.hbm, 'peak': plan.peak, **parts(plan)},
    'model_flops': plan.model_flops,
  }
  if read is None:
    return tree
  return tree | {
    'compiled_flops': read.flops,
    'bytes_accessed': read.hbm_bytes,
    'wire': {f'{kind} over {"+".join(axes)}': n for (kind, axes), n in _wire(read)},
    'wire_bytes': read.wire_bytes,
    'kernels': read.kernels,
    'roofline': _speed(plan, read.roofline_seconds) | {'by': read.roofline},
    'modelled': _speed(plan, read.modelled_seconds),
    'uncounted': list(read.uncounted),
    'unknown_loops': list(read.unknown_loops),
    'ops': [
      {'name': op.name, 'source': op.source, 'seconds': op.seconds, 'times': op.times}
      for op in read.ops[:10]
    ],
  }


def parts(plan: Plan) -> dict[str, int]:
  """Bytes of HBM by part; they add up to the peak.

  Gradients live in the compiler's temporaries; what is left of those is 'temporaries':
  activations, gathered weights, buffers of collectives. 'tiling' is what arguments take
  beyond their values. Where the compiler refused, temporaries are what is missing.
  """
  made, read = dict(plan.held), plan.readout
  if read is not None:
    named = sum(made[k] for k in ('params', 'optimizer', 'batch'))
    rest = ('temporaries', 'outputs')
    tiling = sum(n for k, n in read.hbm.items() if k not in rest) - named
    made['tiling'] = max(0, tiling)
  made['temporaries'] = max(0, plan.peak - sum(made.values()))
  return made


def text(plan: Plan) -> str:
  """The table that `python -m mmjax.plan` prints."""
  chip, read = plan.topology.chip, plan.readout
  mesh = ' x '.join(f'{axis} {n}' for axis, n in plan.mesh.items()) or 'one device'
  slices = f'{plan.topology.slices} x ' if plan.topology.slices > 1 else ''
  lines = [
    f'{slices}{plan.topology.name}, {plan.topology.num_devices} devices: {mesh};'
    f' {plan.rows:,} rows, {plan.tokens:,} slots a step',
    '',
    'HBM of one device, GiB',
  ]
  made = parts(plan)
  lines += [f'  {part:<16}{n / GIB:10.2f}' for part, n in made.items() if n]
  short = plan.peak - chip.hbm
  room = f'{-short / GIB:.2f} left' if plan.fits else f'{short / GIB:.2f} TOO MUCH'
  lines += [f'  {"peak":<16}{plan.peak / GIB:10.2f}  of {chip.hbm / GIB:.2f}: {room}']
  if read is None:
    largest = max(made, key=made.get)
    return '\n'.join(
      [*lines, '', f'does not fit by {short / GIB:.2f} GiB; the largest part: {largest}']
    )
  lines += [
    '',
    'work of one device and step',
    f'  model FLOPs     {plan.model_flops:10.3g}',
    f'  compiled FLOPs  {read.flops:10.3g}  ({read.flops / plan.model_flops:.2f} x)',
    f'  HBM traffic     {read.hbm_bytes:10.3g}  bytes',
    f'  on the wire     {read.wire_bytes:10.3g}  bytes',
  ]
  for (kind, axes), n in _wire(read):
    lines.append(f'    {kind:<22}{"+".join(axes) or "-":<14}{n:10.3g}')
  bounds = ', '.join(f'{k} {s * 1e3:.3g}' for k, s in read.roofline.items() if s)
  lines += ['', 'time of a step, ms (not measured; see docs/planning.md)']
  for name, seconds in (
    ('roofline', read.roofline_seconds),
    ('modelled', read.modelled_seconds),
  ):
    s = _speed(plan, seconds)
    lines.append(
      f'  {name:<16}{seconds * 1e3:10.4g}  MFU {s["mfu"]:.3f}'
      f'  {s["tokens_per_second"]:,.0f} slots/s'
    )
  lines += [f'  the bounds: {bounds}', '', 'costliest ops, modelled ms']
  for op in read.ops[:10]:
    lines.append(f'  {op.seconds * 1e3:8.3g}  {op.times:5} x  {_short(op)}')
  for what, names in (
    ('Pallas calls without a cost estimate', read.uncounted),
    ('loops of unknown trips', read.unknown_loops),
  ):
    if names:
      lines.append(f'left out: {what}: {", ".join(sorted(set(names)))}')
  return '\n'.join(lines)


def _speed(plan, seconds):
  return {
    'seconds': seconds,
    'mfu': plan.mfu(seconds),
    'tokens_per_second': plan.tokens / seconds,
  }


def _wire(read):
  found = collections.Counter(read.wire_by(lambda c: (c.kind, c.axes)))
  return found.most_common()


def _short(op) -> str:
  """The op's name and the end of its source's."""
  words = op.source.split('/')
  return f'{op.name}  {"/".join(words[-5:])}'
