import functools

import bridge
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documents import length, pack, random_document
from fusions import MESHES, eight_devices_equal_one
from wide import float64, largest_error, widen

from mmjax import models
from mmjax.batch import PLACEHOLDER, BankBudget, Budget, Item
from mmjax.ops.losses import next_token_loss

FIELDS = dict(
  vocab_size=40, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
  mlp_dim=24, media=[['image', 6]], qk_norm=True,
)  # fmt: skip
MODEL = models.build('unified', **FIELDS)


@functools.cache
def params():
  """Parameters larger than at init, so that attention is far from uniform."""
  batch = Budget(4, 2, {'image': BankBudget(2, 1, 6)}).empty(1)
  made = jax.jit(MODEL.init)(jax.random.key(0), batch)['params']
  return jax.tree.map(lambda x: 1.5 * x, made)


@functools.partial(jax.jit, static_argnames=('model', 'targets', 'z_loss'))
def loss_and_grads(params, batch, model=MODEL, targets=24, z_loss=0.01):
  def loss(params):
    hidden = model.apply({'params': params}, batch)
    head = model.apply({'params': params}, method='head')
    return next_token_loss(hidden, head, batch.stream, targets, z_loss=z_loss)[:2]

  value, pull = jax.vjp(loss, params)
  return value, pull((jnp.ones(()), jnp.zeros(())))[0]


@jax.jit
def logits(params, batch):
  hidden = MODEL.apply({'params': params}, batch)
  return MODEL.apply({'params': params}, hidden, method='logits')


def assert_close(got, want, rtol):
  """|got - want| <= rtol |want| in the Euclidean norm of each leaf."""
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    error = np.linalg.norm(np.ravel(g - w)) / np.linalg.norm(np.ravel(w))
    assert error <= rtol, f'{error:.2e} for shape {np.shape(w)}'


def copy(batch):
  return jax.tree.map(np.copy, batch)


def documents(seed=0):
  rng = np.random.default_rng(seed)
  made = [random_document(rng, spans) for spans in ('tit', 'ititt', 'tt')]
  return [[*d, ('text', rng.integers(1, 40, 3), True)] for d in made]


def test_other_documents_change_no_bit():
  """Changing document A leaves B's logits, loss and gradients bit-equal."""
  a, b, _ = documents()
  before = pack([[a, b], [], []])
  of_a = before.stream.segment_ids == 1
  before.stream.weights[of_a] = 0
  after = copy(before)
  s = after.stream
  words = of_a & (s.tokens > 0)
  s.tokens[words] = (s.tokens[words] + 7) % 40
  s.positions[of_a] += 3
  image = after.bank['image']
  mine = image.item_segments[0, np.maximum(image.items[0] - 1, 0)] == 1
  image.values[0, mine & (image.items[0] > 0)] //= 2
  x, y = logits(params(), before), logits(params(), after)
  of_b = before.stream.segment_ids == 2
  np.testing.assert_array_equal(x[of_b], y[of_b])
  assert np.abs(x - y)[of_a].max() > 1e-2
  jax.tree.map(
    np.testing.assert_array_equal,
    loss_and_grads(params(), before),
    loss_and_grads(params(), after),
  )


def test_packed_equals_unpacked():
  a, b, c = documents()
  # As initialised: sharper attention magnifies float32 rounding to 1.2e-6 in one leaf.
  made = jax.tree.map(lambda x: x / 1.5, params())
  packed = loss_and_grads(made, pack([[a, b, c], [], []]))
  apart = loss_and_grads(made, pack([[a], [b], [c]]))
  assert float(packed[0][1]) >= 9  # three closing spans of three tokens are trained
  assert_close(packed, apart, 1e-6)


