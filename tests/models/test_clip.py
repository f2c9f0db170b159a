"""CLIP's and SigLIP's models, by their fields: packed, sharded, bridged."""

import functools

import bridge
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fusions import on_mesh

from mmjax import models
from mmjax.batch import BankBudget, Budget

WIDTHS = dict(embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24)
TEXT = dict(WIDTHS, num_kv_heads=2, head_dim=8, vocab_size=40, max_positions=9)
VISION = dict(WIDTHS, name='vit', position_grid=[3, 3])
CLIP = models.build(
  'dual',
  vision=dict(
    VISION, pool='class', patch_bias=False, embedding_norm=True, activation='quick_gelu',
    mean=[123.0, 117.0, 104.0], std=[69.0, 67.0, 70.0],
  ),
  text=dict(
    TEXT, name='unified', norm='layer', bias='all', gated=False, rotary=False,
    scale_embedding=False, activation='quick_gelu',
  ),
  embed_dim=8, media=[['image', 12]], logit_bias=False,
)  # fmt: skip
SIGLIP = models.build(
  'dual',
  vision=dict(VISION, pool='map', activation='gelu_tanh'),
  text=dict(
    TEXT, name='encoder', num_types=0, embedding_norm=False, post_norm=False,
    activation='gelu_tanh',
  ),
  embed_dim=16, media=[['image', 12]], image_projection=False, projection_bias=True,
)  # fmt: skip
KINDS = {'clip': CLIP, 'siglip': SIGLIP}
PAIRS = [((1, 2, 3), 4), ((1, 3, 3), 9), ((1, 1, 2), 1), ((1, 3, 2), 6)]


@pytest.fixture(autouse=True, scope='module')
def _quick_compiles():
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


def batch(*rows):
  """Rows of pairs, by their number in PAIRS: a picture of some grid, a text."""
  made = Budget(22, 22, {'image': BankBudget(24, 4, 12)}).empty(len(rows))
  s, bank = made.stream, made.bank['image']
  for b, row in enumerate(rows):
    t = p = 0
    for i, which in enumerate(row, 1):
      rng, (grid, n) = np.random.default_rng(which), PAIRS[which]
      here, t = (b, slice(t, t + n)), t + n
      s.tokens[here], s.segment_ids[here] = rng.integers(0, 40, n), i
      s.order[here] = s.last[here] = np.arange(n)
      s.positions[here] = np.arange(n)[:, None]
      here, p = (b, slice(p, p + np.prod(grid))), p + np.prod(grid)
      bank.values[here] = rng.integers(0, 256, (np.prod(grid), 12))
      bank.items[here], bank.item_segments[b, i - 1] = i, i
      bank.positions[here] = np.indices(grid).reshape(3, -1).T
  return made


@functools.cache
def params(kind):
  model = KINDS[kind]
  made = jax.eval_shape(model.init, jax.random.key(0), models.padding(model))['params']
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: np.array(0.4 * rng.normal(size=x.shape), x.dtype), made)


def apply(kind, params, batch):
  return KINDS[kind].apply({'params': params}, batch)


run = jax.jit(apply, static_argnums=0)


@pytest.mark.parametrize('kind', KINDS)
def test_packed_equals_one_by_one(kind):
  packed = run(kind, params(kind), batch([0, 1, 2], [3], [], []))
  apart = run(kind, params(kind), batch([0], [1], [2], [3]))
  np.testing.assert_array_equal(packed.weights.sum(1), [3, 1, 0, 0])
  for got, want in zip(packed[:2], apart[:2]):
    got = np.stack([*got[0, :3], got[1, 0]])
    np.testing.assert_allclose(got, want[:, 0], atol=5e-6)
    assert np.linalg.norm(got - got[:1], axis=-1)[1:].min() > 1e-2


def loss_and_grads(kind, params, batch):
  def loss(params):
    pairs = apply(kind, params, batch)
    scale, bias = KINDS[kind].apply({'params': params}, method='temperature')
    image, text = (x.reshape(-1, x.shape[-1]) for x in pairs[:2])
    return jnp.sum(jnp.sin(scale * image @ text.T + bias))

  return jax.value_and_grad(loss)(params)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('kind', 'mesh'), [('clip', 'fsdp4 tensor2'), ('clip', 'mixed'), ('siglip', 'mixed')]
)
def test_eight_devices_equal_one(kind, mesh):
  made, weights = batch([0, 1], [2], [3, 0], [1]), params(kind)
  want, grads = jax.jit(loss_and_grads, static_argnums=0)(kind, weights, made)
  run = functools.partial(loss_and_grads, kind)
  (value, got), weights = on_mesh(run, KINDS[kind], weights, made, mesh)
  np.testing.assert_allclose(value, want, rtol=1e-5)
  most = max(np.abs(w).max() for w in jax.tree.leaves(grads))
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * most), got, grads
  )
  query = weights['vision']['transformer']['layers']['attention']['query']
  rows = 4 if mesh == 'fsdp4 tensor2' else 8
  assert query.sharding.shard_shape(query.shape) == (2, rows, 1, 8)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['clip', pytest.param('siglip', marks=pytest.mark.slow)])
def test_bridges_to_nnx(kind):
  made, model = batch([0, 1], [2]), KINDS[kind]
  state, got, want = bridge.both(model, made)
  assert jax.tree.structure(state) == jax.tree.structure(params(kind))
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=2e-6), got, want)
