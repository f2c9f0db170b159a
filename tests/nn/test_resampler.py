import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax import sharding
from mmjax.nn.resampler import Resampler

MODULE = Resampler(16, 2, num_heads=2, mlp_dim=32, num_latents=3, num_frames=4)
B, P, C, I, R = 2, 12, 10, 3, 3


def example(seed=0):
  """Row 0 holds items of 5 and 3 tokens, row 1 of 2, 4 and 1; items in turns."""
  rng = np.random.default_rng(seed)
  media = rng.normal(size=(B, P, C)).astype(np.float32)
  items, times = np.zeros((2, B, P), np.int32)
  items[0, :8] = [1, 2, 1, 1, 2, 2, 1, 1]
  items[1, :7] = [1, 1, 2, 2, 2, 2, 3]
  times[1, :7] = [0, 1, 0, 2, 3, 9, 0]
  return media, items, times


@functools.cache
def params():
  media, items, times = example()
  make = jax.jit(MODULE.init, static_argnums=3)
  return make(jax.random.key(0), media, items, I, times)['params']


@functools.partial(jax.jit, static_argnums=3)
def apply(params, media, items, num_items, times):
  return MODULE.apply({'params': params}, media, items, num_items, times)


def run(*args):
  return apply(params(), *args)


def test_packed_items_equal_each_alone():
  media, items, times = example()
  got = run(media, items, I, times)
  assert got.shape == (B, I * R, 16)
  for b, i in ((0, 1), (0, 2), (1, 1), (1, 2), (1, 3)):
    mine = items[b] == i
    n = mine.sum()
    alone = [np.zeros((1, P, *x.shape[2:]), x.dtype) for x in (media, items, times)]
    for x, whole in zip(alone, (media, items, times)):
      x[0, :n] = whole[b, mine]
    alone[1][0, :n] = 1
    want = run(alone[0], alone[1], 1, alone[2])[0]
    np.testing.assert_allclose(got[b, (i - 1) * R : i * R], want, atol=2e-6)


def test_latents_change_with_their_own_item_only():
  media, items, times = example()
  before = run(media, items, I, times)
  for b, i in ((0, 2), (1, 1), (1, 3)):
    other = media.copy()
    other[b, items[b] == i] *= -1
    changed = np.any(run(other, items, I, times) != before, -1)
    want = np.zeros((B, I, R), bool)
    want[b, i - 1] = True
    np.testing.assert_array_equal(changed, want.reshape(B, -1))


def test_padding_and_absent_items_are_harmless():
  media, items, times = example()
  wild = media.copy()
  wild[items == 0] = 1e9
  want = run(media, items, I, times)
  np.testing.assert_array_equal(run(wild, items, I, times), want)
  assert np.isfinite(want).all()
  assert np.isfinite(run(media, 0 * items, I, times)).all()


def test_frames_are_told_apart_and_late_ones_share_the_last():
  media, items, times = example()
  want = run(media, items, I, times)
  near, late = times.copy(), times.copy()
  near[1, 1], late[1, 5] = 2, 3
  assert np.abs(run(media, items, I, near)[1, :R] - want[1, :R]).max() > 1e-4
  np.testing.assert_array_equal(run(media, items, I, late), want)


def test_equals_the_paper_in_numpy():
  """Figure 5 for one item, written out."""
  w = jax.tree.map(np.asarray, params())
  media, items, times = example()
  mine = items[1] == 2

  def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p['scale'] + p['bias']

  x_f = media[1, mine] @ w['input'] + w['time'][np.minimum(times[1, mine], 3)]
  x = w['latents']
  for i in range(2):
    p = jax.tree.map(lambda a, i=i: a[i], w['layers'])
    y = norm(x, p['latent_norm'])
    seen = np.concatenate([norm(x_f, p['media_norm']), y])
    q, k, v = (
      np.einsum('sd,dnh->nsh', z, p['attention'][name])
      for z, name in ((y, 'query'), (seen, 'key'), (seen, 'value'))
    )
    weights = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(8))
    weights /= weights.sum(-1, keepdims=True)
    x = x + np.einsum('nsh,nhd->sd', weights @ v, p['attention']['out'])
    y = norm(x, p['mlp_norm'])
    x = x + np.maximum(y @ p['mlp']['up'], 0) ** 2 @ p['mlp']['down']
  want = norm(x, w['norm'])
  np.testing.assert_allclose(run(media, items, I, times)[1, R : 2 * R], want, atol=2e-5)


def test_remat_changes_no_number():
  media, items, times = example()

  def loss(p, module):
    out = module.apply({'params': p}, media, items, I, times)
    return jnp.sum(jnp.sin(out))

  grad = jax.jit(jax.grad(loss), static_argnums=1)
  want, got = (grad(params(), m) for m in (MODULE, MODULE.clone(remat='full')))
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=0, atol=2e-6 * np.abs(w).max())


def test_every_parameter_has_names():
  media, items, times = example()
  init = lambda key: MODULE.init(key, media, items, I, times)  # noqa: E731
  names = sharding.axis_names(init, jax.random.key(0))['params']
  assert tuple(names['latents']) == ('latents', 'embed')
  assert tuple(names['layers']['mlp']['up']) == ('layers', 'embed', 'mlp')


@pytest.mark.slow
def test_bridges_to_nnx():
  media, items, times = example()
  bridged = nnx.bridge.ToNNX(MODULE, rngs=nnx.Rngs(0))
  bridged = nnx.bridge.lazy_init(bridged, media, items, I, times)
  made = nnx.to_pure_dict(nnx.state(bridged, nnx.Param))
  want = MODULE.apply({'params': made}, media, items, I, times)
  np.testing.assert_allclose(bridged(media, items, I, times), want, atol=1e-6)


def test_refuses():
  media, items, _ = example()
  with pytest.raises(ValueError, match='time embeddings need the frames'):
    MODULE.init(jax.random.key(0), media, items, I)
  with pytest.raises(ValueError, match='axis P is 12 and 11'):
    MODULE.init(jax.random.key(0), media, items[:, 1:], I)
  for change, message in (
    (dict(activation='relu3'), "activation 'relu3'; did you mean 'relu'"),
    (dict(norm='lay'), "norm 'lay'; did you mean 'layer'"),
    (dict(attention='flash'), "unknown attention 'flash'"),
    (dict(num_heads=5), 'embed_dim=16 does not divide over num_heads=5'),
  ):
    with pytest.raises(ValueError, match=message):
      MODULE.clone(**change).config()