def test_branches_are_as_if_each_were_alone():
  """One document of three branches equals three documents, each with the trunk."""
  rng = np.random.default_rng(3)
  words = lambda n: rng.integers(1, 40, n)  # noqa: E731
  trunk = [('text', words(3), False), ('image', rng.integers(0, 255, (2, 3, 6)))]
  branches = [
    [('text', words(n), False, i), ('text', words(2), True, i)]
    for i, n in enumerate((4, 1, 0), start=1)
  ]  # the last one is trained from its first token
  whole = pack([[trunk + sum(branches, [])], [], []])
  alone = pack([[trunk + branch] for branch in branches])
  made = jax.tree.map(lambda x: x / 1.5, params())
  got, want = loss_and_grads(made, whole), loss_and_grads(made, alone)
  assert float(got[0][1]) == 6
  assert_close(got, want, 1e-6)
  x, y = logits(made, whole), logits(made, alone)
  t = 9
  for row, n in enumerate((6, 3, 2)):
    scale = np.abs(y[row, 9 : 9 + n]).max()
    np.testing.assert_allclose(
      x[0, t : t + n], y[row, 9 : 9 + n], rtol=0, atol=1e-6 * scale
    )
    t += n


def test_padding_changes_no_number():
  rows = [documents()[:2], documents(1)[:2], []]
  n = max(sum(map(length, row)) for row in rows)
  few, many = pack(rows, T=n, P=30), pack(rows)
  wild = copy(many)
  padding = wild.stream.segment_ids == 0
  wild.stream.tokens[padding] = 17
  wild.stream.positions[padding] = 5
  wild.stream.weights[padding] = 1
  wild.bank['image'].values[wild.bank['image'].items == 0] = 255
  want = loss_and_grads(params(), few)
  assert_close(loss_and_grads(params(), many), want, 1e-6)
  jax.tree.map(
    np.testing.assert_array_equal,
    loss_and_grads(params(), wild),
    loss_and_grads(params(), many),
  )


def test_images_see_both_ways_and_text_only_back():
  rng = np.random.default_rng(1)
  image = ('image', rng.integers(0, 255, (2, 3, 6)))
  before, after = ('text', rng.integers(1, 40, 3), True), ('text', np.arange(1, 5), True)
  batch = pack([[[before, image, after]], [], []])  # slots: 3 text, 6 patches, 4 text
  plain = np.asarray(logits(params(), batch))[0, :13]

  def changed(edit):
    other = copy(batch)
    edit(other)
    return np.any(np.asarray(logits(params(), other))[0, :13] != plain, -1)

  def patch(i):
    def edit(batch):
      batch.bank['image'].values[0, i] ^= 255

    return changed(edit)

  def word(t):
    def edit(batch):
      batch.stream.tokens[0, t] = (batch.stream.tokens[0, t] + 1) % 40

    return changed(edit)

  from_image = np.arange(13) >= 3
  np.testing.assert_array_equal(patch(0), from_image)
  np.testing.assert_array_equal(patch(5), from_image)  # the last patch tells the first
  np.testing.assert_array_equal(word(1), np.arange(13) >= 1)
  np.testing.assert_array_equal(word(10), np.arange(13) >= 10)


def test_patch_order_is_heard():
  rng = np.random.default_rng(1)
  image = ('image', rng.integers(0, 255, (2, 2, 6)))
  batch = pack([[[image, ('text', [3], True)]], [], []])
  other = copy(batch)
  other.bank['image'].values[0, :4] = batch.bank['image'].values[0, [1, 0, 2, 3]]
  got = [logits(params(), b)[0, 4] for b in (batch, other)]
  assert np.abs(got[0] - got[1]).max() > 1e-3


def test_reach_and_chunks_change_no_number():
  rows = [documents(), documents(1), []]
  reach = max(length(d) for row in rows for d in row) - 1
  batch = pack(rows)
  near = MODEL.clone(chunk=5, reach=reach)
  want = loss_and_grads(params(), batch)
  assert_close(loss_and_grads(params(), batch, near), want, 1e-5)


@pytest.mark.parametrize(
  'mesh', [m if m == 'mixed' else pytest.param(m, marks=pytest.mark.slow) for m in MESHES]
)
def test_eight_devices_equal_one(mesh):
  rng = np.random.default_rng(3)
  text = lambda n, *branch: ('text', rng.integers(1, 40, n), True, *branch)  # noqa: E731
  image = ('image', rng.integers(0, 99, (4, 3, 6)))
  # Documents and images that span devices' shares, branches, a row of padding.
  rows = [documents(seed) for seed in range(6)]
  rows += [[[text(30), image, text(4, 0), text(3, 1), text(9, 2), text(5, 0)]], []]
  batch = pack(rows, T=72, P=64)
  model = MODEL.clone(tie_embeddings=False, modality_embedding=True)
  weights = jax.jit(model.init)(jax.random.key(0), batch)['params']
  weights = eight_devices_equal_one(model, weights, batch, mesh)
  up = weights['transformer']['layers']['mlp']['up']
  shards = {'dp8': (2, 16, 24), 'fsdp8': (2, 2, 24), 'fsdp4 tensor2': (2, 4, 12)}
  if mesh in shards:
    assert up.sharding.shard_shape(up.shape) == shards[mesh]


