import dataclasses
import functools

import bridge
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import sharding
from mmjax.batch import Bank
from mmjax.nn.transformer import unstack
from mmjax.nn.vit import POOLS, POSITIONS, Vit

B, P, I, C, D = 2, 16, 3, 6, 16
FIELDS = dict(
  channels=C, embed_dim=D, num_layers=2, num_heads=2, mlp_dim=24, position_grid=(3, 3)
)
GRIDS = {(0, 1): (1, 2, 3), (0, 2): (1, 3, 3), (1, 1): (1, 4, 1), (1, 3): (2, 2, 2)}


def bank(which=GRIDS, rows=B, items=I, patches=P):
  """Items of native aspect ratios, (time, rows, columns) each, end to end."""
  made = Bank(
    values=np.zeros((rows, patches, C), np.uint8),
    items=np.zeros((rows, patches), np.int32),
    positions=np.zeros((rows, patches, 3), np.int32),
    item_segments=np.zeros((rows, items), np.int32),
    item_order=np.zeros((rows, items), np.int32),
  )
  at = [0] * rows
  for (b, i), grid in which.items():
    cells = np.indices(grid).reshape(3, -1).T
    here = (b, slice(at[b], at[b] + len(cells)))
    values = np.random.default_rng(grid).integers(0, 255, (len(cells), C))
    made.values[here], made.items[here], made.positions[here] = values, i, cells
    made.item_segments[b, i - 1], at[b] = 1, here[1].stop
  return made


def of_item(out, pool, made, b, i):
  return out[b, made.items[b] == i] if pool == 'none' else out[b, i - 1]


@functools.cache
def variables(model):
  return jax.jit(model.init)(jax.random.key(0), bank())


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, bank):
  return output(model, model.apply(variables, bank))


def output(model, features):
  """What the tests look at: the items' vectors if there are any, else the tokens."""
  return features.values if model.pool == 'none' else features.pooled


def run(model, bank):
  return np.asarray(apply(model, variables(model), bank))


@pytest.mark.parametrize(
  ('pool', 'positions'),
  [('none', p) for p in POSITIONS] + [(p, 'learned') for p in POOLS[1:]],
)
def test_packed_items_equal_each_alone(pool, positions):
  model = Vit(**FIELDS, pool=pool, positions=positions)
  whole = bank()
  got = run(model, whole)
  assert got.shape == ((B, P, D) if pool == 'none' else (B, I, D))
  assert np.isfinite(got).all()
  for (b, i), grid in GRIDS.items():
    alone = bank({(0, 1): grid}, 1, 1)
    want = of_item(run(model, alone), pool, alone, 0, 1)
    got_item = of_item(got, pool, whole, b, i)
    assert got_item.shape == want.shape and want.size
    np.testing.assert_allclose(got_item, want, atol=5e-6)


@pytest.mark.parametrize('pool', POOLS)
def test_an_item_changes_with_its_own_patches_only(pool):
  model = Vit(**FIELDS, pool=pool)
  whole, other = bank(), bank()
  other.values[0, other.items[0] == 2] ^= 255
  other.values[other.items == 0] = 77
  before, after = run(model, whole), run(model, other)
  for b, i in GRIDS:
    changed = of_item(before != after, pool, whole, b, i).any(-1)
    assert np.all(changed == ((b, i) == (0, 2)))


def test_frames_of_a_video_are_seen_alone():
  model, whole, other = Vit(**FIELDS), bank(), bank()
  mine = (whole.items[1] == 3) & (whole.positions[1, :, 0] == 1)
  other.values[1, mine] ^= 255
  changed = np.any(run(model, whole) != run(model, other), -1)
  np.testing.assert_array_equal(changed[1], mine)


@pytest.mark.parametrize('positions', POSITIONS)
def test_where_a_patch_is_matters(positions):
  model, whole, other = Vit(**FIELDS, positions=positions, pool='mean'), bank(), bank()
  other.values[0, :6] = whole.values[0, [3, 4, 5, 0, 1, 2]]  # its two rows exchanged
  assert np.abs(run(model, whole) - run(model, other))[0, 0].max() > 1e-4
  assert not np.any((run(model, whole) != run(model, other))[0, 1])


CLIP = dict(
  pool='class', patch_bias=False, embedding_norm=True, activation='quick_gelu',
  mean=(120.0, 110.0, 100.0), std=(60.0, 70.0, 80.0), norm_eps=1e-5,
)  # fmt: skip


