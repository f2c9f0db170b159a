import dataclasses
import functools

import bridge
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documents import length, pack, random_document
from fusions import (
  assert_close,
  cached_equals_full,
  eight_devices_equal_one,
  logits,
  loss_and_grads,
  loss_fn,
)
from wide import float64, largest_error, widen

from mmjax import models, sharding
from mmjax.batch import BankBudget, Budget, Item, PackedBatch
from mmjax.generate import make_generate
from mmjax.models.flamingo import FROZEN
from mmjax.train import optim, state, step

WORDS = dict(
  vocab_size=40, embed_dim=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8,
  mlp_dim=24,
)  # fmt: skip
FIELDS = dict(
  lm=dict(name='unified', **WORDS),
  vision=dict(
    name='vit', embed_dim=12, num_layers=2, num_heads=2, mlp_dim=16, position_grid=[3, 3]
  ),
  resampler=dict(embed_dim=8, num_layers=2, num_heads=2, num_latents=3),
  media=[['image', 6]], marker=39, cross_every=3, cross_head_dim=4,
)  # fmt: skip


def build(lm=(), **fields):
  return models.build('flamingo', **FIELDS | dict(lm=FIELDS['lm'] | dict(lm)) | fields)


MODEL, LM = build(), models.build('unified', **WORDS)
pack = functools.partial(pack, markers=True)


@functools.cache
def params(gate=0.7):
  """Parameters larger than at init and gates that are open."""
  made = jax.jit(MODEL.init)(jax.random.key(0), pack([[]]))['params']
  made = jax.tree.map(lambda x: 1.5 * x, made)
  for name in ('attention_gate', 'mlp_gate'):
    made['cross'][name] = jnp.full_like(made['cross'][name], gate)
  return made


def documents(seed=0):
  rng = np.random.default_rng(seed)
  made = [random_document(rng, spans, vocab=39) for spans in ('tit', 'ititt', 'tt')]
  return [[*d, ('text', rng.integers(1, 39, 3), True)] for d in made]


def words(batch):
  """What a language model alone gets: markers are a word, and there is no bank."""
  tokens = np.where(batch.stream.tokens < 0, 39, batch.stream.tokens)
  return PackedBatch(dataclasses.replace(batch.stream, tokens=tokens), {})


@pytest.mark.slow
def test_gate_at_zero_is_the_language_model_bit_by_bit():
  made = jax.jit(MODEL.init)(jax.random.key(0), pack([[]]))['params']
  batch = pack([documents(), documents(1)])
  want = logits(made['lm'], words(batch), LM)
  np.testing.assert_array_equal(logits(made, batch, MODEL), want)
  assert np.abs(logits(params(), batch, MODEL) - want).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize('latest', [True, False])
def test_a_token_changes_when_and_only_when_an_image_it_may_see_does(latest):
  """Packed documents and branches, as in `tests/nn/test_gated_xattn.py`.

  One layer, once as it is: it carries what a token has seen on to the tokens that see
  that token, so all images that a token may see tell on it. And once with kernels of
  0, so that the cross-attention alone is heard.
  """
  rng = np.random.default_rng(0)
  text = lambda n, *b: ('text', rng.integers(1, 39, n), True, *b)  # noqa: E731
  image = lambda *b: ('image', rng.integers(0, 99, (2, 1, 6)), False, *b)  # noqa: E731
  rows = [
    [[text(2), image(), text(2), image(), text(1)], [image(), text(2)]],
    [[image(), text(1), text(1, 1), image(1), text(1, 1), text(2, 2), text(1, 0)]],
  ]
  batch = pack(rows, T=12, I=4, P=10)
  model = build(dict(num_layers=1), latest=latest)
  made = jax.jit(model.init)(jax.random.key(0), batch)['params']
  made['cross'] = jax.tree.map(lambda x: x + 0.5, made['cross'])
  blind = jax.tree.map(jnp.zeros_like, made['lm']['transformer']['layers'])
  alone = {**made, 'lm': {**made['lm'], 'transformer': {
    **made['lm']['transformer'], 'layers': blind}}}  # fmt: skip
  seen = [
    [(), (), (0,), (0,), (0,), (0, 1), (0, 1), (2,), (2,), (2,), (), ()],
    [(0,), (0,), (0,), (0, 1), (0, 1), (0,), (0,), (0,), (), (), (), ()],
  ]
  for weights, of in ((made, lambda s: s), (alone, lambda s: s[-1:] if latest else s)):
    before = logits(weights, batch, model)
    for b, i in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
      other = jax.tree.map(np.copy, batch)
      mine = other.bank['image'].items[b] == i + 1
      other.bank['image'].values[b, mine] += 100
      changed = np.any(logits(weights, other, model) != before, -1)
      want = np.zeros_like(changed)
      want[b] = [i in of(s) for s in seen[b]]
      np.testing.assert_array_equal(changed, want)


