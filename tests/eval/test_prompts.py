"""Prompts are checked against examples that are built one by one, without sharing."""

import dataclasses
import functools
import io

import numpy as np
import PIL.Image
import pytest

from mmjax.data import chat, fewshot
from mmjax.data.document import Document, Image, Text
from mmjax.data.example import to_example
from mmjax.data.media import ImageRule
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.eval.prompts import collect, derange, questions, spread

RULE = ImageRule(patch=4, resize='longest', size=16)
EXAMPLE = functools.partial(
  to_example,
  tokenizer=ByteTokenizer(),
  rules={'image': RULE},
  slots=lambda item: item.grid,
)


def _image(shade, height=16, width=16):
  file = io.BytesIO()
  array = np.full((height, width, 3), shade, np.uint8)
  PIL.Image.fromarray(array).save(file, 'PNG')
  return Image(file.getvalue())


def _data(count=12, sizes=((16, 16), (8, 16), (16, 12))):
  """Documents of 1 to 4 turns about one image of a shade of its own."""
  documents = []
  for i in range(count):
    spans = [_image(i, *sizes[i % len(sizes)])]
    for k in range(1 + i % 4):
      spans += [Text(f'shade{"?" * k} ', False), Text(f' a{i}', True)]
    documents.append(Document(tuple(spans), f'd{i}'))
  return documents


def _same(a, b):
  for field in (
    'tokens',
    'order',
    'first',
    'last',
    'until',
    'positions',
    'weights',
    'source',
  ):
    np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
  assert list(a.media) == list(b.media)
  for kind in a.media:
    for field in ('values', 'positions', 'items', 'item_order'):
      np.testing.assert_array_equal(
        getattr(a.media[kind], field), getattr(b.media[kind], field)
      )


def test_questions_stand_alone_and_no_gold_answer_is_in_sight():
  one, two = _image(0), _image(16)
  document = Document(
    (one, Text('q1', False), Text(' a1 ', True), two, Text('q2', False), Text('a2', True),
     Text('a3', True)),
    meta={'types': ['x', 'y']},
  )  # fmt: skip
  found = questions(document)
  assert [(q.text, q.answer, q.turn, q.type) for q in found] == [
    ('q1', 'a1', 0, 'x'),
    ('q2', 'a2', 1, 'y'),
    ('', 'a3', 2, ''),
  ]
  assert [q.media for q in found] == [(0,), (0, 1), (0, 1)]


def test_a_question_is_asked_with_the_media_of_the_trunk_and_of_its_branch():
  document = Document(
    (_image(0), Text('q1', False, 1), Text('a1', True, 1), _image(16),
     dataclasses.replace(_image(32), branch=2), Text('q2', False, 2), Text('a2', True, 2),
     Text('a3', True)),
  )  # fmt: skip
  assert [(q.text, q.media) for q in questions(document)] == [
    ('q1', (0,)),
    ('q2', (0, 1, 2)),
    ('', (0, 1)),
  ]
  asked, pool, bad = collect([document], EXAMPLE)
  assert not bad
  for q, shades in zip(asked, ([0], [0, 16, 32], [0, 16])):
    values = pool[q.own].media['image'].values
    assert np.unique(values).tolist() == shades


def test_prompts_are_the_training_examples_up_to_the_answer():
  # Not a slot more or less than what training shows before the first answer.
  data = _data()
  asked, pool, bad = collect(data, EXAMPLE)
  assert not bad
  for q in asked:
    if q.record['turn'] == 0:
      document = data[q.record['index']]
      whole = EXAMPLE(Document(document.spans[:3]))
      n = len(whole) - len(document.spans[2].text) - 1  # and its end token
      prompt = pool[q.own]
      assert len(prompt) == n
      for field in ('tokens', 'order', 'first', 'last', 'until', 'positions', 'source'):
        np.testing.assert_array_equal(getattr(prompt, field), getattr(whole, field)[:n])
      assert not prompt.weights.any()


def test_every_prompt_equals_one_built_alone():
  # The pool shares patches and layouts between prompts; nothing may show of it.
  data = _data()
  asked, pool, _ = collect(data, EXAMPLE)

  def alone(image, text):
    whole = EXAMPLE(Document((image, Text(text, False), Text('', True))))
    fields = [f for f in vars(whole) if f != 'media']
    cut = {f: getattr(whole, f)[:-1] for f in fields}
    return type(whole)(**cut, media=whole.media)

  for q in asked:
    document, other = data[q.record['index']], data[q.record['shuffled_from']]
    text = document.spans[1 + 2 * q.record['turn']].text
    assert text.strip() == q.record['question']
    grid = RULE.grid(
      *np.asarray(PIL.Image.open(io.BytesIO(document.spans[0].content))).shape[:2]
    )
    grey = _image(128, 4 * grid[1], 4 * grid[2])
    _same(pool[q.own], alone(document.spans[0], text))
    _same(pool[q.shuffled], alone(other.spans[0], text))
    _same(pool[q.blank], alone(grey, text))


@pytest.mark.parametrize('n', [2, 3, 10, 1000])
def test_derangement_is_one_and_the_same_each_time(n):
  partners = derange(['image'] * n)
  assert sorted(partners) == list(range(n))
  assert all(i != p for i, p in enumerate(partners))
  assert partners == derange(['image'] * n)
  assert n < 10 or partners != derange(['image'] * n, seed=1)


