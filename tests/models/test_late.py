import functools

import bridge
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documents import pack, random_document
from fusions import (
  assert_close,
  cached_equals_full,
  eight_devices_equal_one,
  logits,
  loss_and_grads,
)

from mmjax import models
from mmjax.batch import Item, PackedBatch
from mmjax.nn.markers import words

pack = functools.partial(pack, markers=True)
WORDS = dict(
  vocab_size=40, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
  mlp_dim=24,
)  # fmt: skip
VIT = dict(
  name='vit', embed_dim=12, num_layers=1, num_heads=2, mlp_dim=16, position_grid=[3, 3],
  pool='mean',
)  # fmt: skip
FIELDS = dict(
  lm=dict(name='unified', **WORDS), vision=VIT, media=[['image', 6]], joint_dim=8,
  marker=39,
)  # fmt: skip
MODEL, LM = models.build('late', **FIELDS), models.build('unified', **WORDS)


@functools.cache
def params():
  made = jax.jit(MODEL.init)(jax.random.key(0), pack([[]]))['params']
  rng = np.random.default_rng(0)
  down = made['join']['down']
  made['join']['down'] = jnp.asarray(rng.normal(size=down.shape), jnp.float32)
  return made


def documents(seed=0):
  rng = np.random.default_rng(seed)
  made = [random_document(rng, spans, vocab=39) for spans in ('tit', 'ititt', 'tt')]
  return [[*d, ('text', rng.integers(1, 39, 3), True)] for d in made]


def test_begins_as_the_language_model_bit_by_bit():
  made = jax.jit(MODEL.init)(jax.random.key(0), pack([[]]))['params']
  batch = pack([documents(), documents(1)])
  want = logits(made['lm'], words(batch, 39), LM)
  np.testing.assert_array_equal(logits(made, batch, MODEL), want)
  assert np.abs(logits(params(), batch, MODEL) - want).max() > 0.1


@pytest.mark.parametrize('latest', [True, False])
def test_a_token_changes_when_and_only_when_an_item_it_is_joined_with_does(latest):
  rng = np.random.default_rng(0)
  text = lambda n, *b: ('text', rng.integers(1, 39, n), True, *b)  # noqa: E731
  image = lambda *b: ('image', rng.integers(0, 99, (2, 1, 6)), False, *b)  # noqa: E731
  row = [
    [text(2), image(), text(1), image(), text(1)],
    [image(), text(1), text(1, 1), image(1), text(1, 1), text(2, 2)],
  ]
  batch = pack([row])
  seen = [
    (), (), (0,), (0,), (0, 1), (0, 1),
    (2,), (2,), (2,), (2, 3), (2, 3), (2,), (2,),
  ]  # fmt: skip
  model = MODEL.clone(latest=latest)
  before = logits(params(), batch, model)
  for i in range(4):
    other = jax.tree.map(np.copy, batch)
    other.bank['image'].values[0, other.bank['image'].items[0] == i + 1] += 100
    changed = np.any(logits(params(), other, model) != before, -1)[0]
    want = [i in (s[-1:] if latest else s) for s in seen]
    np.testing.assert_array_equal(changed[: len(seen)], want)
    assert not changed[len(seen) :].any()


def test_packed_equals_unpacked():
  a, b, c = documents()
  packed = loss_and_grads(params(), pack([[a, b, c], [], []]), MODEL)
  apart = loss_and_grads(params(), pack([[a], [b], [c]]), MODEL)
  assert float(packed[0][1]) >= 9
  assert_close(packed, apart, 1e-5)


def test_unscanned_equals_scanned_and_text_needs_no_bank():
  batch = pack([documents()])
  want = logits(params(), batch, MODEL)
  plain, flat = MODEL.unscanned(params())
  np.testing.assert_allclose(logits(flat, batch, plain), want, atol=1e-5)
  alone = pack([[documents()[2]]])
  got = logits(params(), PackedBatch(alone.stream, {}), MODEL)
  np.testing.assert_allclose(got, logits(params(), alone, MODEL), atol=1e-6)


@pytest.mark.parametrize('latest', [True, False])
def test_cached_logits_equal_the_full_forward(latest):
  cached_equals_full(MODEL.clone(latest=latest), params())


@pytest.mark.slow
@pytest.mark.parametrize('mesh', ['fsdp4 tensor2', 'mixed'])
def test_eight_devices_equal_one(mesh):
  batch = pack([documents(seed) for seed in range(8)])
  placed = eight_devices_equal_one(MODEL, params(), batch, mesh)
  up = placed['join']['up']
  rows = 4 if mesh == 'fsdp4 tensor2' else 8
  assert up.sharding.shard_shape(up.shape) == (rows, 4)


@pytest.mark.slow
def test_bridges_to_nnx():
  batch = pack([documents()])
  _, got, want = bridge.both(MODEL, batch)
  assert_close(got, want, 1e-5)


def test_an_item_takes_one_slot():
  assert MODEL.slots(Item('image', (1, 3, 4))) == (1, 1, 1)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(media=[['image', 6], ['audio', 6]]), 'takes one kind of media, got'),
    (dict(marker=40), 'marker=40 is not in 0..39'),
  ],
)
def test_refuses(change, message):
  with pytest.raises(ValueError, match=message):
    models.build('late', **FIELDS | change)


def test_refuses_an_encoder_that_does_not_pool():
  model = models.build('late', **FIELDS | dict(vision={**VIT, 'pool': 'none'}))
  with pytest.raises(ValueError, match='set `pool` of the encoder'):
    jax.eval_shape(model.init, jax.random.key(0), pack([[]]))