@pytest.mark.parametrize(
  'fields',
  [
    dict(pool='class'),
    CLIP,
    CLIP | dict(pool='none', class_token=True, final_norm=False),  # as in LLaVA
    dict(pool='class', pooler=True, num_classes=5),
  ],
)
def test_equals_an_encoder_in_numpy(fields):
  """Pre-norm, biases: the encoder of 2010.11929, equations 1 to 4, and its kin."""
  from scipy.special import erf

  model, made = Vit(**FIELDS, **fields), bank()
  w = jax.tree.map(np.asarray, variables(model)['params'])
  w = jax.tree.map(lambda x: x + 0.1, w)  # no bias is 0
  got = jax.jit(model.apply)({'params': w}, made)

  def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + model.norm_eps)
    return x * p['scale'] + p['bias']

  def act(x):
    if model.activation == 'quick_gelu':
      return x / (1 + np.exp(-1.702 * x))
    return x * (1 + erf(x / np.sqrt(2))) / 2

  pixels = made.values[0, made.items[0] == 2].reshape(9, 2, 3)
  pixels = (pixels - np.array(model.mean)) / np.array(model.std)
  x = pixels.reshape(9, C) @ w['patch']['kernel'] + w['patch'].get('bias', 0)
  x = np.concatenate([w['class'][None], x]) + w['position']
  if model.embedding_norm:
    x = norm(x, w['embed_norm'])
  for p in (
    jax.tree.map(lambda a, i=i: a[i], w['transformer']['layers']) for i in (0, 1)
  ):
    y, a, m = norm(x, p['attention_norm']), p['attention'], p['mlp']
    q, k, v = (
      np.einsum('sd,dnh->nsh', y, a[n]) + a[f'{n}_bias'][:, None]
      for n in ('query', 'key', 'value')
    )
    weights = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(8))
    weights /= weights.sum(-1, keepdims=True)
    x = x + np.einsum('nsh,nhd->sd', weights @ v, a['out']) + a['out_bias']
    h = norm(x, p['mlp_norm']) @ m['up'] + m['up_bias']
    x = x + act(h) @ m['down'] + m['down_bias']
  if model.final_norm:
    x = norm(x, w['transformer']['norm'])
  pairs = [(got.values[0, made.items[0] == 2], x[1:])]
  if model.pool == 'class':
    pooled = x[0]
    if model.pooler:
      pooled = np.tanh(pooled @ w['pool_dense']['kernel'] + w['pool_dense']['bias'])
    pairs.append((got.pooled[0, 1], pooled))
  if model.num_classes:
    logits = model.apply({'params': w}, got.pooled, method='logits')
    pairs.append((logits[0, 1], pooled @ w['head']['kernel'] + w['head']['bias']))
  for ours, want in pairs:
    np.testing.assert_allclose(ours, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_scan_and_remat_change_no_number():
  model = Vit(**FIELDS, pool='map')
  params = variables(model)['params']

  @functools.partial(jax.jit, static_argnums=1)
  def grad(p, model):
    def loss(p):
      return jnp.sum(jnp.sin(model.apply({'params': p}, bank()).pooled))

    return jax.value_and_grad(loss)(p)

  def flat(p):
    return {**p, 'transformer': unstack(p['transformer'], 2)}

  value, grads = grad(params, model)
  for other, got in (
    (grad(params, model.clone(remat='full')), grads),
    (grad(flat(params), model.clone(scan=False)), flat(grads)),
  ):
    leaves = jax.tree_util.tree_leaves_with_path(got)
    most = max(np.abs(want).max() for _, want in leaves)
    for (path, want), g in zip(leaves, jax.tree.leaves(other[1]), strict=True):
      scale = max(np.abs(want).max(), 1e-4)
      if 'key_bias' in jax.tree_util.keystr(path):
        # Softmax doesn't see what all keys have in common: 0, but for rounding.
        assert np.abs(want).max() <= 1e-6 * most
        scale = most
      np.testing.assert_allclose(g, want, rtol=0, atol=2e-5 * scale)
    np.testing.assert_allclose(other[0], value, rtol=1e-5)


def test_sizes_of_the_paper():
  """ViT-B/16 and L/16 at 224 without heads (2010.11929, table 1): 86 and 304 million."""
  for fields, want in (
    (dict(embed_dim=768, num_layers=12, num_heads=12, mlp_dim=3072), 85_798_656),
    (dict(embed_dim=1024, num_layers=24, num_heads=16, mlp_dim=4096), 303_301_632),
  ):
    model = Vit(channels=768, position_grid=(14, 14), pool='class', **fields)
    empty = Bank(
      np.zeros((1, 4, 768), np.uint8), *np.zeros((1, 1, 4), np.int32),
      np.zeros((1, 4, 3), np.int32), *np.zeros((2, 1, 1), np.int32),
    )  # fmt: skip
    made = jax.eval_shape(model.init, jax.random.key(0), empty)
    count = sum(x.size for x in jax.tree.leaves(made))
    assert count == want


def test_every_parameter_has_names():
  init = functools.partial(Vit(**FIELDS, pool='map').init, jax.random.key(0))
  names = sharding.axis_names(init, bank())['params']
  assert tuple(names['position']) == ('patch', 'embed')
  assert tuple(names['map_head']['attention']['key']) == ('embed', 'heads', 'head_dim')


@pytest.mark.parametrize('pool', ['class', 'map'])
def test_bridges_to_nnx(pool):
  model = Vit(**FIELDS, pool=pool)
  _, got, want = bridge.both(model, bank())
  np.testing.assert_allclose(got.pooled, want.pooled, atol=2e-6)
  np.testing.assert_allclose(got.values, want.values, atol=2e-6)


def test_class_tokens_are_given_behind_the_patches():
  """What pool='class' pools, as tokens of their items; the patches stay as they were."""
  b = bank()
  plain, given = (Vit(**FIELDS, pool='class', give_class=g) for g in (False, True))
  weights = jax.jit(plain.init)(jax.random.key(0), b)
  want, got = jax.jit(plain.apply)(weights, b), jax.jit(given.apply)(weights, b)
  P, I = b.items.shape[1], b.item_segments.shape[1]
  np.testing.assert_array_equal(got.values[:, :P], want.values)
  np.testing.assert_array_equal(got.values[:, P:], want.pooled)
  there = np.where(b.item_segments > 0, 1 + np.arange(I)[None], 0)
  np.testing.assert_array_equal(got.items, np.concatenate([b.items, there], 1))
  assert got.positions.shape == (*got.items.shape, 3)


def test_the_kernel_takes_patches_and_class_tokens_as_they_are():
  """112 patches and 3 class tokens are no whole tile: nothing is filled up for it."""
  b = bank(patches=112)
  plain, kernel = (
    Vit(**FIELDS, pool='class', give_class=True, attention=way)
    for way in ('xla', 'pallas')
  )
  want, got = apply(plain, variables(plain), b), apply(kernel, variables(plain), b)
  seen = b.item_segments > 0
  np.testing.assert_allclose(got[seen], want[seen], atol=1e-5)
  jaxpr = str(jax.make_jaxpr(kernel.apply)(variables(plain), b))
  assert f'{B},115,{D}]' in jaxpr and f'{B},128,' not in jaxpr


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(positions='rotery'), "unknown positions 'rotery'; did you mean 'rotary'"),
    (dict(pool='cls'), "unknown pool 'cls'"),
    (dict(give_class=True), 'give_class needs class_token'),
    (dict(num_heads=3), 'embed_dim=16 does not divide over num_heads=3'),
    (dict(pool='class', reach=4), 'a class token needs reach=None'),
    (dict(class_token=True, reach=4), 'a class token needs reach=None'),
    (dict(pooler=True), "pooler and num_classes need a pool, not 'none'"),
    (dict(num_classes=2), "pooler and num_classes need a pool, not 'none'"),
    (dict(channels=5), 'patches have 6 channels, ViT takes 5'),
    (dict(remat='ful'), "remat='ful' is none of"),
  ],
)
def test_refuses(change, message):
  with pytest.raises(ValueError, match=message):
    Vit(**FIELDS | change).init(jax.random.key(0), bank())


def test_bytes_have_colours_and_logits_a_head():
  made = bank()
  odd = dataclasses.replace(made, values=made.values[..., :5])
  with pytest.raises(ValueError, match='bytes have three colours, channels=5'):
    Vit(**FIELDS | dict(channels=5)).init(jax.random.key(0), odd)
  with pytest.raises(ValueError, match='built with num_classes=0'):
    nothing = np.zeros((1, D), np.float32)
    Vit(**FIELDS).apply(variables(Vit(**FIELDS)), nothing, method='logits')
