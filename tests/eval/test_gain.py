"""The model of most of these tests is a rule, so that every loss is known beforehand."""

import dataclasses
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from mmjax import sharding
from mmjax.batch import BankBudget, Budget
from mmjax.data.document import BadDocument, Document, Image, Text
from mmjax.data.media import ImageRule
from mmjax.data.store import Dataset
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.data.writer import Writer
from mmjax.eval import Gain, build_evaluators, gain_page, report
from mmjax.eval.gain import donors, summarise
from mmjax.models.unified import Unified
from mmjax.ops.vocabulary import Head
from mmjax.train import config as config_lib

RULE = ImageRule(patch=4, resize='longest', size=8)
BUDGET = Budget(96, 64, {'image': BankBudget(12, 6, 48)})


def letter(shade):
  return chr(ord('a') + int(shade) // 16)


@dataclasses.dataclass(frozen=True)
class Looks:
  """Expects the letter of the latest image's shade, by 3 nats over each other token."""

  def slots(self, item):
    return item.grid

  def apply(self, variables, x=None, method=None):
    if method == 'head':
      return Head((3.0 * jnp.eye(257),), (('embed', 'vocab'),))
    s, bank = x.stream, x.bank['image']
    at = jnp.where(s.tokens < 0, s.source, -1)
    shade = jnp.take_along_axis(bank.values[..., 0].astype(jnp.int32), at, 1)
    T = s.tokens.shape[1]
    slot = jnp.broadcast_to(jnp.arange(T), at.shape)
    latest = jax.lax.cummax(jnp.where(at >= 0, slot, -1), axis=1)
    same = jnp.take_along_axis(s.segment_ids, jnp.maximum(latest, 0), 1) == s.segment_ids
    code = ord('a') + jnp.take_along_axis(shade, jnp.maximum(latest, 0), 1) // 16
    return jax.nn.one_hot(jnp.where((latest >= 0) & same, code, -1), 257)


class Guesses(Looks):
  """The same without looking."""

  def apply(self, variables, x=None, method=None):
    if method != 'head':
      return jax.nn.one_hot(jnp.full(x.stream.tokens.shape, ord('a')), 257)
    return super().apply(variables, x, method)


def documents(count, pages):
  """Text, image, text, (image, text); shades 16 k, so that none is the blank grey 128."""
  rng = np.random.default_rng(0)
  for i in range(count):
    spans, size = [Text('ab', True)], [(8, 8), (8, 4), (4, 8)][i % 3]
    for shade in (16 * (i % 8), 16 * ((i + 3) % 8))[: 1 + i % 2]:
      picture = Image(np.full((*size, 3), shade, np.uint8))
      words = letter(shade) * 2 + letter(16 * int(rng.integers(8)))
      spans += [picture, Text('prompt', False), Text(words, True)]
    yield Document(tuple(spans), f'page{i % pages}#{i}')
  yield Document((Text('without image', True),), 'plain')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('gain') / 'data'
  with Writer(path, ByteTokenizer()) as writer:
    for document in documents(21, 7):
      writer.add('test', document)
  return path


@pytest.fixture(scope='module')
def data(folder):
  return Dataset(folder, 'test')


def evaluator(data, model=None, devices=1, **fields):
  mesh = sharding.make_mesh({'data': -1}, jax.devices()[:devices])
  fields = {'media_rules': {'image': RULE}, 'rows': 8, 'budget': BUDGET, **fields}
  return Gain(data, model or Looks(), mesh, sharding.rules_for('dp'), **fields)


def by_hand(data, result):
  """The losses of each document, one token at a time."""
  nothing, bonus = math.log(257), math.log(256 + math.e**3)
  for record in result.predictions:
    document = data[record['index']]
    sums = dict.fromkeys(('right', 'shuffled', 'blank', 'all'), 0.0)
    tokens, tokens_all, seen, first = 0, 0, 0, True
    others = []
    if record['shuffled_from'] is not None:
      others = result.pictures(record['shuffled_from'])
    shown = {}
    for span in document.spans:
      if isinstance(span, Image):
        right = result.pictures(record['index'])[seen][0, 0, 0]
        other = others[seen % len(others)][0, 0, 0]
        shown = {'right': right, 'shuffled': other, 'blank': 128}
        seen += 1
      elif span.trained:
        for code in [*span.text.encode(), 256]:
          if first:  # nothing stands before it
            first = False
            continue
          loss = {
            k: bonus - 3.0 * (code == ord(letter(shown[k]))) if shown else nothing
            for k in ('right', 'shuffled', 'blank')
          }
          tokens_all += 1
          sums['all'] += loss['right']
          if shown:
            tokens += 1
            for k, value in loss.items():
              sums[k] += value
    assert (record['tokens'], record['tokens_all']) == (tokens, tokens_all)
    got = [record[k] for k in ('loss', 'loss_shuffled', 'loss_blank', 'loss_all')]
    np.testing.assert_allclose(got, list(sums.values()), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope='module')
def found(data):
  return evaluator(data).run({})


def test_losses_are_those_by_hand(data, found):
  assert [r['index'] for r in found.predictions] == list(range(22))
  by_hand(data, found)
  for r in found.predictions[:-1]:
    other = found.predictions[r['shuffled_from']]['document']
    assert other.partition('#')[0] != r['document'].partition('#')[0]
  assert found.predictions[-1]['shuffled_from'] is None
  m = found.metrics
  assert m['gain/documents'] == 22 and m['gain/tokens_all'] > m['gain/tokens'] > 100
  for name in ('shuffled', 'blank'):
    difference = m[f'gain/loss_{name}'] - m['gain/loss']
    np.testing.assert_allclose(m[f'gain/{name}_minus_right'], difference, rtol=1e-6)
    assert 0 < m[f'gain/{name}_minus_right_low'] < difference
    assert difference < m[f'gain/{name}_minus_right_high']
  np.testing.assert_allclose(m['gain/perplexity'], math.exp(m['gain/loss']))
  assert found.verdict()[0] and 'Its images help: +' in found.verdict()[1]


@pytest.mark.parametrize('rows, devices', [(1, 1), (5, 1), (8, 8)])
def test_rows_and_devices_change_nothing(data, found, rows, devices):
  again = evaluator(data, rows=rows, devices=devices).run({})
  assert again.predictions == found.predictions
  assert again.same_as(found.predictions) == '22 documents in common, identical losses'


def test_a_model_that_does_not_look_gains_exactly_nothing(data):
  result = evaluator(data, Guesses()).run({})
  for name in ('shuffled', 'blank'):
    for end in ('', '_low', '_high'):
      assert result.metrics[f'gain/{name}_minus_right{end}'] == 0.0
  assert result.verdict()[0] is False
  assert 'No sign that its images help: +0.0000' in result.page(0, 'gain')


def test_limit_is_for_scheduled_runs(data, found):
  limited = evaluator(data, limit=5)
  assert limited.run({}).metrics['gain/documents'] == 5
  assert limited.run({}, full=True).predictions == found.predictions
  assert limited._step._cache_size() == 1


class Broken:
  """Some documents can't be read."""

  def __init__(self, data, broken):
    self.data, self.broken = data, broken
    self.index, self.tokenizer = data.index, data.tokenizer

  def __len__(self):
    return len(self.data)

  def __getitem__(self, i):
    if i in self.broken:
      raise BadDocument('unreadable_record', 'for the test')
    return self.data[i]


def test_what_cannot_be_read_or_does_not_fit_is_counted(data, found):
  result = evaluator(Broken(data, {3})).run({})
  lost = 22 - len(result.predictions)
  # Its partner in the circle has no other images then.
  assert 1 <= lost <= 2 and result.metrics['gain/left_out'] == lost
  by_hand(data, result)
  small = Budget(30, 20, {'image': BankBudget(12, 1, 48)})
  result = evaluator(data, budget=small).run({})
  assert result.metrics['gain/left_out'] == 10  # those with two images
  by_hand(data, result)


def test_a_transformer_packed_with_others_gives_the_losses_of_each_alone(data):
  model = Unified(
    vocab_size=257, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8,
    mlp_dim=32, media=(('image', 48),),
  )  # fmt: skip
  params = jax.jit(model.init)({'params': jax.random.key(0)}, BUDGET.empty(1))['params']
  packed = evaluator(data, model, devices=4).run(params)
  alone = Budget(40, 24, {'image': BankBudget(8, 2, 48)})  # one document in a row
  single = evaluator(data, model, budget=alone).run(params)
  assert len(packed.predictions) == len(single.predictions) == 22
  for one, other in zip(packed.predictions, single.predictions):
    for key in ('loss', 'loss_shuffled', 'loss_blank', 'loss_all'):
      np.testing.assert_allclose(one[key], other[key], rtol=1e-4)
  assert packed.metrics['gain/loss'] != packed.metrics['gain/loss_shuffled']


def test_donors():
  pages = [f'p{i % 5}' for i in range(30)]
  got = donors(pages, [i % 6 > 0 for i in range(30)])
  for i, j in enumerate(got):
    assert (j is None) == (i % 6 == 0)
    assert j is None or (pages[i] != pages[j] and j % 6 > 0)
  assert got == donors(pages, [i % 6 > 0 for i in range(30)])
  assert donors(['a'], [False]) == [None]
  with pytest.raises(ValueError, match="all images are of one page, 'a'"):
    donors(['a', 'a', 'b'], [True, True, False])


def test_refuses(data):
  for name in ('rows', 'limit'):
    with pytest.raises(ValueError, match=f'eval.gain.{name} = 0'):
      evaluator(data, **{name: 0})
  with pytest.raises(ValueError, match='needs images'):
    evaluator(data, media_rules={})
  plain = Broken(data, set())
  plain.data = [Document((Text('ab', True),), str(i)) for i in range(22)]
  plain.index = dataclasses.replace(
    data.index,
    item_offsets=np.zeros(23, np.int64),
    item_kind=data.index.item_kind[:0],
    item_size=data.index.item_size[:0],
  )
  with pytest.raises(ValueError, match='step 7: no token of 22 documents may see an'):
    evaluator(plain).run({}, 7)


def test_summary_of_little_has_no_interval():
  record = dict(document='a#1', tokens=2, tokens_all=3, loss=2.0, loss_shuffled=3.0,
                loss_blank=2.0, loss_all=4.0)  # fmt: skip
  got = summarise([record, {**record, 'document': 'a#2'}])
  assert got['gain/shuffled_minus_right'] == 0.5
  assert math.isnan(got['gain/shuffled_minus_right_low'])
  assert got['gain/loss_all'] == 4 / 3


def test_page_has_figures_in_place_and_tokens_in_colour(data, found, tmp_path):
  page = found.page(12, 'docs')
  assert 'http' not in page and not re.search(r'(src|href)\s*=', page)
  assert 'Its images help: +' in page and '>page' in page
  cards = re.findall(r'<article class="card">.*?</article>', page, re.S)
  assert len(cards) == sum(r['tokens'] > 0 for r in found.predictions)
  sums = [float(re.search(r'title="(\S+) nats', card)[1]) for card in cards]
  assert sums[:20] == sorted(sums[:20], reverse=True)
  # 'ab', image, prompt, and the right letter twice: both gain about 3 nats.
  best = next(r for r in found.predictions if r['index'] % 2 == 0 and r['tokens'])
  card = next(c for c in cards if f'{best["document"]}</h3>' in c)
  body = card[card.index('<div class="body">') :]
  assert body.index('ab') < body.index('class="pic') < body.index('prompt')
  assert '<span class="u">ab</span>' in body
  assert re.search(r'<span class="g6" title="\+3.0.">\w</span>', page)
  assert page.count('data:image/png') == len(set(re.findall(r'class="pic (p\d+)"', page)))
  paths = report.write(tmp_path, 12, {'docs': found})
  assert paths['html/docs'].name == '12.docs.html' and 'html' not in paths
  assert paths['html/docs'].read_text() == page
  table = report.table({'docs': found})
  assert 'Its images help: +' in table and f'{found.metrics["gain/loss"]:.4f}' in table
  before = report.read(tmp_path, 12)
  assert 'identical losses' in report.same_predictions({'docs': found}, before)
  before['results']['docs']['predictions'][0]['loss'] += 1
  assert '1 of them differ' in report.same_predictions({'docs': found}, before)


def test_runs_keep_characters_whole_and_escape():
  decode = ByteTokenizer().decode
  ids = list('aé<b'.encode())
  got = gain_page.runs(ids, [None, 0.5, 0.5, -0.1, -9.0], decode)
  assert got == [
    ('a', 'u', ''),
    ('é', 'g4', '+1.00'),
    ('<', '', ''),
    ('b', 'l6', '-9.00'),
  ]
  assert gain_page.runs(list(b'abc'), [0.0, 0.1, None], decode) == [
    ('ab', '', ''),
    ('c', 'u', ''),
  ]
  assert ''.join(r[0] for r in gain_page.runs([0xC3], [0.0], decode)) == '\ufffd'


def test_is_built_from_a_config(folder, tmp_path):
  config = config_lib.resolve(
    ConfigDict(
      dict(
        data=dict(
          source='none', path=str(shutil.copytree(folder, tmp_path / 'data')), rows=8,
          image=dict(patch=4, resize='longest', size=8),
          budget=dict(stream=96, targets=64, image=dict(patches=12, items=6)),
        ),
        eval=dict(gain=dict(every=2, limit=4, rows=8)),
      )
    )
  )  # fmt: skip
  mesh, rules = sharding.make_mesh({}), sharding.rules_for('dp')
  [built] = build_evaluators(config, model=Looks(), mesh=mesh, rules=rules).values()
  assert (built.every, built.limit, built.budget) == (2, 4, BUDGET)
  assert built.run({}).metrics['gain/documents'] == 4
  config.eval.gain.budgets = 3
  with pytest.raises(ValueError, match="eval.gain has no field 'budgets'"):
    build_evaluators(config, model=Looks(), mesh=mesh, rules=rules)
