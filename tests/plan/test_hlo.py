import numpy as np
import pytest

from mmjax.plan import hlo

LOOP = """
HloModule jit_f, is_scheduled=true, num_partitions=8

%body (p.0: (s32[], bf16[8,1000])) -> (s32[], bf16[8,1000]) {
  %p.0 = (s32[]{:T(128)}, /*index=1*/bf16[8,1000]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i.0 = s32[]{:T(128)} get-tuple-element(%p.0), index=0
  %i.1 = s32[]{:T(128)S(6)} copy(%i.0)
  %step = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)} add(%i.1, %step)
  %x.0 = bf16[8,1000]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.0), index=1
  ROOT %t.0 = (s32[]{:T(128)}, bf16[8,1000]{1,0:T(8,128)(2,1)S(1)}) tuple(%next, %x.0)
}

%compare (a: s32[], b: s32[]) -> pred[] {
  %a = s32[]{:T(128)} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  ROOT %lt.1 = pred[]{:T(512)} compare(%a, %b), direction=LT
}

%condition (p.1: (s32[], bf16[8,1000])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, bf16[8,1000]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %bound = s32[]{:T(128)} constant(BOUND)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} TEST
}

ENTRY %main (x: bf16[8,1000]) -> bf16[8,1000] {
  %x = bf16[8,1000]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="p[\\'x\\']"}
  %first = s32[]{:T(128)} constant(FIRST)
  %t.1 = (s32[]{:T(128)}, bf16[8,1000]{1,0:T(8,128)(2,1)}) tuple(%first, %x)
  %loop = (s32[], bf16[8,1000]{1,0}) while(%t.1), condition=%condition, body=%body
  ROOT %y = bf16[8,1000]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


def loop(test, first=0, bound=6, step=1):
  text = LOOP.replace('TEST', test).replace('FIRST', str(first))
  return hlo.parse(text.replace('BOUND', str(bound)).replace('STEP', str(step)))


def compare(direction, left='%i.2', right='%bound'):
  return f'compare({left}, {right}), direction={direction}'


@pytest.mark.parametrize(
  'test, first, bound, step, trips',
  [
    (compare('LT'), 0, 6, 1, 6),
    (compare('LT'), 1, 6, 2, 3),
    (compare('LE'), 0, 6, 1, 7),
    (compare('GT', '%bound', '%i.2'), 0, 6, 1, 6),
    (compare('GT'), 6, 0, -1, 6),
    (compare('GE'), 6, 0, -2, 4),
    (compare('NE'), 0, 6, 1, 6),
    (compare('LT'), 9, 6, 1, 0),
    ('fusion(%i.2, %bound), kind=kLoop, calls=%compare', 0, 6, 1, 6),
    ('fusion(%bound, %i.2), kind=kLoop, calls=%compare', 6, 0, -1, 6),
  ],
)
def test_trips(test, first, bound, step, trips):
  module = loop(test, first, bound, step)
  assert module.trips(module.entry, module.entry.instructions['loop']) == trips
  assert module.unknown_loops == ()
  times = {i.name: n for _, i, n in module.executed()}
  assert times['next'] == trips and times['y'] == 1


CARRIED = """
%body (p: (s32[], s32[])) -> (s32[], s32[]) {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%two, %i)
  ROOT %t = (s32[], s32[]) tuple(%next, %n)
}

