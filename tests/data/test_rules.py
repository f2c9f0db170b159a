"""Rules: what they take out, what they drop, and the places of images."""

import collections
import dataclasses
import io
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import PIL.Image
import pytest

from mmjax.data import report
from mmjax.data import rules as rules_lib
from mmjax.data.document import Audio, BadDocument, Document, Image, Text
from mmjax.data.prepare import prepare
from mmjax.data.rules import Rules, build
from mmjax.data.store import Dataset
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.data.writer import measure


def picture(height, width, form='PNG'):
  file = io.BytesIO()
  PIL.Image.new('RGB', (width, height), 'red').save(file, form)
  return Image(file.getvalue())


def page(*spans, id='p'):
  return Document(tuple(Text(s, True) if isinstance(s, str) else s for s in spans), id)


def dropped(rules, document, **more):
  with pytest.raises(BadDocument) as error:
    rules.apply(document, **more)
  assert '\n' not in str(error.value)
  return error.value.reason


def reasons(out):
  return [error.reason for error in out]


@pytest.mark.parametrize(
  'rules, size, reason',
  [
    (Rules(min_side=5), (4, 9), 'image_small'),
    (Rules(min_side=5), (5, 9), None),
    (Rules(max_side=8), (4, 9), 'image_large'),
    (Rules(max_side=9), (4, 9), None),
    (Rules(max_aspect=2.0), (9, 4), 'image_thin'),
    (Rules(max_aspect=2.25), (9, 4), None),
    (Rules(max_aspect=2.0), (4, 9), 'image_thin'),
  ],
)
@pytest.mark.parametrize('encoded', [True, False])
def test_images_outside_are_taken_out_of_pages(rules, size, reason, encoded):
  image = picture(*size) if encoded else Image(np.zeros((*size, 3), np.uint8))
  good = picture(6, 6)
  document = page('a', image, 'b', good)
  kept, out = rules.apply(document)
  assert reasons(out) == ([reason] if reason else [])
  spans = document.spans
  assert kept.spans == ((spans[0], *spans[2:]) if reason else spans)
  # What asks about its image is nothing without it.
  asks = Document((image, Text('q'), Text('a', True)), 'q')
  branches = Document((image, Text('a', True, 1), Text('b', True, 2)), 'b')
  for one in (asks, branches):
    if reason:
      assert dropped(rules, one) == reason
    else:
      assert rules.apply(one) == (one, [])
  if reason:  # and a page that was to show something isn't one any more
    assert dropped(rules, page('a', image)) == 'few_images'
    sound = Audio(np.zeros(9, np.float32), 8000)
    assert rules.apply(page('a', image, sound))[0].spans[1:] == (sound,)
  assert rules.apply(page('a')) == (page('a'), [])


def test_junk_is_no_small_image():
  assert dropped(Rules(min_side=5), page('a', Image(b'junk'))) == 'not_image'
  junk = page('a', Image(b'junk'))
  assert Rules().apply(junk)[0] is junk or Rules().apply(junk)[0] == junk


@pytest.mark.parametrize(
  'rules, reason',
  [
    (Rules(min_words=5), 'few_words'),
    (Rules(min_words=4), None),
    (Rules(max_words=3), 'many_words'),
    (Rules(max_words=4), None),
    (Rules(min_characters=12), 'few_characters'),
    (Rules(min_characters=11), None),
    (Rules(max_characters=10), 'many_characters'),
    (Rules(max_characters=11), None),
    (Rules(min_images=3), 'few_images'),
    (Rules(min_images=2), None),
    (Rules(max_images=1), 'many_images'),
    (Rules(max_images=2), None),
    (Rules(max_words_per_image=1.9), 'much_text'),
    (Rules(max_words_per_image=2), None),
  ],
)
def test_limits_of_a_document(rules, reason):
  document = page('one two', picture(4, 4), picture(4, 4), 'a\nb ')
  if reason:
    assert dropped(rules, document) == reason
  else:
    assert rules.apply(document) == (document, [])
  assert rules_lib.counts_of(document) == dict(words=4, characters=11, images=2, media=2)


def test_ratio_is_asked_of_documents_with_images_alone():
  rules = Rules(max_words_per_image=1)
  assert rules.apply(page('a b c'))[1] == []


def test_text_spans_outside_are_taken_out_of_pages():
  rules = Rules(min_span_words=2, max_span_words=3, min_words=4)
  image = picture(4, 4)
  kept, out = rules.apply(page('a b', image, 'share', 'a b c', 'a b c d'))
  assert reasons(out) == ['short_span', 'long_span']
  assert kept.spans == (Text('a b', True), image, Text('a b c', True))
  assert rules.apply(page('a b', 'b', 'a b c'))[0] == page('a b', 'a b c')  # no images
  # The document's own limits are asked afterwards.
  assert dropped(rules, page('a b', image, 'x y z w', 'v')) == 'few_words'
  asks = Document((image, Text('what is it?'), Text('cat', True)), 'q')
  assert dropped(rules, asks) == 'short_span'


