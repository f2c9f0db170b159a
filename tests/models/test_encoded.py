import functools

import bridge
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documents import length, pack, random_document
from fusions import (
  assert_close,
  eight_devices_equal_one,
  logits,
  loss_and_grads,
  loss_fn,
)

from mmjax import models, sharding
from mmjax.batch import BankBudget, Budget, Item, PackedBatch
from mmjax.generate import make_generate
from mmjax.models.encoded import STAGE1, STAGE2
from mmjax.train import optim, state, step

FIELDS = dict(
  lm=dict(
    name='unified', vocab_size=40, embed_dim=16, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8, mlp_dim=24,
  ),
  vision=dict(
    name='vit', embed_dim=12, num_layers=1, num_heads=2, mlp_dim=16, position_grid=[3, 3]
  ),
  media=[['image', 6]],
)  # fmt: skip
RESAMPLER = dict(embed_dim=8, num_layers=1, num_heads=2, num_latents=3)
PROJECTORS = {
  'linear': dict(name='linear'),
  'mlp': dict(name='mlp'),
  'resampler': dict(name='resampler', resampler=RESAMPLER),
}


def build(projector='mlp', **fields):
  part = dict(projector=PROJECTORS[projector])
  return models.build('encoded', **FIELDS | part | fields)


MODEL = build()


@functools.cache
def params(projector='mlp'):
  model = build(projector)
  made = jax.jit(model.init)(jax.random.key(0), pack([[]]))['params']
  rng = np.random.default_rng(0)  # biases too are far from 0
  return jax.tree.map(
    lambda x: x + np.float32(0.1) * rng.normal(size=x.shape).astype('f'), made
  )


def documents(seed=0):
  rng = np.random.default_rng(seed)
  made = [random_document(rng, spans) for spans in ('tit', 'ititt', 'tt')]
  return [[*d, ('text', rng.integers(1, 40, 3), True)] for d in made]


def packed(projector, rows, **budget):
  """A batch with as many slots per image as the projector makes."""
  R = RESAMPLER['num_latents'] if projector == 'resampler' else 0
  return pack(rows, markers=R, **budget)