%condition (p: (s32[], s32[])) -> pred[] {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: s32[]) -> (s32[], s32[]) {
  %x = s32[] parameter(0)
  %first = s32[] constant(3)
  %last = s32[] constant(9)
  %t = (s32[], s32[]) tuple(%first, %last)
  ROOT %loop = (s32[], s32[]) while(%t), condition=%condition, body=%body
}
"""


def test_trips_up_to_a_value_that_the_loop_carries():
  module = hlo.parse(CARRIED)
  assert module.trips(module.entry, module.entry.root) == 3  # 3, 5, 7
  for unknown in (
    CARRIED.replace('tuple(%first, %last)', 'tuple(%first, %x)'),
    CARRIED.replace('tuple(%next, %n)', 'tuple(%next, %next)'),
  ):
    assert hlo.parse(unknown).unknown_loops == ('loop',)


def test_a_counter_that_starts_at_a_computed_value_is_unknown():
  text = LOOP.replace('TEST', compare('LT')).replace('STEP', '1').replace('BOUND', '9')
  text = text.replace('%first = s32[]{:T(128)} constant(FIRST)', '%first = s32[] iota()')
  assert hlo.parse(text).unknown_loops == ('loop',)


def test_a_loop_without_a_count_is_named_and_counts_once():
  module = loop(compare('LT', '%i.2', '%i.2'))
  assert module.unknown_loops == ('loop',)
  assert {i.name: n for _, i, n in module.executed()}['next'] == 1


def test_arrays():
  x = loop(compare('LT')).entry.instructions['x']
  (array,) = x.arrays
  assert (array.dtype, array.dims, array.space) == ('bf16', (8, 1000), 0)
  assert array.data_bytes == 8 * 1000 * 2
  assert array.bytes == 8 * 1024 * 2  # whole tiles of (8, 128)
  assert x.source == "p['x']"
  p = loop(compare('LT')).computations['body'].instructions['p.0']
  assert [a.space for a in p.arrays] == [0, 1]


@pytest.mark.parametrize(
  'kind, size',
  [
    ('f32[3,5]{0,1:T(8,128)}', 8 * 128 * 4),  # 5 rows of 3
    ('f32[2,9,128]{2,1,0:T(8,128)}', 2 * 16 * 128 * 4),
    ('u8[32,128]{1,0:T(32,128)(4,1)}', 32 * 128),
    ('s4[8,128]{1,0}', 8 * 128 // 2),
    ('f8e4m3fn[8,128]{1,0}', 8 * 128),
    ('f32[7]{0:T(256)}', 256 * 4),
    ('token[]', 0),
  ],
)
def test_bytes(kind, size):
  text = 'ENTRY %m (x: f32[]) -> f32[] {\n  ROOT %x = KIND parameter(0)\n}'
  module = hlo.parse(text.replace('KIND', kind))
  assert module.entry.root.arrays[0].bytes == size


def line(attributes):
  text = f"""ENTRY %m (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %y = f32[8]{{0}} all-reduce(%x), channel_id=1, {attributes}, to_apply=%add
}}"""
  return hlo.parse(text).entry.root


@pytest.mark.parametrize(
  'groups, want',
  [
    ('{{0,2},{1,3}}', [[0, 2], [1, 3]]),
    ('[2,2]<=[4]', [[0, 1], [2, 3]]),
    ('[2,2]<=[2,2]T(1,0)', [[0, 2], [1, 3]]),
    ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    ("mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
  ],
)
def test_groups(groups, want):
  found = hlo.groups(line(f'replica_groups={groups}'))
  np.testing.assert_array_equal(found, want)


def test_groups_of_a_permute_and_of_an_unknown_form():
  found = hlo.groups(line('source_target_pairs={{0,1},{1,0}}'))
  np.testing.assert_array_equal(found, [[0, 1], [1, 0]])
  with pytest.raises(ValueError, match='unknown form: replica_groups=weird'):
    hlo.groups(line('replica_groups=weird'))


def test_what_is_no_program_is_refused():
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo.parse('HloModule jit_f')
  with pytest.raises(ValueError, match='not an instruction'):
    hlo.parse('ENTRY %m (x: f32[]) -> f32[] {\n  nonsense\n}')
  with pytest.raises(ValueError, match='bracket is not closed'):
    hlo.parse('ENTRY %m (x: f32[]) -> f32[] {\n  %x = f32[] add(%y\n}')


def test_the_branch_with_most_cycles_counts():
  text = """
%small (p: f32[8]) -> f32[8] {
  ROOT %one = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"1"}
}

%large (p: f32[8]) -> f32[8] {
  ROOT %two = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"2"}
}

ENTRY %m (i: s32[], x: f32[8]) -> f32[8] {
  %i = s32[] parameter(0)
  %x = f32[8]{0} parameter(1)
  ROOT %y = f32[8]{0} conditional(%i, %x, %x), branch_computations={%small, %large}
}"""
  names = [i.name for _, i, _ in hlo.parse(text).executed()]
  assert 'two' in names and 'one' not in names