def test_contents_never_recompile():
  traces = []

  @jax.jit
  def f(params, batch):
    traces.append(1)
    return MODEL.apply({'params': params}, batch)

  for rows in ([documents(0)], [documents(1)], [[]]):
    f(params(), pack(rows))
  assert len(traces) == 1


def test_llama_8b_has_its_published_size():
  """Llama 3.1 8B (2407.21783, table 3): 8.03 billion parameters."""
  model = models.build(
    'unified', vocab_size=128_256, embed_dim=4096, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, mlp_dim=14_336, tie_embeddings=False,
    dtype='bfloat16', media=(),
  )  # fmt: skip
  batch = Budget(64, 8).empty(1)
  made = jax.eval_shape(model.init, jax.random.key(0), batch)['params']
  assert sum(x.size for x in jax.tree.leaves(made)) == 8_030_261_248
  hidden = jax.eval_shape(model.apply, {'params': made}, batch)
  assert (hidden.shape, hidden.dtype) == ((1, 64, 4096), jnp.bfloat16)
  f = functools.partial(model.apply, method='logits')
  out = jax.eval_shape(f, {'params': made}, hidden)
  assert (out.shape, out.dtype) == ((1, 64, 128_256), jnp.float32)


def test_slots_are_the_items_grid():
  assert MODEL.slots(Item('image', (1, 3, 4))) == (1, 3, 4)


def test_bridges_to_nnx():
  batch = pack([documents()])
  _, got, want = bridge.both(MODEL, batch)
  assert_close(got, want, 1e-6)


def test_placeholders_are_in_no_vocabulary():
  assert max(PLACEHOLDER.values()) < 0


@pytest.mark.slow
def test_packing_and_padding_differ_by_rounding_alone():
  """In float64 every entry agrees to 1e-13, sharp attention included: no leak."""
  a, b, c = documents()
  with float64():
    model = MODEL.clone(dtype='float64', param_dtype='float64')

    def run(rows, scale=1.0, **sizes):
      weights = jax.tree.map(lambda x: scale * x, widen(params()))
      return loss_and_grads(weights, widen(pack(rows, **sizes)), model)

    packed, apart = run([[a, b, c], [], []]), run([[a], [b], [c]])
    assert largest_error(packed, apart) < 1e-13
    n = sum(map(length, (a, b, c)))
    assert largest_error(run([[a, b, c], [], []], T=n, P=30), packed) < 1e-13
    # What this would notice: parameters that differ by one part in 10 billion.
    assert largest_error(run([[a], [b], [c]], scale=1 + 1e-10), apart) > 1e-11


@pytest.mark.parametrize('tied', [True, False])
def test_extra_words_are_as_if_in_one_table(tied):
  """37 words and 3 more: the same embeddings and logits as of one table of 40."""
  fields = FIELDS | dict(tie_embeddings=tied, num_layers=1)
  whole, split = (models.build('unified', **fields, extra_words=n) for n in (0, 3))
  batch = pack([documents()])
  made = jax.jit(whole.init)(jax.random.key(0), batch)['params']
  text = made['embed']['text']
  parts = {**made, 'embed': {**made['embed'], 'text': text[:37], 'extra': text[37:]}}
  if not tied:
    parts |= {'head': made['head'][:, :37], 'extra_head': made['head'][:, 37:]}
  shapes = jax.eval_shape(split.init, jax.random.key(0), batch)['params']
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, parts)

  def ends(model):  # the first and the last thing it does
    def both(m, batch, hidden):
      return m.embed(batch), m.logits(hidden)

    return functools.partial(model.apply, method=both)

  hidden = np.random.default_rng(0).normal(size=(2, 16)).astype('f')
  for got, want in zip(
    ends(split)({'params': parts}, batch, hidden),
    ends(whole)({'params': made}, batch, hidden),
  ):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
