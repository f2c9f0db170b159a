"""The page of a batch: what it holds, and what lights up when someone clicks."""

import functools
import html
import json
import re

import hypothesis
import jax
import numpy as np
import pytest
from browser import Browser
from documents import pack, random_document
from hypothesis import strategies as st

from mmjax import models
from mmjax.batch import AttentionTags, KeyTags, QueryTags, visible
from mmjax.data.media import patchify
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.eval import batch_page, batch_stats
from mmjax.nn.gated_xattn import latent_tags

EVIL = '</script><script>document.title="evil"</script><b id=evil>\'"&'
LM = dict(name='unified', embed_dim=8, num_layers=1, num_heads=1, num_kv_heads=1,
          head_dim=8, mlp_dim=8)  # fmt: skip
VIT = dict(name='vit', embed_dim=8, num_layers=1, num_heads=1, mlp_dim=8)
RESAMPLER = dict(embed_dim=8, num_layers=1, num_heads=1, num_latents=3)
FLAMINGO = dict(name='flamingo', lm=LM, vision=VIT, resampler=RESAMPLER)
MODELS = {
  'unified': LM,
  'encoded': dict(name='encoded', lm=LM, vision=VIT, projector=dict(name='linear')),
  'flamingo': FLAMINGO,
  'flamingo all': FLAMINGO | dict(latest=False, latents_seen=2),
  'late': dict(name='late', lm=LM, vision=VIT | dict(pool='mean')),
  'dual': dict(name='dual', text=LM, vision=VIT, embed_dim=8),
  'encoder': dict(LM, name='encoder'),
}


class Letters:
  """Ids are letters, 39 ends a text."""

  end_id = 39

  def __init__(self, text='abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLM'):
    self.text = text

  def decode(self, ids):
    return ''.join(self.text[i % len(self.text)] for i in ids if i != self.end_id)


@functools.cache
def made(name):
  """(batch, tags, slots) of two rows with branches and several images a document."""
  media = {} if name == 'encoder' else {'media': (('image', 6),)}
  model = models.build(vocab_size=40, **MODELS[name], **media)
  rng = np.random.default_rng(5)
  branched = random_document(rng, 'tititt')
  branched = [(*s, *([] if s[0] == 'image' else [True][len(s) - 2 :])) for s in branched]
  branched[4:] = [(*branched[4][:3], 1), (*branched[5][:3], 2)]
  rows = [
    [random_document(rng, 'it'), branched],
    [random_document(rng, spans) for spans in ('ttit', 't', 'iit')],
  ]
  batch = pack(rows, T=80, P=64, I=8, markers=name.startswith(('flamingo', 'late')))
  batch.stream.tokens[0, np.flatnonzero(batch.stream.tokens[0] > 0)[0]] = Letters.end_id
  tags = jax.device_get(model.attention_tags(batch))
  return batch, tags, getattr(model, 'slots', lambda item: item.grid)


def page_of(name, decode=None, **kwargs):
  batch, tags, slots = made(name)
  return batch_page.page(batch, tags, decode or Letters(), slots, **kwargs)


def data_in(page):
  found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
  return json.loads(found[1])


@pytest.mark.parametrize('name', MODELS)
def test_page_holds_the_tags_of_the_model(name):
  batch, tags, _ = made(name)
  rows = data_in(page_of(name))
  names = {'flamingo': {'cross'}, 'flamingo all': {'cross'}, 'late': {'join'}}
  assert set(tags) == {'self'} | names.get(name, set())
  for b, row in enumerate(rows):
    for field, array in vars(batch.stream).items():
      np.testing.assert_array_equal(row['stream'][field], array[b])
    assert list(row['attentions']) == sorted(tags)
    for name, (query, key) in tags.items():
      for side, want in (('query', query), ('key', key)):
        got = row['attentions'][name][side]
        assert set(got) == set(vars(want))
        for field, array in vars(want).items():
          if array is None:
            assert got[field] is None
          else:
            np.testing.assert_array_equal(got[field], array[b])
  assert len(rows) == 2


