import dataclasses

import bridge
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wide
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from mmjax import sharding
from mmjax.batch import KeyTags, QueryTags
from mmjax.nn import transformer
from mmjax.nn.cache import empty_cache
from mmjax.nn.transformer import (
  Attention,
  Block,
  Config,
  LayerNorm,
  Mlp,
  RMSNorm,
  Transformer,
  unstack,
)
from mmjax.ops.positions import rotary_angles

CONFIG = Config(
  embed_dim=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24,
  qk_norm=True,
)  # fmt: skip
# The fields of CLIP's and GPT-2's layers.
CLIP = dict(norm='layer', bias='all', gated=False, rotary=False, activation='quick_gelu')


def example(B=2, T=6, D=16):
  x = jax.random.normal(jax.random.key(1), (B, T, D))
  order = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
  ones = jnp.ones_like(order)
  positions = jnp.broadcast_to(order[..., None], (B, T, 3))
  return x, positions, QueryTags(ones, 0 * order, order), KeyTags(ones, order)


def value_and_grads(config, params, args):
  def loss(params, x):
    return jnp.sum(
      jnp.sin(Transformer(config).apply({'params': params}, x, *args[1:])[0])
    )

  return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, args[0])


@pytest.fixture(scope='module')
def scanned():
  args = example()
  init = jax.jit(Transformer(CONFIG).init)
  params = init(jax.random.key(0), *args)['params']
  return params, args, value_and_grads(CONFIG, params, args)


def assert_close(got, want, rtol=1e-5):
  """Equal relative to the largest entry of each leaf."""
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=0, atol=rtol * np.abs(w).max())


def test_scan_equals_layers_one_by_one(scanned):
  params, args, (value, (grads, dx)) = scanned
  config = dataclasses.replace(CONFIG, scan=False)
  flat = unstack(params, CONFIG.num_layers)
  got, (got_grads, got_dx) = value_and_grads(config, flat, args)
  assert_close((got, got_grads, got_dx), (value, unstack(grads, 3), dx))
  made = jax.eval_shape(Transformer(config).init, jax.random.key(0), *args)['params']
  assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, flat)


@pytest.mark.parametrize('remat', sorted(set(transformer.REMAT) - {'none'}))
def test_remat_changes_no_number(scanned, remat):
  params, args, want = scanned
  config = dataclasses.replace(CONFIG, remat=remat)
  assert_close(value_and_grads(config, params, args), want, 2e-6)


@pytest.mark.slow
def test_full_remat_keeps_less():
  config = dataclasses.replace(CONFIG, mlp_dim=512, num_layers=8)
  args = example(T=64)
  params = jax.eval_shape(Transformer(config).init, jax.random.key(0), *args)['params']

  def held(remat):
    model = Transformer(dataclasses.replace(config, remat=remat))

    def loss(p):
      return jnp.sum(model.apply({'params': p}, *args)[0])

    compiled = jax.jit(jax.grad(loss)).lower(params).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  none, dots, full = (held(r) for r in ('none', 'dots', 'full'))
  assert full < dots < none


@pytest.mark.parametrize(
  ('change', 'count'), [({}, 12), (dict(CLIP, post_norm=True), 20)]
)
def test_every_axis_of_every_parameter_is_named(scanned, change, count):
  _, args, _ = scanned
  config = dataclasses.replace(CONFIG, **change)
  names = sharding.axis_names(Transformer(config).init, jax.random.key(0), *args)
  leaves = jax.tree.leaves(names, is_leaf=lambda x: isinstance(x, P))
  assert all(isinstance(n, P) and None not in n for n in leaves)
  assert len(leaves) == count
  assert names['params']['layers']['mlp']['up'] == P('layers', 'embed', 'mlp')


def test_dropout_is_only_in_training(scanned):
  params, args, _ = scanned
  model = Transformer(dataclasses.replace(CONFIG, dropout=0.5))
  run = jax.jit(
    lambda key, train: model.apply(
      {'params': params}, *args, train=train, rngs={'dropout': key}
    )[0],
    static_argnums=1,
  )
  a, b = jax.random.key(1), jax.random.key(2)
  plain, _ = Transformer(CONFIG).apply({'params': params}, *args)
  np.testing.assert_allclose(run(a, False), plain, atol=1e-5)
  assert np.abs(run(a, True) - plain).max() > 0.1
  assert np.abs(run(a, True) - run(b, True)).max() > 0.1


