"""Properties of a dual encoder, on batches that the real packer makes."""

import functools

import bridge
import jax
import numpy as np
import pytest
from wide import float64, largest_error, widen

from mmjax import models, sharding
from mmjax.batch import BankBudget, Budget, Item
from mmjax.data.document import Document, Image, Text
from mmjax.data.example import to_example
from mmjax.data.media import ImageRule
from mmjax.data.pack import pack
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.train import tasks

SMALL = dict(
  embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=24,
  scan=False,
)  # fmt: skip
VISION = dict(name='vit', embed_dim=16, num_layers=1, num_heads=2, mlp_dim=24, scan=False)
FIELDS = dict(
  vision=dict(VISION, pool='map'), text=dict(name='unified', **SMALL), embed_dim=8,
  media=[['image', 12]], vocab_size=260,
)  # fmt: skip
MODEL = models.build('dual', **FIELDS)
TOWERS = {
  'map, causal, last': MODEL,
  'mean, encoder, first': models.build(
    'dual', **FIELDS | dict(text=dict(name='encoder', **SMALL), text_pool='first',
                            vision=dict(VISION, pool='mean')),
  ),
  'tokens, encoder, mean': models.build(
    'dual', **FIELDS | dict(text=dict(name='encoder', **SMALL), text_pool='mean',
                            vision=VISION, embed_dim=16, image_projection=False,
                            projection_bias=True),
  ),
}  # fmt: skip
RULE = ImageRule(patch=2, resize='native', max_patches=6)
BUDGET = Budget(40, 40, {'image': BankBudget(18, 4, 12)})
TOKENIZER = ByteTokenizer()


@pytest.fixture(autouse=True, scope='module')
def _quick_compiles():
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


def document(seed, text=True, images=1):
  rng = np.random.default_rng(seed)
  spans = [
    Image(rng.integers(0, 256, (*2 * rng.integers(1, 4, 2), 3), np.uint8))
    for _ in range(images)
  ]
  words = ''.join(chr(c) for c in rng.integers(97, 122, rng.integers(1, 9)))
  return Document((*spans, Text(words, True)) if text else tuple(spans))


def example(doc):
  return to_example(doc, tokenizer=TOKENIZER, rules={'image': RULE}, slots=MODEL.slots)


def batch(*rows):
  return pack([[example(d) for d in row] for row in rows], BUDGET)


def rows(seed=0, count=8):
  """Up to 3 documents a row; some have no image, some two, some rows nothing."""
  rng = np.random.default_rng(seed)
  return [
    [document(100 * r + d, images=rng.integers(3)) for d in range(rng.integers(4))]
    for r in range(count)
  ]


@functools.cache
def params(model):
  made = jax.eval_shape(model.init, jax.random.key(0), batch([]))['params']
  rng = np.random.default_rng(0)
  made = jax.tree.map(lambda x: (0.4 * rng.normal(size=x.shape)).astype(x.dtype), made)
  return made | {'log_scale': np.float32(1.5), 'bias': np.float32(-0.5)}


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, batch):
  return model.apply({'params': params}, batch)


@pytest.mark.parametrize('name', TOWERS)
def test_packed_equals_unpacked(name):
  model, docs = TOWERS[name], [document(i) for i in range(3)]
  packed = run(model, params(model), batch(docs, [], []))
  apart = run(model, params(model), batch(*([d] for d in docs)))
  np.testing.assert_array_equal(packed.weights, [[1, 1, 1, 0], [0] * 4, [0] * 4])
  for got, want in zip(packed[:2], apart[:2]):
    np.testing.assert_allclose(got[0, :3], want[:, 0], atol=3e-6)
    np.testing.assert_allclose(np.linalg.norm(got[0, :3], axis=-1), 1, rtol=1e-6)
    assert np.abs(got[0, 0] - got[0, 1]).max() > 1e-3
    assert not np.any(got[0, 3]) and not np.any(got[1:])


@pytest.mark.parametrize('name', TOWERS)
def test_an_embedding_changes_with_its_own_side_of_its_own_document_only(name):
  model, docs = TOWERS[name], [document(i) for i in range(3)]
  plain = run(model, params(model), batch(docs))
  image, text = docs[1].spans
  others = {
    'text': Document((image, Text(chr(ord(text.text[0]) ^ 1) + text.text[1:], True))),
    'image': Document((Image(255 - image.content), text)),
  }
  for side, changed in others.items():
    new = run(model, params(model), batch([docs[0], changed, docs[2]]))
    for field in ('image', 'text'):
      moved = np.abs(getattr(new, field) - getattr(plain, field)).max((0, 2))
      want = [0, 1, 0, 0] if field == side else [0] * 4
      np.testing.assert_array_equal(moved > 1e-4, want)
      np.testing.assert_array_equal(moved[~np.array(want, bool)], 0)


def test_which_items_are_pairs():
  """The first item of a document with text; both embeddings exist all the same."""
  two, only_text = document(1, images=2), document(2, images=0)
  found = run(MODEL, params(MODEL), batch([two, only_text, document(3)]))
  np.testing.assert_array_equal(found.weights, [[1, 0, 1, 0]])
  np.testing.assert_array_equal(np.any(found.image[0], -1), [1, 1, 1, 0])
  np.testing.assert_array_equal(found.text[0, 0], found.text[0, 1])
  silent = batch([document(1), document(3)])
  silent.stream.tokens[silent.stream.segment_ids == 1] = -1
  found = run(MODEL, params(MODEL), silent)
  np.testing.assert_array_equal(found.weights, [[0, 1, 0, 0]])
  assert not np.any(found.text[0, 0]) and np.any(found.image[0, 0])