@pytest.mark.parametrize('name', MODELS)
def test_each_slot_is_on_the_page_once_in_its_row(name):
  batch, _, _ = made(name)
  sections = re.split(r'<section class="row"', page_of(name))[1:]
  for b, section in enumerate(sections):
    found = [int(x) for x in re.findall(r'data-slot="(\d+)"', section)]
    if name == 'dual':  # its items take no slots
      found = [t for t in found if batch.stream.tokens[b, t] >= 0]
      used = (batch.stream.segment_ids[b] > 0) & (batch.stream.tokens[b] >= 0)
    else:
      used = batch.stream.segment_ids[b] > 0
    assert found == np.flatnonzero(used).tolist()
    items = [int(x) for x in re.findall(r'data-item="(\d+)"', section)]
    assert items == list(range(np.count_nonzero(batch.bank['image'].item_segments[b])))


def test_colours_tell_trained_from_prompt():
  batch, _, _ = made('unified')
  sections = re.split(r'<section class="row"', page_of('unified'))[1:]
  for b, section in enumerate(sections):
    found = re.findall(r'<span class="t trained[^"]*" data-slot="(\d+)"', section)
    weights = batch.stream.weights[b]
    assert [int(x) for x in found] == np.flatnonzero(weights > 0).tolist()


def test_text_is_text():
  page = page_of('unified', Letters(EVIL), title=EVIL)
  assert EVIL not in page and '<b id=evil>' not in page
  shown = re.findall(r'data-slot="\d+">([^<]*)</span>', page)
  assert '<' in map(html.unescape, shown)


def test_rows_are_limited_and_it_says_so():
  page = page_of('unified', rows=1)
  assert len(data_in(page)) == 1 and page.count('<section class="row"') == 1
  assert '1 of them not on this page' in page
  assert 'not on this page (' not in page_of('unified', rows=5)


def test_refuses_keys_that_are_neither_slots_nor_items():
  batch, _, slots = made('unified')
  ones = np.ones((2, 11), np.int32)
  tags = {'cross': AttentionTags(QueryTags(ones, ones, ones), KeyTags(ones, ones))}
  with pytest.raises(ValueError, match='11 keys, which are neither the 80 slots nor'):
    batch_page.page(batch, tags, Letters(), slots)


@hypothesis.settings(max_examples=25)
@hypothesis.given(st.text())
def test_pieces_give_the_text_back(text):
  tokenizer = ByteTokenizer()
  ids = tokenizer.encode(text)
  found = batch_page.pieces([*ids, tokenizer.end_id], tokenizer.decode)
  assert len(found) == len(ids) + 1 and found[-1] is None
  assert ''.join(found[:-1]) == text


def test_picture_is_what_the_patches_are():
  image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
  frames = np.concatenate([patchify(image, 2), patchify(255 - image, 2)])
  np.testing.assert_array_equal(
    batch_page.picture(frames, (2, 2, 3)), np.concatenate([image, 255 - image])
  )
  grey = batch_page.picture(np.array([[-1.0, 0, 1, 0]] * 7, np.float32), (7, 1, 1))
  assert grey.shape == (4, 7, 3) and grey[:, 0, 0].tolist() == [127, 255, 127, 0]


class Loaded:
  def __init__(self, batch, **stats):
    self.batch, self.stats = batch, stats


def test_stats_count_what_is_in_the_batches():
  batch, _, _ = made('unified')
  s = batch.stream
  stats = batch_stats.gather(
    [Loaded(batch, **{'bad/not_image': 2.0, 'fill/stream': 0.1, 'epoch': 1.0})] * 3,
    {'too_long_stream': 4},
  )
  used = s.segment_ids > 0
  np.testing.assert_allclose(stats.fill['stream'], [used.mean()] * 3)
  np.testing.assert_allclose(
    stats.fill['image'], [(batch.bank['image'].items > 0).mean()] * 3
  )
  assert stats.lengths.sum() == 3 * used.sum() and len(stats.lengths) == 15
  assert stats.items['image'].tolist() == [1, 2, 1, 0, 2] * 3
  assert stats.tokens == {
    'trained': 3 * np.count_nonzero(s.weights),
    'prompt': 3 * np.count_nonzero((s.tokens >= 0) & used & (s.weights == 0)),
    'image': 3 * np.count_nonzero(s.tokens < 0),
  }
  assert stats.sums == {'bad/not_image': 6}
  table = stats.table()
  assert re.search(r'too_long_stream +4\n', table)
  assert re.search(r'bad/not_image +6$', table)
  page = page_of('unified', stats=stats)
  assert 'too_long_stream' in page and 'Slots of 15 documents' in page