@pytest.mark.slow
def test_layers_differ_and_the_stream_keeps_its_scale():
  config = dataclasses.replace(CONFIG, num_layers=24, qk_norm=False)
  x, positions, *tags = args = example(T=32)
  params = jax.jit(Transformer(config).init)(jax.random.key(0), *args)['params']
  query = params['layers']['attention']['query']
  assert np.abs(query[0] - query[1]).max() > 0.01
  layer, angles = jax.jit(Block(config).apply), rotary_angles(positions, 4)
  stream = x
  for i in range(24):
    weights = jax.tree.map(lambda p, i=i: p[i], params['layers'])
    stream, _ = layer({'params': weights}, stream, None, angles, *tags, None)
  assert 0.7 < float(jnp.std(stream)) / float(jnp.std(x)) < 1.5


def test_compute_in_bfloat16_keeps_parameters_in_float32(scanned):
  params, args, _ = scanned
  config = dataclasses.replace(CONFIG, dtype='bfloat16')
  x = args[0].astype(jnp.bfloat16)
  made = jax.eval_shape(Transformer(config).init, jax.random.key(0), x, *args[1:])
  assert {p.dtype for p in jax.tree.leaves(made)} == {jnp.dtype('float32')}
  hidden, _ = jax.jit(Transformer(config).apply)({'params': params}, x, *args[1:])
  assert hidden.dtype == jnp.bfloat16
  want, _ = Transformer(CONFIG).apply({'params': params}, *args)
  assert np.abs(hidden.astype(jnp.float32) - want).max() < 0.1


@pytest.mark.parametrize('activation', ['silu', 'gelu', 'quick_gelu'])
def test_an_mlp_in_bfloat16_rounds_its_activation_once(activation):
  """With kernels of ones on the diagonal, products are exact; what is left to round is
  act(x) * x, and its slope."""
  config = dataclasses.replace(CONFIG, mlp_dim=16, activation=activation)
  params = {name: jnp.eye(16) for name in ('up', 'gate', 'down')}
  x = jax.random.normal(jax.random.key(0), (4, 64, 16), jnp.bfloat16)
  act = transformer.ACTIVATIONS[activation]

  def mlp(x):
    return Mlp(config).apply({'params': params}, x)

  def exact(x):
    return act(x) * x

  got, pull = jax.vjp(mlp, x)
  want = exact(x.astype(jnp.float32))
  np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))
  # Of gate and up, each rounded, and once more their sum.
  slope = jax.vmap(jax.grad(exact))(x.astype(jnp.float32).reshape(-1)).reshape(x.shape)
  error = jnp.abs(pull(jnp.ones_like(got))[0].astype(jnp.float32) - slope)
  assert jnp.all(error <= 2**-8 * (jnp.abs(slope) + 2 * jnp.abs(want) + 1))


@pytest.mark.parametrize('scan', [True, False])
def test_cache_fed_in_two_parts_equals_all_at_once(scanned, scan):
  params, args, _ = scanned
  config = dataclasses.replace(CONFIG, scan=scan)
  params = params if scan else unstack(params, 3)
  run = jax.jit(Transformer(config).apply)
  want, none = run({'params': params}, *args)
  assert none is None
  layers = empty_cache(2, 8, 3, 2, 4, 'float32', scan).layers
  x, positions, queries, keys = args
  pad = jax.tree.map(lambda k: jnp.pad(k, ((0, 0), (0, 2))), keys)
  got = []
  for part in (slice(0, 4), slice(4, 6)):
    cut = jax.tree.map(lambda y, part=part: y[:, part], (x, positions, queries))
    out, layers = run({'params': params}, *cut, pad, layers, part.start)
    got.append(out)
  np.testing.assert_allclose(jnp.concatenate(got, 1), want, atol=1e-5)


def _modules():
  x, positions, queries, keys = example()
  angles = rotary_angles(positions, 4)
  return {
    'norm': (RMSNorm(), (x,)),
    'layer_norm': (LayerNorm(), (x,)),
    'mlp': (Mlp(CONFIG), (x,)),
    'attention': (Attention(CONFIG), (x, angles, queries, keys)),
    'transformer': (Transformer(CONFIG), (x, positions, queries, keys)),
  }