def test_derangement_stays_inside_groups():
  groups = ['a', 'b', 'a', 'c', 'b', 'a']
  partners = derange(groups)
  assert partners[3] is None
  rest = [i for i in range(6) if i != 3]
  assert all(groups[partners[i]] == groups[i] and partners[i] != i for i in rest)
  assert sorted(partners[i] for i in rest) == rest


@pytest.mark.parametrize('count, limit', [(10, 3), (10, 10), (10, 99), (9673, 1000)])
def test_limit_spreads_over_the_data(count, limit):
  chosen = spread(count, limit)
  assert len(chosen) == len(set(chosen)) == min(count, limit)
  gaps = np.diff([*chosen, count])
  assert gaps.max() - gaps.min() <= 1
  assert spread(count, None) == list(range(count))


def test_equal_prompts_and_equal_pictures_are_kept_once():
  asked, pool, _ = collect(_data(12, sizes=((16, 16),)), EXAMPLE)
  assert len(asked) == sum(1 + i % 4 for i in range(12))
  shown = {(q.record[k], q.record['question'])
           for q in asked for k in ('index', 'shuffled_from')}  # fmt: skip
  assert len(pool) == len(shown) + 4  # four questions of a grey image
  assert len({id(e.media['image']) for e in pool}) == 12 + 1


def test_swapped_media_go_around_when_the_other_document_has_fewer():
  ask = [Text('last? ', False), Text('a', True)]
  data = [
    Document((*map(_image, (16, 32, 48)), *ask)),
    Document((*map(_image, (64, 80)), *ask)),
  ]
  asked, pool, _ = collect(data, EXAMPLE)

  def shades(place):
    values = pool[place].media['image'].values
    return values[::16, 0].tolist()

  assert [[shades(p) for p in (q.own, q.shuffled, q.blank)] for q in asked] == [
    [[16, 32, 48], [64, 80, 64], [128, 128, 128]],
    [[64, 80], [16, 32], [128, 128]],
  ]


def _example_up_to(document, answers):
  """The example of a document without the slots of so many answer tokens at its end."""
  whole = EXAMPLE(document)
  fields = [f.name for f in dataclasses.fields(whole) if f.name != 'media']
  return dataclasses.replace(whole, **{f: getattr(whole, f)[:-answers] for f in fields})


def test_a_dialogue_is_asked_with_its_template_and_earlier_turns():
  turns = [chat.Turn('system', 'be brief'), chat.Turn('user', (_image(7), 'what?')),
           chat.Turn('assistant', 'cat'), chat.Turn('user', (_image(9), 'and?')),
           chat.Turn('assistant', 'dog')]  # fmt: skip
  end = ByteTokenizer().end_name
  template = dataclasses.replace(chat.TEMPLATES['plain'], user=('U:', '\n'))
  data = [chat.document(turns, template)]
  asked, pool, bad = collect(data, EXAMPLE, end=end)
  assert not bad
  assert [q.record['question'] for q in asked] == ['what?', 'and?']
  for q, upto in zip(asked, (3, 5)):
    want = chat.document(turns[:upto], template)
    prompt, want = pool[q.own], _example_up_to(want, len('cat') + 1)
    for field in ('tokens', 'order', 'last', 'until', 'positions', 'source'):
      np.testing.assert_array_equal(getattr(prompt, field), getattr(want, field))
    for field in ('values', 'items', 'item_order'):
      np.testing.assert_array_equal(
        getattr(prompt.media['image'], field), getattr(want.media['image'], field)
      )


def test_supports_stand_before_all_three_prompts_and_hold_other_answers():
  class Data(list):
    tokenizer = ByteTokenizer()

  data = Data(_data(6))
  shots = fewshot.build(data, 2, seed=3)
  asked, pool, bad = collect(data, EXAMPLE, shots.before, Data.tokenizer.end_name)
  assert not bad and len(asked) == sum(1 + i % 4 for i in range(6))
  for q in asked:
    index, turn = q.record['index'], q.record['turn']
    front = shots.before(index)
    spans = data[index].spans
    want = (*front, spans[0], *spans[1 + 2 * turn : 3 + 2 * turn])
    want = _example_up_to(Document(want), len(spans[2].text) + 1)
    for name in ('tokens', 'order', 'positions'):
      np.testing.assert_array_equal(getattr(pool[q.own], name), getattr(want, name))
    np.testing.assert_array_equal(
      pool[q.own].media['image'].values, want.media['image'].values
    )
    text = Data.tokenizer.decode(t for t in pool[q.own].tokens.tolist() if t >= 0)
    assert f' a{index}' not in text and text.count(' a') >= 2
    n = len(EXAMPLE(Document((*front, Text('', True)))).media['image'].values)
    for other in (q.shuffled, q.blank):  # only the last image is another
      a, b = (pool[place].media['image'].values for place in (q.own, other))
      assert np.array_equal(a[:n], b[:n]) and len(pool[other].tokens) >= n
    assert (pool[q.blank].media['image'].values[n:] == 128).all()
