import functools

import bridge
import jax
import numpy as np
import pytest

from mmjax import models
from mmjax.batch import PLACEHOLDER, Budget
from mmjax.nn.cache import empty_cache

FIELDS = dict(
  vocab_size=40, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=4,
  mlp_dim=24, max_positions=12,
)  # fmt: skip
ENCODER = models.build('encoder', **FIELDS, pooler=True, mlm_head=True)
GPT2 = models.build(
  'unified', **FIELDS, norm='layer', bias='all', gated=False, rotary=False,
  activation='gelu_tanh', scale_embedding=False,
)  # fmt: skip


def pack(*rows, T=14):
  """Rows of documents, each a list of ids (negative: a media slot)."""
  batch = Budget(T, T).empty(len(rows))
  for b, row in enumerate(rows):
    t = 0
    for segment, ids in enumerate(row, 1):
      here, s = (b, slice(t, t + len(ids))), batch.stream
      s.tokens[here] = ids
      s.segment_ids[here] = segment
      s.order[here] = s.last[here] = np.arange(len(ids))
      s.positions[here] = np.arange(len(ids))[:, None]
      t += len(ids)
  return batch


@functools.cache
def params(model):
  made = jax.eval_shape(model.init, jax.random.key(0), pack([[1]]))['params']
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype) * 0.4, made)


@functools.partial(jax.jit, static_argnums=0)
def run(model, batch):
  return model.apply({'params': params(model)}, batch)


A, B, C = [3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8]


@pytest.mark.parametrize('model', [ENCODER, GPT2], ids=['encoder', 'gpt2'])
def test_packed_equals_unpacked(model):
  packed = run(model, pack([A, B, C], [[]], [[]]))[0, :12]
  apart = run(model, pack([A], [B], [C]))
  want = np.concatenate([apart[0, :5], apart[1, :3], apart[2, :4]])
  np.testing.assert_allclose(packed, want, atol=2e-6)


def test_every_slot_sees_all_text_of_its_document_and_nothing_else():
  plain = np.asarray(run(ENCODER, pack([A, B])))[0]
  for t, seers in ((4, slice(0, 5)), (0, slice(0, 5)), (6, slice(5, 8))):
    batch = pack([A, B])
    batch.stream.tokens[0, t] += 7
    changed = np.any(np.asarray(run(ENCODER, batch))[0] != plain, -1)
    np.testing.assert_array_equal(changed, np.isin(np.arange(14), np.r_[seers]))


def test_media_slots_are_as_padding():
  """With two media slots inside, text is as without them, at its positions."""
  mixed, plain = pack([[3, 1, -1, -1, 5]]), pack([[3, 1, 5]])
  assert PLACEHOLDER['image'] == -1
  plain.stream.positions[0, 2] = 4
  got, want = run(ENCODER, mixed)[0], run(ENCODER, plain)[0]
  np.testing.assert_allclose(got[np.array([0, 1, 4])], want[:3], atol=2e-6)
  assert np.isfinite(got).all()


def test_types_are_heard_and_default_to_the_first():
  batch, types = pack([A]), np.zeros((1, 14), np.int32)
  f = functools.partial(jax.jit(ENCODER.apply), {'params': params(ENCODER)}, batch)
  np.testing.assert_array_equal(f(), f(types=types))
  types[0, 3] = 1
  assert np.abs(f() - f(types=types))[0, :5].max() > 1e-2


def test_heads_are_their_equations():
  w, hidden = params(ENCODER), np.random.default_rng(1).normal(size=(3, 16)).astype('f')
  f = functools.partial(ENCODER.apply, {'params': w}, hidden)
  dense = w['pool_dense']
  want = np.tanh(hidden @ dense['kernel'] + dense['bias'])
  np.testing.assert_allclose(f(method='pool'), want, atol=1e-5)
  h = hidden @ w['head_dense']['kernel'] + w['head_dense']['bias']
  h = np.asarray(jax.nn.gelu(h, approximate=False))
  h = (h - h.mean(-1, keepdims=True)) / h.std(-1, keepdims=True)
  h = h * w['head_norm']['scale'] + w['head_norm']['bias']
  want = h @ w['embed']['text'].T + w['head_bias']
  np.testing.assert_allclose(f(method='logits'), want, atol=1e-4)


@pytest.mark.parametrize('model', [ENCODER, GPT2], ids=['encoder', 'gpt2'])
def test_layers_one_by_one_are_the_same(model):
  flat, weights = model.unscanned(params(model))
  got = jax.jit(flat.apply)({'params': weights}, pack([A, B]))
  np.testing.assert_allclose(got, run(model, pack([A, B])), atol=2e-6)
  assert flat.unscanned(weights) == (flat, weights)


def test_gpt2_with_a_cache_is_itself():
  """Learned positions and biases in the decoder: two parts equal all at once."""
  batch = pack([A, C], T=9)
  want = run(GPT2, batch)
  cache = GPT2.empty_cache(1, 9)
  assert cache.layers.key.shape == empty_cache(1, 9, 2, 4, 4, 'f', True).layers.key.shape
  extend = jax.jit(functools.partial(GPT2.apply, method='extend'))
  got = []
  for part in (slice(0, 6), slice(6, 9)):
    cut = jax.tree.map(lambda x, part=part: x[:, part], batch)
    hidden, cache = extend({'params': params(GPT2)}, cut, cache, part.start)
    got.append(hidden)
  np.testing.assert_allclose(np.concatenate(got, 1), want, atol=2e-6)


def test_bridges_to_nnx():
  batch = pack([A])
  made, got, want = bridge.both(ENCODER, batch)
  assert jax.tree.structure(made) == jax.tree.structure(params(ENCODER))
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_published_sizes():
  """BERT base (1810.04805, 110M) and GPT-2 (124M), to the parameter."""
  base = dict(
    embed_dim=768, num_layers=12, num_heads=12, num_kv_heads=12, head_dim=64, mlp_dim=3072
  )
  bert = ENCODER.clone(
    **base, vocab_size=30_522, max_positions=512, pooler=True, mlm_head=False
  )
  gpt2 = GPT2.clone(**base, vocab_size=50_257, max_positions=1024)
  for model, want in ((bert, 109_482_240), (gpt2, 124_439_808)):
    made = jax.eval_shape(model.init, jax.random.key(0), pack([[1]]))
    assert sum(x.size for x in jax.tree.leaves(made)) == want


def test_refuses():
  with pytest.raises(ValueError, match='vocab_size must be at least 1, got 0'):
    ENCODER.clone(vocab_size=0)
  with pytest.raises(ValueError, match="norm='batch' is none of"):
    ENCODER.clone(norm='batch')
  plain = ENCODER.clone(pooler=False)
  with pytest.raises(ValueError, match='pool: the encoder was built with pooler=False'):
    plain.apply({'params': params(plain)}, np.zeros((1, 16), 'f'), method='pool')