def test_scorer_is_asked_of_each_image_and_its_text():
  asked = []

  def scorer(pixels, text):
    asked.append((pixels.shape, pixels.dtype, text))
    return {4: 0.3, 5: 0.29, 6: float('nan')}[pixels.shape[0]]

  a, b, c = picture(4, 7), picture(5, 7), picture(6, 7)
  kept, out = Rules(min_similarity=0.3).apply(page(a, 'x', b, 'y', c), scorer)
  assert kept.spans == (a, Text('x', True), Text('y', True))
  assert reasons(out) == ['image_unlike_text'] * 2
  u8 = np.dtype(np.uint8)
  assert asked == [((4, 7, 3), u8, 'x'), ((5, 7, 3), u8, 'y'), ((6, 7, 3), u8, 'y')]
  assert Rules(min_similarity=0.3).apply(page(a, b), scorer)[1] == []  # no text


def order(document):
  return [s.text if isinstance(s, Text) else s for s in document.spans]


def test_places_of_images():
  a, b, c = 'ABC'
  images = {name: picture(4, 4 + i) for i, name in enumerate('ABC')}

  def placed(where, *names):
    document = page(*(images.get(n, n) for n in names))
    kept, out = Rules(place_images=where, place_share=1.0).apply(document)
    assert out == []
    back = {id(image): name for name, image in images.items()}
    return [s.text if isinstance(s, Text) else back[id(s)] for s in kept.spans]

  assert placed('previous', 'x', a) == [a, 'x']
  assert placed('previous', 'x', a, 'y', b, 'z') == [a, 'x', b, 'y', 'z']
  assert placed('previous', a, 'x', 'y', b, c) == [a, 'x', b, c, 'y']
  assert placed('previous', a, 'x') == [a, 'x']
  assert placed('after', a, 'x') == ['x', a]
  assert placed('after', 'x', a, 'y', b, 'z') == ['x', 'y', a, 'z', b]
  assert placed('after', a, b, 'x', 'y', c) == ['x', a, b, 'y', c]
  rules = Rules(place_images='previous', place_share=1.0)
  sound = Audio(np.zeros(3, np.float32), 1)
  kept = rules.apply(page('x', sound, images[a]))[0]
  assert kept.spans == (Text('x', True), sound, images[a])
  asks = Document((Text('q'), images[a], Text('a', True)))
  assert rules.apply(asks)[0].spans == asks.spans


@hypothesis.given(st.lists(st.sampled_from('TIA'), max_size=9))
def test_placing_keeps_all_spans_and_the_order_of_each_kind(kinds):
  image = picture(4, 4)
  make = {
    'T': lambda i: Text(str(i), True),
    'I': lambda i: dataclasses.replace(image),
    'A': lambda i: Audio(np.zeros(i, np.float32), 1),
  }
  document = page(*(make[kind](i) for i, kind in enumerate(kinds)))
  for where in ('previous', 'after'):
    spans = Rules(place_images=where, place_share=1.0).apply(document)[0].spans
    for kind in (Text, Image, Audio):
      want = [id(s) for s in document.spans if isinstance(s, kind)]
      assert [id(s) for s in spans if isinstance(s, kind)] == want


def test_coins_depend_on_the_seed_and_the_document_alone():
  image = picture(4, 4)
  documents = [page('x', image, id=str(i)) for i in range(2000)]

  def moved(seed, share=0.5):
    rules = Rules(place_images='previous', place_share=share, seed=seed)
    return np.array([rules.apply(d)[0].spans[0] is image for d in documents])

  one, two = moved(1), moved(2)
  np.testing.assert_array_equal(one, moved(1))
  for coins, share in ((one, 0.5), (two, 0.5), (moved(1, 0.1), 0.1), (one == two, 0.5)):
    assert abs(coins.mean() - share) < 4 * np.sqrt(share * (1 - share) / 2000)
  assert not moved(1, 0.0).any() and moved(1, 1.0).all()


@pytest.mark.parametrize(
  'options, match',
  [
    ({'min_sides': 3}, r"unknown rule 'min_sides'; did you mean 'min_side'\?"),
    ({'min_side': '3'}, "min_side='3' must be a number"),
    ({'max_words': True}, 'max_words=True must be a number'),
    ({'min_side': -1}, 'min_side=-1 must be >= 0'),
    ({'max_side': float('nan')}, 'max_side=nan must be >= 0'),
    ({'max_aspect': 0.5}, 'max_aspect=0.5 is long : short side'),
    ({'unique_images': 1}, 'unique_images=1 must be true or false'),
    ({'min_words': 5, 'max_words': 4}, 'min_words=5 is above max_words=4'),
    ({'place_images': 'befor'}, r"place_images='befor' \(choices: after, previous\)"),
    ({'place_share': 2}, 'place_share=2 is no share'),
    ({'seed': 0.5}, 'seed=0.5 must be a whole number'),
  ],
)
def test_wrong_rules_are_one_line(options, match):
  with pytest.raises(ValueError, match=match) as error:
    build(options)
  assert '\n' not in str(error.value)


