"""Memory of attention and its gradient on a TPU chip, compiled without one.

  python benchmarks/attention_memory.py                       # a JSON line per case
  python benchmarks/attention_memory.py --lengths=131072 --way=kernel --chip=v5p

One row of T slots, bfloat16, packed causal documents. `peak_mib` is libtpu's peak per
device with inputs and gradients; `arrays_mib` is what q, k, v, the output and their four
gradients take, which nobody can do without. Needs jax[tpu]; nothing runs.

  kernel   ops.kernels.attention, by tags
  plain    ops.attention in chunks of 512 queries, by tags
  jax.nn   jax.nn.dot_product_attention with the mask of the tags, made where it is used
  splash   JAX's splash attention: a causal mask and segments, which are what it can
           express of the tags; images that see themselves are not among that
"""

import argparse
import json

import compiled  # before JAX
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash_lib,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as masks,
)

from mmjax import sharding
from mmjax.batch import KeyTags, QueryTags, visible
from mmjax.ops.attention import attend

TOPOLOGIES = {
  'v4': 'v4:2x2x1', 'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2',
}  # fmt: skip


def ours(implementation):
  def run(q, k, v, query, key):
    return attend(q, k, v, query, key, implementation=implementation)

  return run


def jax_nn(q, k, v, query, key):
  mask = visible(query, key)[:, None]
  return jax.nn.dot_product_attention(q, k, v, mask=mask)


def splash(q, k, v, query, key):
  T, N, H = q.shape[1:]
  size = min(512, T)
  sizes = splash_lib.BlockSizes(
    block_q=size, block_kv=size, block_kv_compute=size, block_q_dkv=size,
    block_kv_dkv=size, block_kv_dkv_compute=size, block_q_dq=size, block_kv_dq=size,
  )  # fmt: skip
  mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * N)
  kernel = splash_lib.make_splash_mha(
    mask, block_sizes=sizes, head_shards=1, q_seq_shards=1
  )
  segments = splash_lib.SegmentIds(query.segment_ids, key.segment_ids)
  heads = [jnp.moveaxis(x, 1, 2) for x in (q * H**-0.5, k, v)]
  return jnp.moveaxis(jax.vmap(kernel)(*heads, segments), 1, 2)


WAYS = {
  'kernel': ours('pallas'), 'plain': ours('xla'), 'jax.nn': jax_nn, 'splash': splash,
}  # fmt: skip


def measure(way, T, chip, heads, width):
  mesh = sharding.make_mesh({}, compiled.devices(TOPOLOGIES[chip])[:1])
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((1, T, *shape), dtype, sharding=place)

  tag = array(dtype=jnp.int32)
  x = array(heads, width)

  def run(q, k, v, do, query, key):
    out, pull = jax.vjp(lambda *x: WAYS[way](*x, query, key), q, k, v)
    return out, pull(do)

  line = {'way': way, 'T': T, 'chip': chip, 'heads': heads, 'head_dim': width}
  line['arrays_mib'] = round(8 * T * heads * width * 2 / 2**20, 1)
  with sharding.use(mesh, sharding.RULES['dp']):
    args = x, x, x, x, QueryTags(tag, tag, tag), KeyTags(tag, tag)
    return line | compiled.memory(jax.jit(run), args)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--lengths', default='2048,8192,32768,131072')
  parser.add_argument('--way', choices=WAYS, help='only this one')
  parser.add_argument('--chip', choices=TOPOLOGIES, default='v5e')
  parser.add_argument('--heads', type=int, default=8)
  parser.add_argument('--head-dim', type=int, default=128)
  args = parser.parse_args()
  for T in map(int, args.lengths.split(',')):
    for way in WAYS:
      if args.way in (None, way):
        line = measure(way, T, args.chip, args.heads, args.head_dim)
        print(json.dumps(line), flush=True)


if __name__ == '__main__':
  main()
