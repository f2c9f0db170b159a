import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from patterns import CROSS, SELF, tags

from mmjax import models, sharding
from mmjax.batch import BankBudget, Budget, KeyTags, QueryTags
from mmjax.ops.attention import attend, partial_attend, takes_kernel
from mmjax.ops.kernels import attention as kernels
from mmjax.ops.kernels.tiles import Tiles

# T, S, query heads, key heads, width, soft cap
SELF_FORM = (256, 256, 4, 2, 16, None)
CROSS_FORM = (200, 260, 2, 2, 24, 3.0)  # nothing is a multiple of a tile


def arrays(form, seed=0, B=2, dtype=np.float32):
  T, S, N, K, H, _ = form
  rng = np.random.default_rng(seed)
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H), (B, T, N)
  return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


@functools.partial(jax.jit, static_argnums=(0, 1))
def both_ways(implementation, cap, q, k, v, do, dlse, query, key):
  """(out, lse) and the gradients by q, k and v with these cotangents."""

  def run(q, k, v):
    return partial_attend(
      q, k, v, query, key, scale=0.3, logits_soft_cap=cap, implementation=implementation
    )

  made, pull = jax.vjp(run, q, k, v)
  return made, pull((do, dlse))


@pytest.fixture
def small_tiles(monkeypatch):
  """Several tiles each way, of such short streams."""
  monkeypatch.setattr(kernels, 'tiles_for', lambda *_: Tiles(128, 128))


def check_equal(form, kind, seed):
  x = arrays(form, seed)
  query, key = tags(kind, seed, *form[:2])
  made, grads = both_ways('pallas', form[-1], *x, query, key)
  want, want_grads = both_ways('xla', form[-1], *x, query, key)
  for g, w in zip(made, want):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)
  for g, w in zip(grads, want_grads):
    np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)
  return made, want


@pytest.mark.parametrize('kind', SELF)
def test_self_attention_equals_the_plain_path(kind, small_tiles):
  (out, lse), _ = check_equal(SELF_FORM, kind, 1)
  if kind == 'nothing':
    np.testing.assert_array_equal(out[0], 0)
    np.testing.assert_array_equal(lse[0], np.finfo(np.float32).min)


@pytest.mark.parametrize('kind', CROSS)
def test_cross_attention_equals_the_plain_path(kind, small_tiles):
  check_equal(CROSS_FORM, kind, 1)


@pytest.mark.slow
def test_equals_the_plain_path_on_many(small_tiles):
  forms = [(SELF_FORM, kind) for kind in SELF] + [(CROSS_FORM, kind) for kind in CROSS]

  @settings(max_examples=60)
  @given(form=st.sampled_from(forms), seed=st.integers(0, 10_000))
  def run(form, seed):
    check_equal(*form, seed)

  run()


def test_what_nobody_sees_is_not_touched(small_tiles):
  q, k, v, do, dlse = arrays(SELF_FORM)
  query, key = tags('documents', 0, *SELF_FORM[:2])
  for tag in (query.segment_ids, query.first, key.segment_ids):
    tag[:, 128:] = 0
  query.last[:, 128:] = -1
  hole = jnp.where(jnp.arange(256)[None, :, None, None] < 128, 0.0, jnp.nan)
  made, grads = both_ways('pallas', None, q, k, v, do, dlse, query, key)
  again, again_grads = both_ways(
    'pallas', None, q, k + hole, v + hole, do, dlse, query, key
  )
  for a, b in zip((made, grads), (again, again_grads)):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_no_array_is_filled_up_to_whole_tiles(small_tiles):
  """Of 300 slots the last tiles hang over: q, k, v and gradients are never copied."""
  x = jax.ShapeDtypeStruct((1, 300, 2, 16), jnp.float32)
  tag = np.zeros((1, 300), np.int32)
  tags = QueryTags(tag, tag, tag), KeyTags(tag, tag)

  def loss(*qkv):
    return jnp.sum(attend(*qkv, *tags, implementation='pallas') ** 2)

  def pads(jaxpr):
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == 'pad':
        yield eqn.outvars[0].aval.size
      for sub in jax.extend.core.jaxprs_in_params(eqn.params):
        yield from pads(sub)

  found = list(pads(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, x, x).jaxpr))
  assert found and max(found) <= 2 * 384  # a number for each slot and head


def test_bfloat16_is_near_float32():
  form = (256, 256, 4, 1, 64, None)
  query, key = tags('blocks', 3, *form[:2])
  x = arrays(form, dtype=jnp.bfloat16)
  x[-1] = x[-1].astype(jnp.float32)
  exact = both_ways('xla', None, *(y.astype(jnp.float32) for y in x), query, key)
  got, plain = (both_ways(way, None, *x, query, key) for way in ('pallas', 'xla'))
  assert got[0][0].dtype == jnp.bfloat16 and got[0][1].dtype == jnp.float32
  for g, p, e in zip(*map(jax.tree.leaves, (got, plain, exact))):
    error = [np.abs(np.asarray(y, np.float32) - e).mean() for y in (g, p)]
    # Beside the plain path's only roundings: dx is rounded before dq and dk are made.
    assert error[0] < 1.5 * error[1] + 1e-6 < 0.02


