"""The attention kernel compiles for every TPU, none of which is here."""

import jax
import jax.numpy as jnp
import pytest
import tpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax import sharding
from mmjax.batch import KeyTags, QueryTags
from mmjax.ops.attention import attend, partial_attend, takes_kernel

pytestmark = [pytest.mark.slow, tpu.NEEDED]

TOPOLOGIES = ('v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1')


def mesh_of(chip):
  """A mesh {data: 2, tensor: 2 or 4} of devices that aren't here."""
  (name,) = (t for t in TOPOLOGIES if t.startswith(f'{chip}:'))
  return sharding.make_mesh({'data': 2, 'tensor': -1}, tpu.devices(name))


def shapes(mesh, T, S, N, K, H, dtype=jnp.bfloat16, until=True):
  """q, k, v and both tags, rows split over data and heads over tensor."""
  heads = NamedSharding(mesh, P('data', None, 'tensor'))
  rows = NamedSharding(mesh, P('data'))

  def array(*shape):
    return jax.ShapeDtypeStruct((4, *shape), dtype, sharding=heads)

  def tag(length):
    return jax.ShapeDtypeStruct((4, length), jnp.int32, sharding=rows)

  query = QueryTags(*(tag(T) for _ in range(4 if until else 3)))
  key = KeyTags(*(tag(S) for _ in range(3 if until else 2)))
  return array(T, N, H), array(S, K, H), array(S, K, H), query, key


def step(mesh, cap=None):
  """(out, lse, gradients) on every device's own part."""
  heads, rows = P('data', None, 'tensor'), P('data')

  def part(q, k, v, query, key):
    return partial_attend(q, k, v, query, key, scale=0.1, logits_soft_cap=cap)

  split = jax.shard_map(
    part, in_specs=(heads, heads, heads, rows, rows), out_specs=(heads, heads),
    check_vma=False,
  )  # fmt: skip

  def run(q, k, v, query, key):
    def loss(q, k, v):
      out, lse = split(q, k, v, query, key)
      return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

  return jax.jit(run)


CASES = {  # chip: T, S, query heads, key heads, width, options of `shapes`, soft cap
  'v4': (1024, 1024, 8, 4, 128, {}, 30.0),
  'v5e': (1024, 1024, 32, 4, 256, {}, None),
  'v5p': (729, 729, 8, 8, 72, dict(until=False), None),
  'v6e': (640, 1500, 16, 4, 64, {}, None),
  'tpu7x': (512, 512, 8, 8, 64, dict(dtype=jnp.float32), 5.0),
}


@pytest.mark.parametrize('chip', CASES)
def test_compiles(chip):
  *sizes, options, cap = CASES[chip]
  mesh = mesh_of(chip)
  with sharding.use(mesh, sharding.RULES['fsdp+tensor']):
    assert takes_kernel('auto', sizes[0])
    compiled = step(mesh, cap).lower(*shapes(mesh, *sizes, **options)).compile()
  text = compiled.as_text()
  for kernel in ('attention_forward', 'attention_queries', 'attention_keys'):
    assert kernel in text, kernel
  # What a plan counts: nine products, of half of the pairs where T == S.
  T, S, N, _, H = sizes
  pairs = 4 * N * T * S // (2 if T == S else 1) / mesh.size
  flops = compiled.cost_analysis()['flops']
  size = (-(-T // 128) * 128) * (-(-S // 128) * 128) / (T * S)
  assert 0.99 < flops / (18 * pairs * H) < 1.4 * size


def test_memory_is_linear_and_one_device_needs_no_shard_map():
  mesh = sharding.make_mesh({}, mesh_of('v5e').devices.reshape(-1)[:1])

  def peak(T):
    with sharding.use(mesh, sharding.RULES['dp']):
      run = jax.jit(lambda *x: attend(*x))
      compiled = run.lower(*shapes(mesh, T, T, 2, 2, 64)).compile()
    assert 'attention_forward' in compiled.as_text()
    return compiled.memory_analysis().peak_memory_in_bytes

  assert peak(8192) < 2.2 * peak(4096)


def test_one_function_traced_for_two_kinds_of_devices():
  run = jax.jit(lambda *x: attend(*x))
  found = []
  for mesh in (sharding.make_mesh({}, jax.devices()[:1]), mesh_of('v5e')):
    mesh = sharding.make_mesh({}, mesh.devices.reshape(-1)[:1])
    with sharding.use(mesh, sharding.RULES['dp']):
      traced = run.trace(*shapes(mesh, 256, 256, 2, 2, 64))
      found.append('pallas_call' in str(traced.jaxpr))
  assert found == [False, True]