@pytest.mark.parametrize(
  'name', ['norm', 'layer_norm', 'mlp', 'attention', 'transformer']
)
def test_bridges_to_nnx(name):
  module, args = _modules()[name]
  _, got, want = bridge.both(module, *args)
  assert_close(got, want, 1e-6)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(remat='ful'), "remat='ful' is none of all_dots, attention, .*, full, none"),
    (dict(activation='relo'), "activation='relo' is none of gelu"),
    (dict(norm='batch'), "norm='batch' is none of layer, rms, rms_offset"),
    (dict(bias=True), 'bias=True is none of all, none, qkv'),
    (dict(attention='flash'), "attention='flash' is none of auto, pallas, xla"),
    (dict(num_kv_heads=3), 'num_heads=4 does not divide over num_kv_heads=3'),
  ],
)
def test_config_refuses(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize('activation', sorted(transformer.ACTIVATIONS))
def test_mlp_is_the_gated_product(activation):
  x = example()[0]
  module = Mlp(dataclasses.replace(CONFIG, activation=activation))
  variables = module.init(jax.random.key(0), x)
  w = variables['params']
  want = (transformer.ACTIVATIONS[activation](x @ w['gate']) * (x @ w['up'])) @ w['down']
  np.testing.assert_allclose(module.apply(variables, x), want, atol=1e-5)


@pytest.mark.parametrize('activation', sorted(transformer.ACTIVATIONS))
@pytest.mark.parametrize('gated', [True, False])
def test_gradients_of_an_mlp_are_slopes(activation, gated):
  """In float64, beside central differences; the gate's, too."""
  config = dataclasses.replace(CONFIG, activation=activation, gated=gated)
  config = dataclasses.replace(config, dtype='float64', param_dtype='float64')
  with wide.float64():
    x = wide.widen(example()[0])
    params = Mlp(config).init(jax.random.key(0), x)

    def loss(params, x):
      return jnp.sum(jnp.sin(Mlp(config).apply(params, x)))

    check_grads(loss, (params, x), order=1, modes=['rev'], eps=1e-6, atol=1e-6, rtol=1e-6)


def plain_norm(x, w):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w['scale'] + w['bias']


def plain_attention(x, w):
  """Of one row, causal, in NumPy; two query heads to a key head."""
  q, k, v = (
    np.einsum('td,dnh->nth', x, w[n]) + w[f'{n}_bias'][:, None]
    for n in ('query', 'key', 'value')
  )
  logits = np.einsum('nth,nsh->nts', q, np.repeat(k, 2, 0)) / 2
  weights = np.exp(logits) * np.tri(len(x))
  weights /= weights.sum(-1, keepdims=True)
  out = np.einsum('nts,nsh->nth', weights, np.repeat(v, 2, 0))
  return np.einsum('nth,nhd->td', out, w['out']) + w['out_bias']


@pytest.mark.parametrize('post_norm', [False, True])
def test_other_layers_are_their_equations(post_norm):
  """Layer norm, biases, plain MLP, no rotation, norms before or after: in NumPy."""
  config = dataclasses.replace(
    CONFIG, **CLIP, qk_norm=False, post_norm=post_norm, scan=False, num_layers=2
  )
  args = example(B=1)
  made = jax.eval_shape(Transformer(config).init, jax.random.key(0), *args)['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype('f') * 0.4, made)
  x = np.asarray(args[0][0])
  for i in range(2):
    w = params[f'layer_{i}']

    def mlp(x, w=w['mlp']):
      h = x @ w['up'] + w['up_bias']
      return h / (1 + np.exp(-1.702 * h)) @ w['down'] + w['down_bias']

    for name, branch in (
      ('attention_norm', lambda x, w=w: plain_attention(x, w['attention'])),
      ('mlp_norm', mlp),
    ):
      if post_norm:
        x = plain_norm(x + branch(x), w[name])
      else:
        x = x + branch(plain_norm(x, w[name]))
  assert ('norm' in params) != post_norm
  want = x if post_norm else plain_norm(x, params['norm'])
  got, _ = Transformer(config).apply({'params': params}, *args)
  np.testing.assert_allclose(got[0], want, atol=2e-5)


def test_bias_of_inputs_alone_and_offset_norm_start_as_the_plain_layer():
  """At init biases are 0, and 1 + scale is 1: the plain function of more parameters."""
  args = example()
  config = dataclasses.replace(CONFIG, bias='qkv', norm='rms_offset')
  made = Transformer(config).init(jax.random.key(0), *args)['params']
  got, _ = Transformer(config).apply({'params': made}, *args)
  plain = jax.tree.map(lambda x: x, made)
  biases = {k for k in made['layers']['attention'] if k.endswith('bias')}
  assert biases == {'query_bias', 'key_bias', 'value_bias'}
  for name in biases:
    assert not np.any(plain['layers']['attention'].pop(name))
  norms = [plain['layers']['attention'][f'{n}_norm'] for n in ('query', 'key')]
  norms += [plain['norm'], *(plain['layers'][f'{n}_norm'] for n in ('attention', 'mlp'))]
  for norm in norms:
    norm['scale'] = norm['scale'] + 1
  want, _ = Transformer(CONFIG).apply({'params': plain}, *args)
  np.testing.assert_allclose(got, want, atol=1e-5)