def test_every_reason_is_told_where_the_rule_is():
  for reason in rules_lib.REASONS:
    assert f"'{reason}'" in Rules.__doc__, reason
  for field in dataclasses.fields(Rules):
    assert field.name in Rules.__doc__, field.name


def test_images_seen_before_go_over_the_whole_source(tmp_path, monkeypatch):
  """Against a loop over all documents, for parts of any size."""
  rng = np.random.default_rng(0)
  for i in range(40):
    (tmp_path / f'{i}.png').write_bytes(picture(4, 4 + i).content)
  lines, documents = [], []
  for n in range(60):
    chosen = rng.integers(0, 40, rng.integers(0, 4)).tolist()
    asks = n % 5 == 0
    spans = [{'image': f'{i}.png'} for i in chosen]
    spans += [{'text': 'q'}] if asks else []
    spans += [{'text': f'a{n}', 'trained': True}]
    lines.append({'spans': spans, 'split': ['train', 'test'][n % 7 == 0]})
    documents.append((chosen, asks, n % 9 == 0))
    if documents[-1][2]:  # too long, so its images have not been seen
      lines[-1]['spans'][-1]['text'] += ' b' * 9
  (tmp_path / 'd.jsonl').write_text('\n'.join(map(json.dumps, lines)))

  seen, want, drops, taken = set(), {'train': {}, 'test': {}}, collections.Counter(), 0
  for n, (chosen, asks, long) in enumerate(documents):
    if long:
      drops['many_words'] += 1
      continue
    stay = [i for k, i in enumerate(chosen) if i not in seen and i not in chosen[:k]]
    if len(stay) < len(chosen):
      if asks or not stay:
        drops['image_repeated' if asks else 'few_images'] += 1
        continue
      taken += len(chosen) - len(stay)
    seen |= set(stay)
    want[lines[n]['split']][str(n + 1)] = [4 + i for i in stay]

  for size in (7, 1000):
    monkeypatch.setattr('mmjax.data.jsonl._LINES', size)
    meta = prepare(
      f'jsonl:{tmp_path / "d.jsonl"}',
      tmp_path / f'out{size}',
      rules={'unique_images': True, 'max_words': 5},
      progress=False,
    )
    assert meta['dropped'] == dict(sorted(drops.items()))
    assert meta['removed'] == {'image_repeated': taken} and taken > 3
    assert meta['rules'] == {'unique_images': True, 'max_words': 5}
    for split, kept in want.items():
      data = Dataset(tmp_path / f'out{size}', split)
      index, got, spans = data.index, {}, 0
      for i in range(len(data)):
        items = slice(index.item_offsets[i], index.item_offsets[i + 1])
        got[data[i].id] = index.item_size[items, 2].tolist()
        spans += len(data[i].spans)
        lengths = measure(data[i], ByteTokenizer())
        assert lengths[:2] == (index.text_tokens[i], index.targets[i])
      assert got == kept
      assert meta['splits'][split]['spans'] == spans
  assert f'removed: {taken} image_repeated' in report.text(meta)


def brightness(pixels, text):
  return pixels.mean() / 255


def test_scorers_go_to_workers_if_they_can(tmp_path):
  for name, colour in (('white', 'white'), ('black', 'black')):
    PIL.Image.new('RGB', (4, 4), colour).save(tmp_path / f'{name}.png')
  with open(tmp_path / 'd.jsonl', 'w') as file:
    for i in range(600):
      spans = [{'image': f'{"black" if i % 100 else "white"}.png'}]
      spans += [{'text': 'a', 'trained': True}]
      file.write(json.dumps({'spans': spans}) + '\n')
  source = f'jsonl:{tmp_path / "d.jsonl"}'
  options = dict(rules={'min_similarity': 0.5}, progress=False)
  with pytest.raises(ValueError, match="can't be sent to worker .*; choose workers=0"):
    prepare(source, tmp_path / 'o', scorer=lambda *_: 1.0, workers=2, **options)
  meta = prepare(source, tmp_path / 'o', scorer=brightness, workers=2, **options)
  assert meta['splits']['train']['documents'] == 6
  assert meta['dropped'] == {'few_images': 594}  # by the rules, so none was unusable
  assert meta['scorer'].endswith('test_rules.brightness')
  with pytest.raises(ValueError, match='was prepared with scorer='):
    prepare(source, tmp_path / 'o', scorer=lambda *_: 1.0, **options)
  for more in (dict(options), dict(scorer=brightness, progress=False)):
    with pytest.raises(ValueError, match='min_similarity need each other'):
      prepare(source, tmp_path / 'p', **more)