@pytest.mark.parametrize('name', TOWERS)
def test_each_side_alone_is_the_same(name):
  model = TOWERS[name]
  packed = batch([document(0), document(1)])
  bank = packed.bank['image']
  both = run(model, params(model), packed)
  apply = functools.partial(model.apply, {'params': params(model)})
  image = jax.jit(functools.partial(apply, method='embed_images'))(bank)
  texts = jax.jit(functools.partial(apply, method='embed_texts'))
  text, found = texts(packed, bank.item_segments)
  np.testing.assert_allclose(image, both.image, atol=1e-6)
  np.testing.assert_allclose(text, both.text, atol=1e-6)
  np.testing.assert_array_equal(found, [[1, 1, 0, 0]])


def test_the_scale_is_learnt_and_clipped():
  weights = params(MODEL)
  apply = functools.partial(MODEL.apply, method='temperature')
  np.testing.assert_allclose(apply({'params': weights})[0], np.exp(1.5), rtol=1e-6)
  hot = {'params': weights | {'log_scale': np.float32(8)}}
  assert [float(x) for x in apply(hot)] == [100, -0.5]
  made = jax.jit(MODEL.init)(jax.random.key(0), batch([]))['params']
  np.testing.assert_allclose(apply({'params': made})[0], 1 / 0.07, rtol=1e-6)


def loss_and_grads(model, params, packed, loss, accumulate):
  loss_fn = tasks.contrastive(model, loss=loss, chunk=3, accumulate=accumulate)

  def value(params):
    total, sums = loss_fn(params, packed, jax.random.key(0), True)
    return total / sums['weight'], sums

  (value, sums), grads = jax.value_and_grad(value, has_aux=True)(params)
  return value, sums, grads


@functools.cache
def reference(loss):
  """One device, no accumulation, in float64."""
  with float64():
    model, wide = MODEL.clone(**wide_fields()), widen(params(MODEL))
    f = jax.jit(functools.partial(loss_and_grads, model, loss=loss, accumulate=1))
    return jax.device_get(f(wide, widen(batch(*rows()))))


def wide_fields():
  f64 = dict(dtype='float64', param_dtype='float64')
  towers = {k: getattr(MODEL, k).clone(**f64) for k in ('vision', 'text')}
  return f64 | towers


@pytest.mark.slow
@pytest.mark.parametrize(
  'loss, mesh, accumulate',
  [
    ('infonce', dict(data=1), 4),
    ('infonce', dict(fsdp=4, tensor=2), 1),
    ('sigmoid', dict(data=2, fsdp=2, tensor=2), 2),
  ],
)
def test_value_and_gradient_know_no_mesh_and_no_accumulation(loss, mesh, accumulate):
  value, sums, grads = reference(loss)
  mesh = sharding.make_mesh(mesh, jax.devices()[: np.prod(list(mesh.values()))])
  rules = sharding.rules_for('fsdp+tensor')
  names = sharding.axis_names(
    lambda r: MODEL.init(r, batch([]))['params'], jax.random.key(0)
  )
  with float64(), sharding.use(mesh, rules):
    model, wide = MODEL.clone(**wide_fields()), widen(params(MODEL))
    places = sharding.shardings(names, wide, mesh, rules)
    packed = sharding.place_batch(widen(batch(*rows())), 8, mesh, rules)
    f = functools.partial(loss_and_grads, model, loss=loss, accumulate=accumulate)
    got = jax.jit(f)(jax.device_put(wide, places), packed)
    got = jax.device_get(got)
  assert sums['weight'] == got[1]['weight'] > 6
  got, want = named(loss, got), named(loss, (value, sums, grads))
  assert all(np.abs(x).max() > 1e-9 for x in want.values())  # all is trained
  assert largest_error(got, want) < 1e-10


def named(loss, found):
  """Value and gradients by path, without those that are 0 but for rounding.

  A key's bias moves all logits of a query alike, the bias of InfoNCE all there are.
  """
  named = jax.tree_util.tree_leaves_with_path({'value': found[0], **found[2]})
  named = {jax.tree_util.keystr(k, simple=True, separator='/'): v for k, v in named}
  zero = [k for k in named if 'key_bias' in k or (k == 'bias' and loss == 'infonce')]
  assert all(np.abs(named.pop(k)).max() < 1e-12 for k in zero)
  return named


@pytest.mark.slow
def test_bridges_to_nnx():
  packed = batch([document(0), document(1)])
  made, got, want = bridge.both(MODEL, packed)
  assert jax.tree.structure(made) == jax.tree.structure(params(MODEL))
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-6), got, want)


def test_an_item_takes_no_slot():
  assert MODEL.slots(Item('image', (1, 2, 3))) == (0, 0, 0)
  packed = example(document(0))
  assert (packed.tokens >= 0).all() and packed.positions[0, 0] == 0


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(text_pool='lst'), "dual: unknown text_pool 'lst'; did you mean 'last'"),
    (dict(media=[['image', 12], ['audio', 4]]), 'dual pairs one kind of media'),
    (dict(temperature_init=1e-3), 'temperature_init=0.001 is under 1 / max_scale'),
  ],
)
def test_refuses(change, message):
  with pytest.raises(ValueError, match=message):
    models.build('dual', **FIELDS | change)


def test_refuses_what_does_not_fit():
  plain = models.build('dual', **FIELDS | dict(text_projection=False))
  with pytest.raises(ValueError, match='dual: text gives 16 values, embed_dim is 8'):
    jax.eval_shape(plain.init, jax.random.key(0), batch([]))
  for bank, message in (
    ({'audio': BankBudget(2, 1, 6)}, "batch has media 'audio', the model pairs 'image'"),
    ({}, 'the batch has no bank; texts alone go to `embed_texts`'),
  ):
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(MODEL.init, jax.random.key(0), Budget(8, 4, bank).empty(1))
