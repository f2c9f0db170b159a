"""Retrieval and zero-shot classification of a model whose embeddings are known."""

import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from mmjax import sharding
from mmjax.data.document import Document, Image, Text
from mmjax.data.media import ImageRule
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.data.writer import Writer
from mmjax.eval import Retrieval, ZeroShot
from mmjax.train import config as config_lib
from mmjax.train import loop

COLOURS = {'red': (255, 0, 0), 'green': (0, 255, 0), 'blue': (0, 0, 255)}


class Oracle:
  """Knows colours: an image's mean; a text's letters, by their share of r, g and b."""

  def slots(self, item):
    return (0, 0, 0)

  def apply(self, variables, batch, segments=None, *, method):
    if method == 'embed_images':
      each = jnp.arange(1, 1 + batch.item_segments.shape[1])
      mine = batch.items[..., None] == each[None, None]
      pixels = batch.values.reshape(*batch.items.shape, -1, 3).astype(jnp.float32).mean(2)
      x = jnp.einsum('BPI,BPC->BIC', mine.astype(jnp.float32), pixels)
    else:
      s = batch.stream
      letters = s.tokens[..., None] == jnp.array([[[ord(c) for c in 'rgb']]])
      mine = s.segment_ids[..., None] == segments[:, None]
      x = jnp.einsum('BTI,BTC->BIC', *(m.astype(jnp.float32) for m in (mine, letters)))
    x = variables['params'][None, None] * x
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
    return x if method == 'embed_images' else (x, jnp.ones(segments.shape, bool))


class Documents(list):
  tokenizer = ByteTokenizer()


@functools.cache
def documents(count=21):
  """No two of the same mixture, and no two colours of the same share."""
  mixtures = [m for m in itertools.permutations(range(1, 9), 3) if math.gcd(*m) == 1]
  chosen = np.random.default_rng(0).permutation(len(mixtures))[:count]
  made = Documents()
  for i, share in enumerate(np.array(mixtures)[chosen]):
    picture = np.tile((28 * share).astype(np.uint8), (4, 4, 1))
    text = ''.join(c * n for c, n in zip('rgb', share.tolist()))
    meta = {'name/xx': text, 'label': 'rgb'[int(share.argmax())]}
    if i % 2:
      meta['name/yy'] = 'b'  # says little
    made.append(Document((Image(picture), Text(text, True)), f'd{i}', meta))
  return made


def make(cls, dataset=None, devices=8, rows=8, **fields):
  mesh = sharding.make_mesh(dict(data=devices), jax.devices()[:devices])
  return cls(
    dataset=documents() if dataset is None else dataset,
    model=Oracle(), mesh=mesh, rules=sharding.rules_for('dp'),
    media_rules={'image': ImageRule(patch=2, resize='fixed', size=4)}, rows=rows,
    **fields,
  )  # fmt: skip


ONES = np.ones(3, np.float32)


def test_all_are_found_by_who_knows():
  found = make(Retrieval).run(ONES)
  m = found.metrics
  for way in ('image_to_text', 'text_to_image'):
    assert (m[f'retrieval/{way}/r1'], m[f'retrieval/{way}/median_rank']) == (1, 1)
  assert m['retrieval/count'] == 21 and m['retrieval/chance/r5'] == pytest.approx(5 / 21)
  assert len(found.predictions) == 42 and all(r['correct'] for r in found.predictions)
  record = found.predictions[21 + 4]
  assert record['task'] == 'text to image' and record['top'][0][0] == 4
  assert json.loads(json.dumps(found.predictions)) == found.predictions
  assert 'R@1 is 100.0\u00a0%' in found.headline
  assert found.pictures(4)[0].shape == (4, 4, 3)


def test_who_sees_nothing_is_at_chance():
  m = make(Retrieval).run(0 * ONES).metrics
  for k in (1, 5, 10):
    assert m[f'retrieval/text_to_image/r{k}'] == pytest.approx(k / 21)
    assert m[f'retrieval/chance/r{k}'] == pytest.approx(k / 21)
  assert m['retrieval/image_to_text/median_rank'] == 11


def test_languages():
  m = make(Retrieval, languages='all').run(ONES).metrics
  assert m['retrieval/xx/image_to_text/r1'] == 1
  assert m['retrieval/yy/image_to_text/r1'] == pytest.approx(1 / 10)  # 10 of 'b': ties
  only = make(Retrieval, languages=('xx',)).run(ONES)
  assert 'retrieval/yy/image_to_text/r1' not in only.metrics
  assert ['xx: image to text', '21'] in [list(r[:2]) for r in only.cells]
  with pytest.raises(ValueError, match="eval.retrieval.languages: 'zz'.*xx, yy"):
    make(Retrieval, languages=('zz',)).run(ONES)


def test_limit_and_bad_documents():
  dataset = Documents(documents())
  dataset[3] = Document((Text('red', True),))
  dataset[5] = Document((documents()[5].spans[0],))
  evaluator = make(Retrieval, dataset, limit=6, devices=1, rows=4)
  m = evaluator.run(ONES).metrics
  assert m['retrieval/count'] == 6 and m['retrieval/bad_documents'] == 2
  assert evaluator.run(ONES, full=True).metrics['retrieval/count'] == 19