@pytest.mark.slow
def test_rows_go_in_groups_if_the_table_is_long(monkeypatch, small_tiles):
  x = arrays(SELF_FORM, B=4)
  query, key = tags('documents', 0, 256, 256, B=4)

  def run():
    # A lambda, so that no trace with the other limit is reused.
    f = lambda *x: kernels.attend_by_tags(*x, scale=0.3, interpret=True)  # noqa: E731
    return jax.jit(f)(*x[:3], query, key)

  want = run()
  monkeypatch.setattr(kernels, 'MAX_ENTRIES', 2 * 4)
  jax.tree.map(np.testing.assert_array_equal, run(), want)


def test_refuses(monkeypatch, small_tiles):
  x = arrays(SELF_FORM)[:3]
  query, key = tags('documents', 0, 256, 256)
  with pytest.raises(ValueError, match="implementation 'palas'; did you mean 'pallas'"):
    attend(*x, query, key, implementation='palas')
  monkeypatch.setattr(kernels, 'MAX_ENTRIES', 3)
  with pytest.raises(ValueError, match=r'are 4 tiles of 128 x 128, at most 3; split'):
    attend(*x, query, key, implementation='pallas')


def test_auto_is_by_what_it_is_compiled_for(monkeypatch):
  assert not takes_kernel('auto', 4096) and takes_kernel('pallas', 1)
  with sharding.use(sharding.make_mesh(), sharding.RULES['dp']):
    assert sharding.device()[0] == 'cpu'
    assert not takes_kernel('auto', 4096)
  monkeypatch.setattr(sharding, 'device', lambda: ('tpu', 'TPU v4'))
  assert takes_kernel('auto', 4096) and not takes_kernel('auto', 1)
  assert not takes_kernel('xla', 4096)


def test_remat_may_keep_what_the_kernel_made(capsys):
  q, k, v, *_ = arrays(SELF_FORM)
  query, key = tags('documents', 0, *SELF_FORM[:2])

  def layer(q, k, v):
    return jnp.sin(attend(q, k, v, query, key, implementation='pallas'))

  policies = jax.checkpoint_policies
  for policy, kept in (
    (policies.nothing_saveable, False),
    (policies.save_only_these_names(*kernels.NAMES), True),
  ):
    run = jax.checkpoint(layer, policy=policy)
    jax.ad_checkpoint.print_saved_residuals(run, q, k, v)
    text = capsys.readouterr().out
    assert all((f"named '{name}'" in text) == kept for name in kernels.NAMES)


@pytest.mark.parametrize('attention', ['auto', 'pallas'])
def test_models_hand_it_down(attention):
  empty = Budget(16, 16, {'image': BankBudget(16, 2, 12)}).empty(1)
  vision = dict(
    name='vit', channels=12, embed_dim=8, num_heads=2, num_layers=1, mlp_dim=8
  )
  small = dict(embed_dim=8, num_layers=1, mlp_dim=8)
  model = models.build(
    'flamingo',
    media=(('image', 12),),
    lm=dict(vocab_size=9, num_heads=2, num_kv_heads=2, attention=attention, **small),
    vision=dict(**vision, attention=attention),
    resampler=dict(num_heads=2, num_latents=2, attention=attention, **small),
  )
  text = str(jax.make_jaxpr(lambda: model.init(jax.random.key(0), empty))())
  # Of the images, of the latents, of the stream to the latents, and of the stream.
  assert text.count('name=attention_forward') == (0 if attention == 'auto' else 4)


@pytest.mark.slow
def test_in_a_shard_map(small_tiles):
  x = arrays(SELF_FORM, B=4)
  query, key = tags('documents', 0, 256, 256, B=4)
  mesh = sharding.make_mesh({'data': 2, 'tensor': 2}, jax.devices()[:4])
  heads, rows = P('data', None, 'tensor'), P('data')

  def run(q, k, v, query, key):
    return partial_attend(q, k, v, query, key, scale=0.3, implementation='pallas')

  split = jax.shard_map(
    run, in_specs=(heads, heads, heads, rows, rows), out_specs=(heads, heads),
    check_vma=False,
  )  # fmt: skip

  def grads(f):
    made, pull = jax.vjp(lambda *x: f(*x, query, key), *x[:3])
    return made, pull((x[3], x[4]))

  with jax.set_mesh(mesh):
    got = jax.jit(lambda: grads(split))()
  want = jax.jit(lambda: grads(run))()
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got, want)
