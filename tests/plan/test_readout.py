"""What is read out of recorded programs, and of small ones compiled here for a TPU."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.plan import flops, readout
from mmjax.plan.chips import CHIPS, GIB

V5E = CHIPS['v5e']
MIB = 2**20


class Recorded:
  """A program of which only the text is there."""

  def __init__(self, text, peak=0, outputs=0, aliased=0):
    self.text, self.stats = text, types.SimpleNamespace(
      peak_memory_in_bytes=peak, output_size_in_bytes=outputs,
      alias_size_in_bytes=aliased,
    )  # fmt: skip
    self.in_avals = ((), {})
    self.input_shardings = ((), {})

  def as_text(self):
    return self.text

  def memory_analysis(self):
    return self.stats


def places(shape, names, torus, slices=1):
  """A mesh of chips on a torus, row by row, slice after slice."""
  chips = np.array(list(np.ndindex(*torus)) * slices)
  each = len(chips) // slices
  devices = [
    types.SimpleNamespace(coords=tuple(c), slice_index=i // each)
    for i, c in enumerate(chips)
  ]
  flat = np.empty(len(devices), object)
  flat[:] = devices
  return types.SimpleNamespace(
    axis_names=names, devices=flat.reshape(shape), size=len(devices)
  )


FLAT = places((2, 4), ('data', 'fsdp'), (2, 4))


def program(*lines, computations='', result='f32[256,1024]'):
  body = '\n'.join(f'  {line}' for line in lines)
  return f"""HloModule jit_f, is_scheduled=true
{computations}
ENTRY %main (x: f32[256,1024]) -> {result} {{
  %x = f32[256,1024]{{1,0:T(8,128)}} parameter(0), metadata={{op_name="x"}}
{body}
}}
"""


def read(*lines, mesh=FLAT, **kwargs):
  return readout.read(Recorded(program(*lines, **kwargs)), V5E, mesh)


ROWS = 'replica_groups=[2,4]<=[8], use_global_device_ids=true'  # along fsdp
COLUMNS = 'replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true'


@pytest.mark.parametrize(
  'line, kind, axes, sent, links',
  [
    # The operand is 1 MiB; of 4 places in a row (an open one: one link), or 2.
    (f'f32[1024,1024]{{1,0}} all-gather(%x), channel_id=1, {ROWS}, dimensions={{0}}',
     'all-gather', ('fsdp',), 3 * MIB, 1),
    (f'f32[256,1024]{{1,0}} all-reduce(%x), channel_id=1, {ROWS}, to_apply=%add',
     'all-reduce', ('fsdp',), 1.5 * MIB, 1),
    (f'f32[256,1024]{{1,0}} all-reduce(%x), channel_id=1, {COLUMNS}, to_apply=%add',
     'all-reduce', ('data',), MIB, 1),
    ('f32[256,1024]{1,0} all-reduce(%x), replica_groups={{0,1,2,3,4,5,6,7}}',
     'all-reduce', ('data', 'fsdp'), 1.75 * MIB, 2),
    (f'f32[64,1024]{{1,0}} reduce-scatter(%x), channel_id=1, {ROWS}, dimensions={{0}}',
     'reduce-scatter', ('fsdp',), 0.75 * MIB, 1),
    (f'f32[256,1024]{{1,0}} all-to-all(%x), channel_id=1, {ROWS}, dimensions={{0}}',
     'all-to-all', ('fsdp',), 0.75 * MIB, 1),
    ('f32[256,1024]{1,0} collective-permute(%x), source_target_pairs={{0,4},{4,0},{1,1}}',
     'collective-permute', ('data',), 2 / 3 * MIB, 1),
  ],
)  # fmt: skip
def test_synchronous_collectives(line, kind, axes, sent, links):
  (found,) = read(f'ROOT %y = {line}').collectives
  assert (found.kind, found.axes, found.asynchronous) == (kind, axes, False)
  assert found.bytes == pytest.approx(sent, abs=1)
  assert found.seconds == pytest.approx(sent / (links * 45e9), rel=1e-5)


def test_a_started_permute_overlaps():
  got = read(
    '%s = (f32[256,1024]{1,0}, f32[256,1024]{1,0:S(1)}, u32[]) '
    'collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}',
    'ROOT %y = f32[256,1024]{1,0} collective-permute-done(%s)',
  )
  (found,) = got.collectives
  assert (found.kind, found.bytes, found.asynchronous) == (
    'collective-permute', MIB, True,
  )  # fmt: skip
  assert got.modelled_seconds == max(found.seconds, MIB / V5E.hbm_rate)
  assert got.kernels == 1


ASYNC = f"""
%start (a: f32[256,1024]) -> (f32[256,1024], f32[1024,1024]) {{
  %a = f32[256,1024]{{1,0}} parameter(0)
  %g.0 = f32[1024,1024]{{1,0}} all-gather(%a), channel_id=7, {ROWS}, backend_config=CONFIG
  ROOT %c = (f32[256,1024], f32[1024,1024]) custom-call(%g.0), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion (b: f32[256,1024], o: f32[1024,1024], w: bf16[8,512], v: bf16[512,16]) -> (f32[8,16], f32[256,1024], f32[1024,1024]) {{
  %b = f32[256,1024]{{1,0}} parameter(0)
  %o = f32[1024,1024]{{1,0}} parameter(1)
  %w = bf16[8,512]{{1,0}} parameter(2)
  %v = bf16[512,16]{{1,0}} parameter(3)
  %m = f32[8,16]{{1,0}} convolution(%w, %v), dim_labels=bf_io->bf
  %g.1 = f32[1024,1024]{{1,0}} all-gather(%b), channel_id=7, {ROWS}, backend_config=CONFIG
  ROOT %t = (f32[8,16], f32[256,1024], f32[1024,1024]) tuple(%m, %b, %g.1)
}}

%done (d: f32[256,1024], e: f32[1024,1024]) -> f32[1024,1024] {{
  %d = f32[256,1024]{{1,0}} parameter(0)
  %e = f32[1024,1024]{{1,0}} parameter(1)
  %g.2 = f32[1024,1024]{{1,0}} all-gather(%d), channel_id=7, {ROWS}, backend_config=CONFIG
  ROOT %f = f32[1024,1024]{{1,0}} custom-call(%d, %e, %g.2), custom_call_target="AsyncCollectiveDone"
}}
""".replace('CONFIG', '{"async_collective_fusion_config":{"flag_start":"2"}}')  # noqa: E501


def test_an_asynchronous_collective_in_three_pieces_counts_once():
  got = read(
    '%s = (f32[256,1024]{1,0}, f32[1024,1024]{1,0}) fusion(%x), kind=kCustom, '
    'calls=%start',
    '%p = f32[256,1024]{1,0} get-tuple-element(%s), index=0',
    '%q = f32[1024,1024]{1,0} get-tuple-element(%s), index=1',
    '%w.1 = bf16[8,512]{1,0} constant({...})',
    '%v.1 = bf16[512,16]{1,0} constant({...})',
    '%z = (f32[8,16]{1,0}, f32[256,1024]{1,0}, f32[1024,1024]{1,0}) '
    'fusion(%p, %q, %w.1, %v.1), kind=kOutput, calls=%async_collective_fusion',
    '%p2 = f32[256,1024]{1,0} get-tuple-element(%z), index=1',
    '%q2 = f32[1024,1024]{1,0} get-tuple-element(%z), index=2',
    'ROOT %y = f32[1024,1024]{1,0} fusion(%p2, %q2), kind=kCustom, calls=%done',
    computations=ASYNC,
  )
  (found,) = got.collectives
  assert (found.bytes, found.asynchronous, found.name) == (3 * MIB, True, 's')
  assert got.flops == 2 * 8 * 512 * 16
  # 1 MiB read and 4 written by the collective, once; then the product's own.
  assert got.hbm_bytes == 5 * MIB + 2 * (8 * 512 + 512 * 16) + 4 * 8 * 16


def test_a_reduce_scatter_printed_as_a_fusion():
  got = read(
    'ROOT %y = f32[64,1024]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.7',
    computations=f"""
%all-reduce-scatter.7 (a: f32[256,1024]) -> f32[64,1024] {{
  %a = f32[256,1024]{{1,0}} parameter(0)
  %r = f32[256,1024]{{1,0}} all-reduce(%a), channel_id=1, {ROWS}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %d = f32[64,1024]{{1,0}} dynamic-slice(%r, %zero, %zero)
}}
""",
  )
  assert got.wire_by(lambda c: (c.kind, c.axes)) == {
    ('reduce-scatter', ('fsdp',)): 0.75 * MIB
  }
  assert not got.collectives[0].asynchronous


def test_between_slices():
  mesh = places((2, 4), ('slice', 'fsdp'), (2, 2), slices=2)
  got = read(
    '%token = token[] after-all()',
    '%s = (f32[256,1024]{1,0}, u32[], token[]) send(%x, %token), channel_id=2, '
    'is_host_transfer=true, '
    'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}',
    '%e = token[] send-done(%s), channel_id=2',
    'ROOT %y = f32[256,1024]{1,0} copy(%x)',
    mesh=mesh,
  )
  (found,) = got.collectives
  assert (found.kind, found.axes) == ('slices all-reduce', ('slice',))
  assert found.bytes == MIB and found.asynchronous  # 2 (n - 1) / n of two slices
  assert got.roofline['slices'] == MIB / V5E.dcn and got.roofline['link'] == 0


def test_a_closed_ring_has_two_links():
  ring = places((16,), ('fsdp',), (16, 1))
  line = 'ROOT %y = f32[256,1024]{1,0} all-reduce(%x), replica_groups=[1,16]<=[16]'
  (found,) = read(line, mesh=ring).collectives
  assert found.seconds == pytest.approx(2 * 15 / 16 * MIB / (2 * 45e9))


def test_pallas_calls_count_what_they_say_and_are_named_if_they_say_nothing():
  config = '{"custom_call_config":{"body":"T(","cost_estimate":{"flops":"%d"%s}}}'
  said = config % (10**12, ',"bytes_accessed":"4096"')
  got = read(
    '%a = f32[256,1024]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", '
    'metadata={op_name="attend"}, backend_config=' + said,
    'ROOT %b = f32[256,1024]{1,0} custom-call(%a), '
    'custom_call_target="tpu_custom_call", metadata={op_name="silent"}',
  )
  assert got.flops == 10**12
  silent = 2 * MIB / V5E.hbm_rate
  assert got.compute_seconds == 10**12 / (V5E.peak / 2) + silent
  assert got.hbm_bytes == 4096 + 2 * MIB
  assert got.uncounted == ('silent',)
  assert got.ops[0].source == 'attend'


INSIDE = """
%sliced (a: f32[256,1024], i: s32[]) -> f32[8,1024] {
  %a = f32[256,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %b = f32[256,1024]{1,0} bitcast(%a)
  %s = f32[8,1024]{1,0} dynamic-slice(%b, %i, %zero), dynamic_slice_sizes={8,1024}
  ROOT %n = f32[8,1024]{1,0} negate(%s)
}

%updated (a: f32[256,1024], u: f32[8,1024], i: s32[]) -> f32[256,1024] {
  %a = f32[256,1024]{1,0} parameter(0)
  %u = f32[8,1024]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %n = f32[8,1024]{1,0} negate(%u)
  ROOT %d = f32[256,1024]{1,0} dynamic-update-slice(%a, %n, %i, %zero)
}

%outer (a: f32[256,1024]) -> f32[256,1024] {
  %a = f32[256,1024]{1,0} parameter(0)
  %v = f32[256,1024]{1,0} fusion(%a), kind=kLoop, calls=%view
  ROOT %n = f32[256,1024]{1,0} negate(%v)
}

%view (a: f32[256,1024]) -> f32[256,1024] {
  %a = f32[256,1024]{1,0} parameter(0)
  ROOT %b = f32[256,1024]{1,0} bitcast(%a)
}
"""
ROW = 8 * 1024 * 4


@pytest.mark.parametrize(
  'line, moved',
  [
    ('f32[256,1024]{1,0} negate(%x)', 2 * MIB),
    ('f32[256,1024]{1,0:T(8,128)S(1)} negate(%x)', MIB),  # into vector memory
    ('f32[8,1024]{1,0} slice(%x), slice={[0:8], [0:1024]}', 2 * ROW),
    ('f32[8,1024]{1,0} fusion(%x, %i), kind=kLoop, calls=%sliced', 2 * ROW),
    ('f32[256,1024]{1,0} fusion(%x, %r, %i), kind=kLoop, calls=%updated', 2 * ROW),
    ('f32[256,1024]{1,0} fusion(%x), kind=kLoop, calls=%outer', 2 * MIB),
    ('(f32[256,1024]{1,0:S(1)}, f32[256,1024]{1,0}, u32[]) copy-start(%x)', MIB),
    ('((f32[256,1024]{1,0}), f32[8,1024]{1,0:S(1)}, s32[]) slice-start(%x)', ROW),
    ('f32[256,1024]{1,0} bitcast(%x)', 0),
  ],
)
def test_bytes_to_and_from_hbm(line, moved):
  scalars = ('%i = s32[]{:S(6)} constant(3)', '%r = f32[8,1024]{1,0} constant({...})')
  got = read(*scalars, f'ROOT %y = {line}', computations=INSIDE)
  assert got.hbm_bytes == moved
  assert got.kernels == (moved > 0)


@pytest.mark.parametrize(
  'left, right, out, attributes, count',
  [
    # A product over 5.
    ('8,5', '5,3', '8,3', 'dim_labels=bf_io->bf', 2 * 8 * 5 * 3),
    # A window of 3 over 6 places, one missing at each end: 16 of 18 pairs.
    ('2,6,5', '3,5,7', '2,6,7', 'window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f',
     2 * 2 * 5 * 7 * 16),
    # A batch of 4 as a dilated axis that the window meets once each.
    ('4,8,5', '4,5,3', '4,8,3',
     'window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf',
     2 * 4 * 8 * 5 * 3),
    ('8,5', '5,3', '8,3', 'lhs_contracting_dims={1}, rhs_contracting_dims={0}',
     2 * 8 * 5 * 3),
  ],
)  # fmt: skip
def test_products(left, right, out, attributes, count):
  opcode = 'convolution' if 'dim_labels' in attributes else 'dot'
  got = read(
    f'%l = f32[{left}] constant({{...}})',
    f'%r = f32[{right}] constant({{...}})',
    f'ROOT %y = f32[{out}] {opcode}(%l, %r), {attributes}',
  )
  assert got.flops == count


def test_out_of_memory():
  for text, want in (
    ('(16.00G) exceeds available HBM (15.75G)', (16 * GIB, 15.75 * GIB)),
    ('Used 512.5M of 15.75G hbm. Exceeded', (512.5 * MIB, 15.75 * GIB)),
  ):
    assert readout.out_of_memory(f'RESOURCE_EXHAUSTED: Ran out: {text}') == want
    assert readout.out_of_memory(text) is None  # something else says so
  assert readout.out_of_memory(RuntimeError('RESOURCE_EXHAUSTED: quota')) is None


# Compiled for a TPU that isn't there.


def shaped(mesh, shape, dtype, *spec):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


L, B, M = 6, 512, 512  # layers, rows, width


def chain(x, w):
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def test_scanned_products_memory_and_gathers(tpu):
  chip, mesh = tpu('v5e:2x2', data=2, fsdp=2)
  x = shaped(mesh, (B, M), 'bfloat16', ('data', 'fsdp'))
  state = {'w': shaped(mesh, (L, M, M), 'bfloat16', None, 'fsdp'), 'unused': x}

  def f(state, x, scale):
    return chain(x, state['w']) * scale

  scale = shaped(mesh, (), 'bfloat16')
  compiled = jax.jit(f, out_shardings=x.sharding).lower(state, x, scale).compile()
  labels = ({'w': 'params', 'unused': 'unused'}, 'batch', 'scale')
  got = readout.read(compiled, chip, mesh, labels)
  rows = B // 4
  assert got.flops == L * 2 * rows * M * M
  assert got.hbm['params'] == L * M * M // 2 * 2
  assert got.hbm['batch'] == got.hbm['outputs'] == rows * M * 2
  assert 'unused' not in got.hbm  # the compiler drops what nothing reads
  assert sum(got.hbm.values()) == got.hbm_peak
  assert got.fits and got.unknown_loops == ()
  gathers = {k: v for k, v in got.wire_by(lambda c: (c.kind, c.axes)).items()}
  assert gathers == {('all-gather', ('fsdp',)): L * M * M // 2 * 2}
  # Each layer's weights are read from HBM at least once.
  assert got.hbm_bytes >= got.hbm['params'] + got.hbm['batch']
  assert 0 < got.roofline_seconds < got.modelled_seconds < 1
  with pytest.raises(ValueError, match='labels are no prefix'):
    readout.read(compiled, chip, mesh, ('state',))


def test_gradients_are_scattered_along_fsdp_and_reduced_along_data(tpu):
  chip, mesh = tpu('v5e:2x4', data=2, fsdp=4)
  x = shaped(mesh, (B, M), 'bfloat16', ('data', 'fsdp'))
  w = shaped(mesh, (L, M, M), 'bfloat16', None, 'fsdp')

  def g(w, x):
    return jax.grad(lambda w: jnp.sum(chain(x, w).astype(jnp.float32)))(w)

  compiled = jax.jit(g, out_shardings=w.sharding, donate_argnums=0).lower(w, x).compile()
  got = readout.read(compiled, chip, mesh)
  assert got.flops == 3 * L * 2 * (B // 8) * M * M
  assert got.hbm['outputs'] == 0  # the gradient takes the weights' place
  sent = got.wire_by(lambda c: (c.kind, c.axes))
  whole = M * M * 2
  assert sent['reduce-scatter', ('fsdp',)] == L * whole * 3 // 4
  assert sent['all-reduce', ('data',)] == L * whole // 4
  # Forward and backward; the compiler may keep a layer's from forward for backward.
  assert (2 * L - 1) * whole * 3 // 4 <= sent['all-gather', ('fsdp',)]
  assert sent['all-gather', ('fsdp',)] <= 2 * L * whole * 3 // 4


def test_products_of_batches_and_their_gradients(tpu):
  """Against the count in the jaxpr, which knows nothing of the compiler."""
  chip, mesh = tpu('v5e:2x2', data=4)
  q = shaped(mesh, (8, 256, 4, 128), 'bfloat16', 'data')

  def attend(q, k, v):
    scores = jnp.einsum('btnh,bsnh->bnts', q, k).astype(jnp.float32)
    weights = jax.nn.softmax(scores).astype(jnp.bfloat16)
    return jnp.sum(jnp.einsum('bnts,bsnh->btnh', weights, v).astype(jnp.float32))

  gradients = jax.grad(attend, (0, 1, 2))
  got = readout.read(jax.jit(gradients).lower(q, q, q).compile(), chip, mesh)
  # The scores' and the four of backward; the outputs themselves aren't needed.
  assert got.flops == 5 * 2 * 2 * 4 * 256 * 256 * 128
  assert got.flops * mesh.size == flops.flops(gradients, q, q, q) * 5 // 6


@pytest.mark.parametrize(
  'f, into, out, want',
  [
    (lambda x: jax.lax.all_gather(x, 'fsdp', tiled=True), P('fsdp'), P(),
     ('all-gather', ('fsdp',), 3 * MIB)),
    (lambda x: jax.lax.psum_scatter(x, 'fsdp', tiled=True), P(), P('fsdp'),
     ('reduce-scatter', ('fsdp',), 3 * MIB)),
    (lambda x: jax.lax.psum(x, 'data'), P('data'), P(),
     ('all-reduce', ('data',), 2 * MIB)),
    (lambda x: jax.lax.psum(x, ('data', 'fsdp')), P(('data', 'fsdp')), P(),
     ('all-reduce', ('data', 'fsdp'), 0.875 * MIB)),
    (lambda x: jax.lax.all_to_all(x, 'fsdp', 1, 0, tiled=True), P('fsdp'),
     P(None, 'fsdp'), ('all-to-all', ('fsdp',), 0.75 * MIB)),
    (lambda x: jax.lax.ppermute(x, 'data', [(0, 1), (1, 0)]), P('data'), P('data'),
     ('collective-permute', ('data',), 2 * MIB)),
  ],
)  # fmt: skip
def test_collectives(tpu, f, into, out, want):
  chip, mesh = tpu('v5e:2x4', data=2, fsdp=4)
  x = jax.ShapeDtypeStruct((1024, 1024), 'float32', sharding=NamedSharding(mesh, into))
  mapped = jax.shard_map(f, mesh=mesh, in_specs=into, out_specs=out, check_vma=False)
  got = readout.read(jax.jit(mapped).lower(x).compile(), chip, mesh)
  assert [(c.kind, c.axes, c.bytes) for c in got.collectives] == [want]


def test_two_slices_reduce_over_the_slower_network(tpu):
  chip, mesh = tpu('v5e:2x2', slices=2, slice=2, fsdp=4)
  x = shaped(mesh, (16, 256, 1024), 'float32', ('slice', 'fsdp'))
  whole = NamedSharding(mesh, P())
  compiled = jax.jit(lambda x: jnp.sum(x, 0), out_shardings=whole).lower(x).compile()
  got = readout.read(compiled, chip, mesh)
  assert got.wire_by(lambda c: (c.kind, c.axes)) == {
    ('reduce-scatter', ('fsdp',)): 0.75 * MIB,
    ('slices all-reduce', ('slice',)): 0.25 * MIB,
    ('all-gather', ('fsdp',)): 0.75 * MIB,
  }


def test_what_does_not_fit_says_by_how_much(tpu):
  chip, mesh = tpu('v5e:2x2', data=4)
  x = shaped(mesh, (2**16, 2**16), 'float32')
  with pytest.raises(RuntimeError) as caught:
    jax.jit(lambda x: x @ x).lower(x).compile()
  needed, available = readout.out_of_memory(caught.value)
  assert available == chip.hbm and needed > 2**34


@pytest.mark.slow
@pytest.mark.parametrize('name', ['v5e:2x2', 'v5p:2x2x1'])
def test_cycles_put_large_products_near_the_peak(tpu, name):
  """The calibration that `Chip.clock` claims."""
  chip, mesh = tpu(name, data=4)
  for rows, inner, columns in ((4096, 4096, 4096), (8192, 4096, 16384)):
    x = shaped(mesh, (rows, inner), 'bfloat16')
    w = shaped(mesh, (inner, columns), 'bfloat16')
    got = readout.read(jax.jit(jnp.matmul).lower(x, w).compile(), chip, mesh)
    assert got.flops == 2 * rows * inner * columns
    assert 0.8 < got.roofline['peak'] / got.compute_seconds < 0.98
