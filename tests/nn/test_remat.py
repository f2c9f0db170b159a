"""The table in `nn.remat`, counted in what the backward pass is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu

from mmjax import sharding as sharding_lib
from mmjax.batch import KeyTags, QueryTags
from mmjax.nn.remat import REMAT, remat
from mmjax.nn.transformer import Config, Transformer


def kept(name, D, N, K, H, F, S):
  """Entries per layer and token, beside its input: (on the device, on the host)."""
  dots = D + (N + 2 * K) * H + 2 * F
  return {
    'full': (0, 0),
    'attention': (N * H, 0),
    'attention+up': (N * H + F, 0),
    'attention+mlp': (N * H + 2 * F, 0),
    'dots': (dots, 0),
    'dots+attention': (dots + N * H, 0),
    'all_dots': (dots + N * S, 0),
    'offload': (0, dots + N * H),
  }[name]


def model_and_args(name, L, B, T, D, N, K, H, F, dtype='float32', sharding=None):
  def of(shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  model = Transformer(
    Config(
      embed_dim=D,
      num_layers=L,
      num_heads=N,
      num_kv_heads=K,
      head_dim=H,
      mlp_dim=F,
      remat=name,
      attention='xla',
      dtype=dtype,
      param_dtype=dtype,
    )  # fmt: skip
  )
  tag = of((B, T))
  rest = of((B, T, D), dtype), of((B, T, 3)), QueryTags(tag, tag, tag), KeyTags(tag, tag)
  params = jax.eval_shape(model.init, jax.random.key(0), *rest)['params']
  params = jax.tree.map(lambda x: of(x.shape, x.dtype), params)
  return model, (params, *rest)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', sorted(set(REMAT) - {'none'}))
def test_backward_is_given_what_the_table_says(name, dtype):
  L, T = 3, 17
  sizes = dict(D=5, N=6, K=2, H=8, F=11)
  model, args = model_and_args(name, L, 1, T, **sizes, dtype=dtype)

  def backward(params, *args):
    return jax.vjp(lambda p: model.apply({'params': p}, *args)[0], params)[1]

  given = [x.shape for x in jax.tree.leaves(jax.eval_shape(backward, *args))]
  given = [s for s in given if s[:1] == (L,) and T in s]  # per layer and token
  entries = sum(int(np.prod(s)) for s in given) // (L * T)
  device, host = kept(name, S=T, **sizes)
  assert entries == 5 + device + host


@pytest.mark.parametrize('cls', [True, False])
def test_none_changes_nothing(cls):
  target = Transformer if cls else jnp.tanh
  assert remat(target, 'none') is target
  assert remat(target, 'full') is not target


@pytest.mark.slow
@pytest.mark.long
@tpu.NEEDED
def test_memory_of_a_tpu_follows_the_table():
  """Compiled for a v5e: the host's share to the byte, the device's in order."""
  mesh = sharding_lib.make_mesh({'data': 1}, tpu.devices()[:1])
  where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  L, T = 8, 1024
  sizes = dict(D=256, N=4, K=2, H=128, F=2048)
  peak = {}
  for name in ('full', 'attention', 'dots+attention', 'offload'):
    model, args = model_and_args(name, L, 1, T, **sizes, dtype='bfloat16', sharding=where)

    def f(params, *args, model=model):
      return jnp.sum(model.apply({'params': params}, *args)[0].astype(jnp.float32))

    # As in a run: what it is compiled for decides how products are written.
    with tpu.optimised(), sharding_lib.use(mesh, sharding_lib.rules_for('dp')):
      memory = jax.jit(jax.grad(f)).lower(*args).compile().memory_analysis()
    _, host = kept(name, S=T, **sizes)
    assert memory.host_temp_size_in_bytes == 2 * host * L * T  # bytes of bfloat16
    peak[name] = memory.peak_memory_in_bytes
  assert peak['full'] < peak['attention'] < peak['dots+attention']
  assert peak['offload'] < peak['dots+attention']
