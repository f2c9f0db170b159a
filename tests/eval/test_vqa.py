"""The model of these tests is a rule, so that every count is known beforehand."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import PIL.Image
import pytest

from mmjax import sharding
from mmjax.data.document import Audio, BadDocument, Document, Image, Text
from mmjax.data.media import ImageRule
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.data.writer import Writer
from mmjax.eval import build_evaluators, report
from mmjax.eval.prompts import questions
from mmjax.eval.vqa import Vqa, summarise
from mmjax.train import config as config_lib

RULE = ImageRule(patch=4, resize='longest', size=16)


class Data(list):
  """A dataset in memory; a string stands for a document that can't be read."""

  tokenizer = ByteTokenizer()

  def __getitem__(self, index):
    document = list.__getitem__(self, index)
    if isinstance(document, str):
      raise BadDocument(document, 'for the test')
    return document


@dataclasses.dataclass(frozen=True)
class Model:
  def slots(self, item):
    return item.grid


def _first_pixel(batch):
  """f32[B], the first value of each row's first image; -1 without one."""
  values = batch.bank['image'].values[:, 0, 0].astype(jnp.float32)
  return jnp.where(batch.bank['image'].items[:, 0] > 0, values, -1.0)


def looks(model, params, batch, *, max_new, end_id):
  """Answers one letter that stands for the shade of the image."""
  letter = ord('a') + (_first_pixel(batch) // 16).astype(jnp.int32)
  return jnp.stack([letter] + [jnp.full_like(letter, end_id)] * (max_new - 1), 1)


def guesses(model, params, batch, *, max_new, end_id):
  """Answers from the last token of the question alone."""
  tokens = jnp.max(jnp.where(batch.stream.tokens >= 0, batch.stream.tokens, 0), 1)
  letter = ord('a') + tokens % 3
  return jnp.stack([letter] + [jnp.full_like(letter, end_id)] * (max_new - 1), 1)


def _png(shade, height=16, width=16):
  file = io.BytesIO()
  array = np.full((height, width, 3), shade, np.uint8)
  PIL.Image.fromarray(array).save(file, 'PNG')
  return file.getvalue()


def _letter(shade):
  return chr(ord('a') + shade // 16)


def _data(documents=13, sizes=((16, 16), (8, 16), (16, 12))):
  """Documents of 1 to 4 questions about one image; right: the letter of its shade."""
  data = Data()
  for i in range(documents):
    shade = 16 * (i % 8)  # never the grey of a blank image, 128
    spans = [Image(_png(shade, *sizes[i % len(sizes)]))]
    for k in range(1 + i % 4):
      question = Text(f'shade{"?" * (k + 1)} ', False)
      spans += [question, Text(' ' + _letter(shade), True)]
    types = [f't{k}' for k in range(1 + i % 4)]
    data.append(Document(tuple(spans), f'test/{i}', {'types': types}))
  return data


def _vqa(data, generate=looks, rows=8, devices=1, **fields):
  mesh = sharding.make_mesh({'data': -1}, jax.devices()[:devices])
  rules = sharding.rules_for('dp')
  fields = {'media_rules': {'image': RULE}, 'max_new': 3, **fields}
  return Vqa(data, Model(), mesh, rules, rows=rows, generate=generate, **fields)


@pytest.mark.parametrize('rows, devices', [(1, 1), (7, 1), (8, 8), (16, 4), (64, 8)])
def test_counts_are_exact_at_the_ragged_end(rows, devices):
  data = _data()
  vqa = _vqa(data, rows=rows, devices=devices)
  result = vqa.run({})
  want = sum(1 + i % 4 for i in range(13))
  assert want % 7 and want % 8
  # Brute force: the letter of the image that was shown, one question at a time.
  assert len(result.predictions) == want == result.metrics['vqa/count']
  at = 0
  for i, document in enumerate(data):
    shade = 16 * (i % 8)
    for k, q in enumerate(questions(document)):
      r = result.predictions[at]
      assert (r['index'], r['document'], r['turn']) == (i, f'test/{i}', k)
      assert (r['question'], r['answer'], r['type']) == (
        q.text.strip(),
        q.answer,
        f't{k}',
      )
      assert r['prediction'] == _letter(shade)
      assert r['prediction_shuffled'] == _letter(16 * (r['shuffled_from'] % 8))
      assert r['prediction_blank'] == _letter(128)
      assert r['correct']
      at += 1
  assert result.metrics['vqa/accuracy'] == 1.0
  assert result.metrics['vqa/accuracy_blank'] == 0.0
  hits = [r['prediction_shuffled'] == r['answer'] for r in result.predictions]
  assert result.metrics['vqa/accuracy_shuffled'] == sum(hits) / want
  assert result.metrics['vqa/accuracy/t3'] == 1.0
  assert result.metrics['vqa/seconds'] > 0


def test_one_compilation_whatever_is_asked():
  vqa = _vqa(_data(), limit=3)
  assert vqa.run({}).metrics['vqa/count'] == 3
  assert vqa.run({}, full=True).metrics['vqa/count'] == 31
  assert vqa._step._cache_size() == 1


@pytest.mark.parametrize('generate, uses', [(looks, True), (guesses, False)])
def test_page_tells_a_model_that_looks_from_one_that_guesses(tmp_path, generate, uses):
  result = _vqa(_data(40), generate, published={'majority': 0.2}).run({})
  gain = result.metrics['vqa/gain']
  assert (gain > 0.5) if uses else (gain == 0.0)
  assert (result.metrics['vqa/gain_low'] > 0) == uses
  page = report.write(tmp_path, 3, {'vqa': result})['html'].read_text()
  assert ('Uses its images: +' in page) == uses
  assert ('No sign that it uses its images: +0.0 points' in page) == (not uses)
  assert 'majority<br>20.0\u00a0%' in page


def test_answers_end_at_the_end_token_and_lose_outer_space():
  def talks(model, params, batch, *, max_new, end_id):
    said = jnp.array([*b' ab', end_id, *b'cd'], jnp.int32)[:max_new]
    return jnp.tile(said, (batch.stream.tokens.shape[0], 1))

  answers = {
    r['prediction'] for r in _vqa(_data(2), talks, max_new=6).run({}).predictions
  }
  assert answers == {'ab'}
  answers = {
    r['prediction'] for r in _vqa(_data(2), talks, max_new=2).run({}).predictions
  }
  assert answers == {'a'}


def test_bad_documents_are_left_out_and_counted():
  data = _data(6)
  data.insert(2, 'unreadable_record')
  data.append(Document((Image(b'no image'), Text('q', False), Text('a', True))))
  sound = (Audio(np.zeros(9, np.float32), 8000.0), Text('q', False), Text('a', True))
  data.append(Document(sound))
  result = _vqa(data).run({})
  assert result.metrics['vqa/bad_documents'] == 3
  assert {r['index'] for r in result.predictions} == {0, 1, 3, 4, 5, 6}
  assert result.metrics['vqa/accuracy'] == 1.0
  assert all(r['shuffled_from'] not in (2, 7, 8) for r in result.predictions)


def test_a_lone_image_is_shuffled_with_a_blank_one_and_text_stays_text():
  data = _data(1)
  data.append(Document((Text('only words? ', False), Text('a', True)), 'words'))
  alone, words = _vqa(data).run({}).predictions
  assert alone['shuffled_from'] is words['shuffled_from'] is None
  assert alone['prediction_shuffled'] == alone['prediction_blank'] == _letter(128)
  assert words['prediction'] == words['prediction_shuffled'] == words['prediction_blank']


def test_pictures_are_those_of_the_data():
  (picture,) = _vqa(_data()).pictures(3)
  np.testing.assert_array_equal(picture, np.full((16, 16, 3), 48, np.uint8))


def test_summary_counts_by_type():
  record = dict(index=0, answer='a', prediction='a', prediction_shuffled='b')
  record |= dict(prediction_blank='b', type='x')
  other = {**record, 'index': 1, 'prediction': 'b', 'type': 'y'}
  found = summarise([record, other])
  assert found['vqa/accuracy'] == 0.5
  assert (found['vqa/accuracy/x'], found['vqa/accuracy/y']) == (1.0, 0.0)


def test_refuses_what_can_not_work():
  with pytest.raises(ValueError, match='no question in 1 documents .bad: none'):
    _vqa(Data([Document((Text('just words', False),))])).run({})
  with pytest.raises(ValueError, match="'batch' of size 6 does not divide over"):
    _vqa(_data(), rows=6, devices=8).run({})
  with pytest.raises(ValueError, match='eval.vqa.rows = 0'):
    _vqa(_data(), rows=0)
  with pytest.raises(ValueError, match='eval.vqa.max_new = 0; it must be positive'):
    _vqa(_data(), max_new=0)
  with pytest.raises(ValueError, match='eval.vqa.limit = -1; it must be positive'):
    _vqa(_data(), limit=-1)


def _config(**vqa):
  return ml_collections.ConfigDict(
    dict(
      data=dict(
        path='nowhere', image=dict(patch=4, resize='fixed', size=16),
        budget=dict(image=dict(patches=16, items=1)), image_attention='causal',
        prompt_attention='causal', image_positions='grid',
      ),
      eval=dict(vqa=vqa),
    )
  )  # fmt: skip


def _build(config, **fields):
  mesh = sharding.make_mesh({'data': -1})
  fields = {'model': Model(), 'mesh': mesh, 'rules': sharding.rules_for('dp'), **fields}
  return build_evaluators(config, **fields)


def test_evaluators_are_built_from_the_config():
  published = {'majority answer': 0.373}
  config = _config(every=5, split='test', limit=None, rows=16, published=published)
  vqa = _build(config, dataset=_data())['vqa']
  assert (vqa.every, vqa.limit, vqa.rows, vqa.max_new) == (5, None, 16, 8)
  assert vqa.media_rules['image'].size == 16
  assert vqa.image_attention == 'causal'
  assert vqa.published == published
  assert _build(ml_collections.ConfigDict(dict(eval={}))) == {}


def test_a_config_of_text_alone_has_no_rule_for_images():
  config = _config(rows=8)
  config.data.image = config.data.budget.image = ml_collections.ConfigDict()
  words = (Text('shade ', False), Text(' a', True))
  data = Data([Document(words), Document((Image(_png(0)), *words))])
  vqa = _build(config, dataset=data)['vqa']
  assert vqa.media_rules == {}
  vqa.generate = guesses
  found = vqa.run({}).metrics
  assert (found['vqa/count'], found['vqa/bad_documents']) == (1, 1)


def test_wrong_evaluators_and_fields_are_told_with_the_closest():
  with pytest.raises(ValueError, match="no field 'evry'; did you mean 'every'"):
    _build(_config(evry=5), dataset=_data())
  with pytest.raises(ValueError, match="no field 'mesh'"):
    _build(_config(mesh=1), dataset=_data())
  config = ml_collections.ConfigDict(dict(eval=dict(vqaa={})))
  with pytest.raises(ValueError, match="evaluator 'vqaa'; did you mean 'vqa'"):
    _build(config)
  with pytest.raises(ValueError, match='no dataset at nowhere'):
    _build(_config())


def test_shots_are_asked_of_another_split_and_negative_ones_refused():
  data, train = _data(6), _data(9)
  seen = []

  def remember(model, params, batch, *, max_new, end_id):
    seen.append(batch.bank['image'].items.shape)
    return looks(model, params, batch, max_new=max_new, end_id=end_id)

  vqa = _vqa(data, remember, shots=2, pool=train)
  found = vqa.run({}).metrics
  assert seen[0][1] > 0 and found['vqa/count'] == sum(1 + i % 4 for i in range(6))
  assert max(len(e.media['image'].item_order) for e in vqa._prepared[1]) == 3
  with pytest.raises(ValueError, match='eval.vqa.shots = -1'):
    _vqa(data, shots=-1)


def test_supports_come_from_another_split_unless_told(tmp_path):
  with Writer(tmp_path / 'd', ByteTokenizer(), {}) as writer:
    for i, document in enumerate(_data(6)):
      writer.add('train' if i < 4 else 'test', document)
  config = config_lib.resolve(ml_collections.ConfigDict(dict(
    data=dict(path=str(tmp_path / 'd'), image=dict(patch=4, resize='longest', size=16),
              budget=dict(stream=64, targets=8, image=dict(patches=16, items=1))),
  )))  # fmt: skip
  mesh = sharding.make_mesh({'data': -1}, jax.devices()[:1])

  def pool(**said):
    config.eval = dict(vqa=dict(shots=1, **said))
    made = build_evaluators(
      config, model=Model(), mesh=mesh, rules=sharding.rules_for('dp')
    )
    return made['vqa'].pool

  assert pool().split == 'train'
  assert pool(shots_split='test') is None  # of itself, but no document of itself
  assert pool(split='train') is None
  with pytest.raises(ValueError, match="no split 'tset'"):
    pool(shots_split='tset')