@pytest.mark.slow
@pytest.mark.parametrize(
  'projector', ['mlp', pytest.param('resampler', marks=pytest.mark.slow)]
)
def test_packed_equals_unpacked(projector):
  a, b, c = documents()
  model, weights = build(projector), params(projector)
  together = loss_and_grads(weights, packed(projector, [[a, b, c], [], []]), model)
  apart = loss_and_grads(weights, packed(projector, [[a], [b], [c]]), model)
  assert float(together[0][1]) >= 9
  assert_close(together, apart, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('projector', ['linear', 'resampler'])
def test_a_token_changes_when_and_only_when_an_image_it_may_see_does(projector):
  """Slots of an image see each other; a later token sees the images before it."""
  rng = np.random.default_rng(0)
  text = lambda n: ('text', rng.integers(1, 40, n), True)  # noqa: E731
  image = lambda: ('image', rng.integers(0, 99, (3, 1, 6)))  # noqa: E731
  row = [[text(2), image(), text(1), image(), text(1)], [image(), text(2)]]
  batch = packed(projector, [row], T=16, I=4, P=10)
  model, weights = build(projector), params(projector)
  before = logits(weights, batch, model)
  for i, (start, stop) in enumerate([(2, 10), (6, 10), (10, 15)]):
    other = jax.tree.map(np.copy, batch)
    other.bank['image'].values[other.bank['image'].items == i + 1] += 100
    changed = np.any(logits(weights, other, model) != before, -1)[0]
    want = (np.arange(16) >= start) & (np.arange(16) < stop)
    np.testing.assert_array_equal(changed, want)


@pytest.mark.slow
def test_text_scaled_by_sqrt_d_leaves_media_as_they_are():
  """PaliGemma's rule: what the projector gives enters the stream unchanged."""
  batch = pack([documents()])
  here = batch.stream.tokens == -1
  streams = {}
  for scale in (True, False):
    model = build(lm=FIELDS['lm'] | dict(scale_embedding=scale))

    def both(m, batch):
      ready = m._ready(batch, False)
      return m.lm.embed(PackedBatch(batch.stream, {}), ready), ready['image']

    apply = jax.jit(functools.partial(model.apply, method=both))
    streams[scale], tokens = apply({'params': params()}, batch)
    np.testing.assert_array_equal(
      streams[scale][here], tokens[0][batch.stream.source[here]]
    )
  text = {k: np.asarray(x)[~here] for k, x in streams.items()}
  np.testing.assert_allclose(text[True], 4 * text[False], rtol=1e-6)


@functools.partial(jax.jit, static_argnames='model')
def extend(params, batch, cache, slot, model):
  variables = {'params': params}
  hidden, cache = model.apply(variables, batch, cache, slot, method='extend')
  return model.apply(variables, hidden, method='logits'), cache


@pytest.mark.parametrize('scan', [True, False])
def test_cached_logits_equal_the_full_forward(scan):
  """Span by span, padded to one width; the bank comes only with media slots."""
  rng = np.random.default_rng(3)
  text = lambda n: ('text', rng.integers(1, 40, n), True)  # noqa: E731
  image = lambda: ('image', rng.integers(0, 99, (2, 2, 6)))  # noqa: E731
  document = [text(2), image(), text(3), image(), text(1)]
  batch, model, weights = pack([[document]]), MODEL, params()
  want = logits(weights, batch, model)[0]
  if not scan:
    model, weights = model.unscanned(weights)
  width, t = 4, 0
  cache = model.empty_cache(1, width * len(document))
  for i, span in enumerate(document):
    n, piece = length([span]), pack([[]], T=width)
    for name, x in vars(piece.stream).items():
      x[0, :n] = getattr(batch.stream, name)[0, t : t + n]
    bank = batch.bank if span[0] == 'image' else {}
    piece = PackedBatch(piece.stream, bank)
    got, cache = extend(weights, piece, cache, jnp.int32(i * width), model)
    np.testing.assert_allclose(got[0, :n], want[t : t + n], rtol=0, atol=2e-5)
    t += n


def test_greedy_equals_argmax_of_repeated_forwards():
  rng = np.random.default_rng(5)
  rows = [[random_document(rng, spans)] for spans in ('tit', 't')]
  got = make_generate(MODEL, 3, -7)(params(), pack(rows, T=48))
  for i in range(3):
    out = logits(params(), pack(rows), MODEL)
    for b, [d] in enumerate(rows):
      token = np.argmax(out[b, length(d) - 1])
      assert got[b, i] == token
      d.append(('text', [token], False))


@pytest.mark.slow
@pytest.mark.parametrize('mesh', ['fsdp4 tensor2', 'context8', 'mixed'])
def test_eight_devices_equal_one(mesh):
  batch = pack([documents(seed) for seed in range(8)], T=80, P=64)
  weights = eight_devices_equal_one(MODEL, params(), batch, mesh)
  if mesh == 'fsdp4 tensor2':
    up = weights['projector']['up']
    assert up.sharding.shard_shape(up.shape) == (12, 8)


@pytest.mark.slow
def test_bridges_to_nnx():
  batch = pack([documents()])
  _, got, want = bridge.both(MODEL, batch)
  assert_close(got, want, 1e-5)


def test_padding_and_missing_banks_change_no_bit():
  batch = pack([documents(), []])
  wild = jax.tree.map(np.copy, batch)
  padding = wild.stream.segment_ids == 0
  wild.stream.positions[padding] = 5
  wild.stream.tokens[padding] = 17
  wild.bank['image'].values[wild.bank['image'].items == 0] = 255
  real = ~padding
  x, y = logits(params(), wild, MODEL), logits(params(), batch, MODEL)
  np.testing.assert_array_equal(x[real], y[real])
  text = pack([[documents()[2]], []])
  got = logits(params(), PackedBatch(text.stream, {}), MODEL)
  np.testing.assert_allclose(got, logits(params(), text, MODEL), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('frozen', [STAGE1, STAGE2])
def test_frozen_leaves_change_no_bit_and_have_no_memory(frozen):
  batch = pack([documents(), documents(1)])
  names = sharding.axis_names(MODEL.init, jax.random.key(0), batch)['params']
  made = optim.build(
    params(), names, name='adamw', learning_rate=1e-2, steps=9, weight_decay=0.1,
    freeze=frozen,
  )  # fmt: skip

  def task(params, batch, rng, train):
    loss, weight = loss_fn(MODEL, params, batch)
    return loss, {'weight': weight}

  run = jax.jit(step.make_step(task, made, jax.random.key(0)))
  now = state.create(params(), made)
  parts = [p for p in params() if f'{p}/*' not in frozen]
  memory = sum(x.size for x in jax.tree.leaves(now.opt_state))
  trained = jax.tree.leaves({p: params()[p] for p in parts})
  assert memory <= 2 * sum(x.size for x in trained) + 9
  now, metrics = run(now, batch)
  assert metrics['skipped'] == 0
  for part, before in params().items():
    same = jax.tree.map(lambda a, b: bool(np.all(a == b)), now.params[part], before)
    assert all(jax.tree.leaves(same)) == (part not in parts), part


def test_slots():
  item = Item('image', (1, 3, 2))
  assert MODEL.slots(item) == build('linear').slots(item) == (1, 3, 2)
  assert build('resampler').slots(item) == (1, 1, 3)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(media=[['image', 6], ['audio', 6]]), 'takes one kind of media, got'),
    (dict(lm=FIELDS['lm'] | dict(modality_embedding=True)), 'modality_embedding of its'),
    (dict(lm=FIELDS['lm'] | dict(media=[['image', 6]])), 'has media or modality_embed'),
    (dict(projector=dict(name='mpl')), "projector: unknown name 'mpl'; did you mean"),
    (dict(projector=dict(name='vit')), "projector: unknown name 'vit'"),
    (dict(projector=dict(name='mlp', activation='gelo')), "activation 'gelo'; did you"),
  ],
)
def test_refuses(change, message):
  with pytest.raises(ValueError, match=message):
    models.build('encoded', **FIELDS | dict(projector=PROJECTORS['mlp']) | change)


def test_refuses_other_media():
  budget = Budget(8, 4, {'audio': BankBudget(2, 1, 6)})
  with pytest.raises(ValueError, match="batch has media 'audio', the model looks at"):
    MODEL.init(jax.random.key(0), budget.empty(1))


def test_pooled_squares_take_fewer_slots():
  projector = dict(name='pool', side=2)
  model = models.build('encoded', **FIELDS | dict(projector=projector))
  assert model.slots(Item('image', (1, 4, 6))) == (1, 2, 3)
  with pytest.raises(ValueError, match='4 x 3 tokens have no whole squares of 2'):
    model.slots(Item('image', (1, 4, 3)))