def test_stats_refuse_nothing():
  batch, _, _ = made('unified')
  empty = jax.tree.map(np.zeros_like, batch)
  for steps in ([], [Loaded(empty)]):
    with pytest.raises(ValueError, match='no document to count'):
      batch_stats.gather(steps)


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  browser = Browser(tmp_path_factory.mktemp('profile'))
  yield browser
  browser.close()


def lit(browser, b):
  """({slots that are lit}, {item: number of its keys}) in row b."""
  script = f"""(() => {{ const row = document.querySelector('#row{b}');
    const all = (q, f) => [...row.querySelectorAll(q)].map(f);
    return [all('.lit', x => Number(x.dataset.slot)),
            all('.seen', x => [Number(x.dataset.item),
                               Number(x.querySelector('.badge').textContent.match(/\\d+/))]),
            document.querySelectorAll('.lit').length]; }})()"""
  slots, items, everywhere = browser.run(script)
  assert everywhere == len(slots)  # nothing in other rows
  return set(slots), {item: keys for item, keys in items}


@pytest.mark.parametrize('name', ['unified', 'flamingo', 'flamingo all', 'late'])
def test_click_lights_what_the_model_may_see(name, browser, tmp_path):
  batch, tags, _ = made(name)
  path = tmp_path / 'page.html'
  path.write_text(page_of(name, Letters(EVIL)), encoding='utf-8')
  browser.requests.clear()
  browser.open(path.as_uri())
  seen = {n: np.asarray(visible(*t)) for n, t in tags.items()}
  [cross] = [x for n, x in seen.items() if n != 'self'] or [np.zeros((2, 80, 8), bool)]
  cross = cross.reshape(2, 80, 8, -1).sum(-1)
  answers = set()
  for b in range(2):
    used = np.flatnonzero(batch.stream.segment_ids[b])
    for t in used[:: max(len(used) // 7, 1)].tolist():
      browser.click(f'#row{b} [data-slot="{t}"]')
      slots, items = lit(browser, b)
      assert slots == set(np.flatnonzero(seen['self'][b, t]).tolist())
      assert items == {i: n for i, n in enumerate(cross[b, t].tolist()) if n}
      answers.add((tuple(sorted(slots)), tuple(items.items())))
  assert len(answers) > 10
  # And the other way: what sees a slot, and what sees an item.
  browser.click('[data-way="seen"]')
  assert lit(browser, 1)[0] == set(np.flatnonzero(seen['self'][1, :, t]).tolist())
  if name != 'unified':
    browser.click('#row1 [data-item="0"] figcaption')
    assert lit(browser, 1)[0] == set(np.flatnonzero(cross[1, :, 0]).tolist()) != set()
  asked = [url for url in browser.requests if not url.startswith('data:')]
  assert asked == [path.as_uri()]
  assert browser.run('document.title') == 'batch'
  assert browser.run('document.querySelectorAll("#evil").length') == 0


def test_padding_lights_nothing_and_a_link_picks(browser, tmp_path):
  batch, tags, _ = made('unified')
  path = tmp_path / 'page.html'
  path.write_text(page_of('unified'), encoding='utf-8')
  t = int(np.flatnonzero(batch.stream.segment_ids[1])[-1])
  browser.open(f'{path.as_uri()}#row=1&slot={t}')
  want = np.flatnonzero(visible(*tags['self'])[1, t]).tolist()
  assert lit(browser, 1)[0] == set(want)
  browser.open(f'{path.as_uri()}?x#row=1&slot=79')  # padding, which isn't shown
  assert lit(browser, 1) == (set(), {})


def test_latents_of_an_item_are_its_own():
  tags = latent_tags(KeyTags(np.array([[1, 2]]), np.array([[0, 1]])), 3)
  assert np.asarray(tags.segment_ids).tolist() == [[1, 1, 1, 2, 2, 2]]