def test_zero_shot():
  """A class is 'rrr'; a template that speaks of green too pulls to the middle."""
  classes = {c: 3 * c for c in 'rgb'}
  evaluator = make(ZeroShot, classes=classes, templates=('{}', 'a g {}'))
  m = evaluator.run(ONES).metrics
  labels = [d.meta['label'] for d in documents()]
  want = np.array([[3, 1, 0], [0, 1, 0], [0, 1, 3]]) / np.sqrt([[10], [1], [10]])
  want = want + np.eye(3)
  want /= np.linalg.norm(want, axis=1, keepdims=True)
  got = evaluator.class_embeddings(ONES, ['r', 'g', 'b'])
  np.testing.assert_allclose(got, want, atol=1e-6)
  images = np.array([d.spans[0].content.mean((0, 1)) for d in documents()])
  guess = np.argmax(images @ want.T, 1)
  hits = [labels[i] == 'rgb'[g] for i, g in enumerate(guess)]
  assert m['zeroshot/accuracy'] == pytest.approx(np.mean(hits)) and np.mean(hits) > 0.3
  assert m['zeroshot/classes'] == 3 and m['zeroshot/chance'] == pytest.approx(1 / 3)
  counts = [labels.count(c) for c in 'rgb']
  assert m['zeroshot/majority'] == pytest.approx(max(counts) / 21)
  by_class = [np.mean([h for h, x in zip(hits, labels) if x == c]) for c in 'rgb']
  assert m['zeroshot/mean_class_accuracy'] == pytest.approx(np.mean(by_class))
  blind = make(ZeroShot, templates=['{}'], limit=5).run(0 * ONES)
  assert blind.metrics['zeroshot/count'] == 5
  assert blind.predictions[0]['right'] == labels[0]


@pytest.mark.parametrize(
  'cls, fields, message',
  [
    (Retrieval, dict(rows=0), 'eval.retrieval.rows = 0; it must be positive'),
    (Retrieval, dict(at=(0, 1)), r'eval.retrieval.at = \(0, 1\); ranks count from 1'),
    (ZeroShot, dict(limit=0), 'eval.zeroshot.limit = 0'),
    (ZeroShot, dict(templates=('a',)), "'a' needs one '{}'"),
    (ZeroShot, dict(templates=()), 'eval.zeroshot.templates is empty'),
  ],
)
def test_refuses(cls, fields, message):
  with pytest.raises(ValueError, match=message):
    make(cls, **fields)


class Words(ByteTokenizer):
  """Blanks are nothing, as to WordPiece."""

  def encode(self, text, special=False):
    return super().encode(text.strip(), special)


def test_blanks_may_be_nothing_to_a_tokenizer():
  dataset = Documents(documents())
  dataset.tokenizer = Words()
  found = make(Retrieval, dataset).run(ONES).metrics
  assert found['retrieval/count'] == 21 and found['retrieval/image_to_text/r1'] == 1


def test_refuses_data_without_pairs():
  texts = Documents([Document((Text('red', True),))])
  with pytest.raises(ValueError, match='no pair in 1 documents .*no_image'):
    make(Retrieval, texts).run(ONES, 7)
  with pytest.raises(ValueError, match="no image with meta 'label' in 1 documents"):
    make(ZeroShot, texts).run(ONES)
  with pytest.raises(ValueError, match='nothing to embed'):
    make(Retrieval).embedder.texts(ONES, [])


@pytest.mark.slow
def test_in_the_training_loop(tmp_path):
  """A tiny dual encoder with both evaluators."""
  rng = np.random.default_rng(0)
  with Writer(tmp_path / 'data', ByteTokenizer()) as writer:
    for split, count in (('train', 48), ('test', 12)):
      for i in range(count):
        name = list(COLOURS)[i % 3]
        picture = np.tile(np.array(COLOURS[name], np.uint8), (4, 4, 1)) // 2
        picture += rng.integers(0, 128, picture.shape, np.uint8)
        spans = (Image(picture), Text(name, True))
        writer.add(split, Document(spans, f'{split}/{i}', {'label': name}))
  tower = dict(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16, scan=False)
  text = dict(name='encoder', num_kv_heads=2, head_dim=8, **tower)
  config = config_lib.resolve(
    ConfigDict(
      dict(
        data=dict(
          source='none', path=str(tmp_path / 'data'), rows=8,
          image=dict(patch=2, resize='fixed', size=4),
          budget=dict(stream=24, targets=24, image=dict(patches=16, items=4)),
        ),
        model=dict(name='dual', embed_dim=8, text=text, text_pool='mean',
                   vision=dict(name='vit', **tower)),
        optim=dict(learning_rate=1e-2, schedule=dict(name='constant')),
        sharding=dict(max_replicated=1.0),
        train=dict(task='contrastive', contrastive=dict(loss='sigmoid'), steps=8,
                   log_every=4, checkpoint_every=4),
        eval=dict(retrieval=dict(every=4, limit=4, rows=4), zeroshot=dict(rows=4)),
      )
    )
  )  # fmt: skip
  jax.config.update('jax_disable_most_optimizations', True)
  try:
    loop.train(config, tmp_path / 'run', jax.devices()[:1])
  finally:
    jax.config.update('jax_disable_most_optimizations', False)
  lines = (tmp_path / 'run/metrics.jsonl').read_text().splitlines()
  lines = [json.loads(x) for x in lines]
  counts = [x['eval/retrieval/count'] for x in lines if 'eval/retrieval/count' in x]
  assert counts == [4, 12]
  losses = [x['train/loss'] for x in lines if 'train/loss' in x]
  assert losses[-1] < losses[0]
  last = lines[-1]
  assert 0 <= last['eval/zeroshot/accuracy'] <= 1
  page = (tmp_path / 'run/eval/8.html').read_text()
  assert page.count('<article') == 24 + 12