@pytest.mark.slow
def test_packed_equals_unpacked():
  a, b, c = documents()
  # As initialised, as in the same test of `Unified`; the gates stay open.
  made = jax.tree.map(lambda x: x / 1.5, params())
  packed = loss_and_grads(made, pack([[a, b, c], [], []]), MODEL)
  apart = loss_and_grads(made, pack([[a], [b], [c]]), MODEL)
  assert float(packed[0][1]) >= 9
  assert_close(packed, apart, 1e-5)


def in_float64(lm=()):
  wide = dict(dtype='float64', param_dtype='float64')
  parts = {part: FIELDS[part] | wide for part in ('vision', 'resampler')}
  return build(wide | dict(lm), **parts)


def no_rounding(value):
  """Without what is 0 but for rounding, see `fusions.assert_close`."""
  bias = value[1]['vision']['transformer']['layers']['attention'].pop('key_bias')
  assert np.abs(bias).max() < 1e-12
  return value


@pytest.mark.slow
def test_packing_scanning_and_remat_differ_by_rounding_alone():
  """In float64 every entry agrees to 1e-12, sharp attention included: no leak."""
  a, b, c = documents()
  with float64():
    model, weights = in_float64(), widen(params())
    batch = widen(pack([[a, b, c], [], []]))
    want = no_rounding(loss_and_grads(weights, batch, model))
    apart = loss_and_grads(weights, widen(pack([[a], [b], [c]])), model)
    assert largest_error(no_rounding(apart), want) < 1e-12
    again = loss_and_grads(weights, batch, in_float64(dict(remat='full')))
    assert largest_error(no_rounding(again), want) < 1e-12
    plain, flat = model.unscanned(weights)
    value, grads = no_rounding(loss_and_grads(flat, batch, plain))
    want = want[0], model.unscanned(want[1])[1]
    assert largest_error((value, grads), want) < 1e-12
    shapes = jax.eval_shape(plain.init, jax.random.key(0), batch)['params']
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, flat)


def test_padding_changes_no_bit():
  batch = pack([documents(), [], []])
  wild = jax.tree.map(np.copy, batch)
  padding = wild.stream.segment_ids == 0
  wild.stream.tokens[padding] = 17
  wild.stream.positions[padding] = 5
  wild.bank['image'].values[wild.bank['image'].items == 0] = 255
  jax.tree.map(
    np.testing.assert_array_equal,
    loss_and_grads(params(), wild, MODEL),
    loss_and_grads(params(), batch, MODEL),
  )


@pytest.mark.slow
@pytest.mark.parametrize('mesh', ['fsdp4 tensor2', 'mixed'])
def test_eight_devices_equal_one(mesh):
  batch = pack([documents(seed) for seed in range(8)])
  model = build(dict(tie_embeddings=False))
  weights = jax.jit(model.init)(jax.random.key(0), batch)['params']
  weights['cross'] = jax.tree.map(lambda x: x + 0.1, weights['cross'])
  weights = eight_devices_equal_one(model, weights, batch, mesh)
  up = weights['cross']['mlp']['up']
  rows = 4 if mesh == 'fsdp4 tensor2' else 8
  assert up.sharding.shard_shape(up.shape) == (2, rows, 32)


@pytest.mark.parametrize('scan', [True, False])
@pytest.mark.parametrize('latest', [True, False])
def test_cached_logits_equal_the_full_forward(scan, latest):
  model, weights = MODEL.clone(latest=latest), params()
  if not scan:
    model, weights = model.unscanned(weights)
  cached_equals_full(model, weights)


def test_greedy_equals_argmax_of_repeated_forwards():
  rng = np.random.default_rng(5)
  rows = [[random_document(rng, spans, vocab=39)] for spans in ('tit', 't', 'titi')]
  got = make_generate(MODEL, 4, -7)(params(), pack(rows, T=20))
  for i in range(4):
    out = logits(params(), pack(rows), MODEL)
    for b, [d] in enumerate(rows):
      token = np.argmax(out[b, length(d, True) - 1])
      assert got[b, i] == token
      d.append(('text', [token], False))


@pytest.mark.parametrize('latest', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_rows_go_on_from_a_prefix_with_media(latest):
  """Also a row whose own words must look back at the prefix' images."""
  rng = np.random.default_rng(7)
  model = MODEL.clone(latest=latest)
  prefix = random_document(rng, 'itit', vocab=39)
  rows = [random_document(rng, spans, vocab=39) for spans in ('tit', 't', 'it')]
  f = make_generate(model, 4, -7)
  got = f(params(), pack([[d] for d in rows], T=20), prefix=pack([[prefix]], T=20))
  want = f(params(), pack([[[*prefix, *d]] for d in rows], T=40))
  np.testing.assert_array_equal(got, want)
  blind = f(params(), pack([[d] for d in rows], T=20))
  assert (got != blind).any()


def test_text_alone_needs_no_bank():
  batch = pack([[documents()[2]]])
  want = logits(params(), batch, MODEL)
  got = logits(params(), PackedBatch(batch.stream, {}), MODEL)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_frozen_leaves_change_no_bit_and_have_no_memory():
  batch = pack([documents(), documents(1)])
  names = sharding.axis_names(MODEL.init, jax.random.key(0), batch)['params']
  made = optim.build(
    params(), names, name='adamw', learning_rate=1e-2, steps=9, weight_decay=0.1,
    freeze=FROZEN,
  )  # fmt: skip

  def task(params, batch, rng, train):
    loss, weight = loss_fn(MODEL, params, batch)
    return loss, {'weight': weight}

  run = jax.jit(step.make_step(task, made, jax.random.key(0)))
  now = state.create(params(), made)
  memory = sum(x.size for x in jax.tree.leaves(now.opt_state))
  trained = {k: v for k, v in params().items() if k in ('cross', 'resampler')}
  assert memory <= 2 * sum(x.size for x in jax.tree.leaves(trained)) + 9
  for _ in range(2):
    now, metrics = run(now, batch)
  assert metrics['skipped'] == 0
  for part in ('vision', 'lm'):
    jax.tree.map(np.testing.assert_array_equal, now.params[part], params()[part])
  for part in trained:
    changed = jax.tree.map(
      lambda a, b: bool(np.any(a != b)), now.params[part], trained[part]
    )
    assert all(jax.tree.leaves(changed)), changed


@pytest.mark.slow
def test_bridges_to_nnx():
  batch = pack([documents()])
  model = MODEL.clone(gate_init=0.5)
  _, got, want = bridge.both(model, batch)
  assert_close(got, want, 1e-5)


# Of the language model D, layers and k (2204.14198, tables 1 and 5), and what the paper
# says of the cross-attention, in billions of parameters.
PAPER = {'3B': (2048, 24, 1, 1.2), '9B': (4096, 40, 4, 1.6)}


@pytest.mark.parametrize('name', PAPER)
def test_trained_parts_have_their_published_sizes(name):
  """Without computing anything: 194 million in the resampler, 1.2 and 1.6 billion.

  An NFNet's features are 3072 wide, as the encoder's here that stands for it, and are
  projected to the resampler's 1536. The 10 billion of Flamingo-80B don't follow from
  what the paper tells: 12 blocks of width 8192 with an MLP of 4 D come to 6.9.
  """
  D, layers, k, billions = PAPER[name]
  model = models.build(
    'flamingo', vocab_size=32_000, media=[['image', 768]], cross_every=k,
    cross_heads=16,
    lm=dict(
      name='unified', embed_dim=D, num_layers=layers, num_heads=D // 128,
      num_kv_heads=D // 128, head_dim=128, mlp_dim=4 * D,
    ),
    vision=dict(name='vit', embed_dim=3072, num_layers=1, num_heads=16, mlp_dim=6144),
    resampler=dict(embed_dim=1536, num_heads=16, head_dim=128),
  )  # fmt: skip
  batch = Budget(8, 4, {'image': BankBudget(4, 1, 768)}).empty(1)
  made = jax.eval_shape(model.init, jax.random.key(0), batch)['params']
  size = {part: sum(x.size for x in jax.tree.leaves(made[part])) for part in made}
  assert round(size['cross'] / 1e9, 1) == billions
  kernels = 6 * (4 * 1536 * 2048 + 2 * 1536 * 6144) + 64 * 1536 + 3072 * 1536
  assert size['resampler'] == kernels + (6 * 3 + 1) * 2 * 1536
  assert round(size['resampler'] / 1e6) == 194
  assert jax.eval_shape(model.apply, {'params': made}, batch).shape == (1, 8, D)


def test_only_the_latents_that_are_seen_matter():
  """Of three latents two are looked at, so the third's key and value don't matter."""
  model, batch = build(latents_seen=2), pack([documents()])

  def latents(m, batch):
    return m._latents(batch.bank['image'], False)

  def both(m):
    return jax.jit(functools.partial(m.apply, method=latents))(
      {'params': params()}, batch
    )

  want, got = both(MODEL), both(model)
  B, S, D = want.shape
  np.testing.assert_array_equal(
    got, want.reshape(B, -1, 3, D)[:, :, :2].reshape(B, -1, D)
  )
  assert (
    np.abs(logits(params(), batch, model) - logits(params(), batch, MODEL)).max() > 1e-3
  )


@pytest.mark.slow
def test_frames_of_a_video_and_their_order_matter():
  """An item of three frames: the encoder sees each alone, the resampler tells them."""
  rng = np.random.default_rng(0)
  video = rng.integers(0, 255, (3, 4, 6))  # frames, patches, values
  model = build(resampler=FIELDS['resampler'] | dict(num_frames=4))

  def batch_of(frames):
    image = ('image', np.zeros((3, 4, 6)))
    batch = pack([[[image, ('text', np.array([5, 6]), True)]]], T=8, P=16)
    bank = batch.bank['image']
    bank.values[0, :12] = frames.reshape(12, 6)
    cells = np.stack(np.meshgrid(range(3), range(2), range(2), indexing='ij'), -1)
    bank.positions[0, :12] = cells.reshape(12, 3)
    return batch

  weights = jax.jit(model.init)(jax.random.key(0), batch_of(video))['params']
  weights['cross'] = jax.tree.map(lambda x: x + 0.5, weights['cross'])
  weights['resampler']['time'] *= 50
  want = logits(weights, batch_of(video), model)
  turned = logits(weights, batch_of(video[::-1]), model)
  assert np.abs(want - turned)[0, :3].max() > 1e-3
  flat = jax.tree.map(lambda x: x, weights)
  flat['resampler']['time'] = jnp.zeros_like(flat['resampler']['time'])
  same = logits(flat, batch_of(video[::-1]), model)
  np.testing.assert_allclose(
    logits(flat, batch_of(video), model)[0, :3], same[0, :3], atol=1e-5
  )  # without time embeddings, frames are a bag
  other = video.copy()
  other[2, 3] += 100
  assert np.abs(logits(weights, batch_of(other), model) - want)[0, :3].max() > 1e-4


def test_an_item_takes_one_slot():
  assert MODEL.slots(Item('image', (1, 3, 4))) == (1, 1, 1)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(media=[['image', 6], ['audio', 6]]), 'looks at one kind of media, got'),
    (dict(cross_every=0), 'cross_every=0 must be at least 1'),
    (dict(latents_seen=4), 'latents_seen=4 is not in 1..3'),
    (dict(marker=40), 'marker=40 is not in 0..39'),
    (dict(gate='tan'), "unknown gate 'tan'; did you mean 'tanh'"),
    (
      dict(resampler=dict(embed_dim=8, num_heads=3)),
      'embed_dim=8 does not divide over num_heads=3',
    ),
    (dict(vision=dict(name='vitt')), "vision: unknown name 'vitt'; did you mean 'vit'"),
    (dict(vision=dict(name='vit', dim=3)), "vision has no field 'dim'"),
    (dict(lm=dict(name='encoder')), "lm: unknown name 'encoder'"),
  ],
)
def test_refuses(change, message):
  with pytest.raises(ValueError, match=message):
    models.build('flamingo', **FIELDS | change)


def test_refuses_other_media():
  budget = Budget(8, 4, {'audio': BankBudget(2, 1, 6)})
  with pytest.raises(ValueError, match="batch has media 'audio', the model looks at"):
    MODEL.init(jax.random.key(0), budget.empty(1))
