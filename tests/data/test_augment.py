import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmjax.data import augment
from mmjax.data.document import Document, Image, Text
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.data.writer import measure

PICTURE = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
TURNS = Document(
  (
    Image(PICTURE),
    *(span for i in range(6) for span in (Text(f'q{i}'), Text(f'a{i}', True))),
  ),
  meta={'types': list('abcdef'), 'origin': 'here'},
)


def texts(document):
  return [s.text for s in document.spans if isinstance(s, Text)]


def shuffled(document, *seed):
  return augment.apply(augment.build(['shuffle_turns']), document, *seed)


SPANS = st.lists(st.sampled_from(['prompt', 'answer', 'image']), min_size=1, max_size=12)


@given(SPANS, st.integers(0, 99))
def test_shuffling_keeps_every_span_and_all_lengths(kinds, seed):
  document = Document(
    (
      Text('start', True),
      *(
        Image(PICTURE) if kind == 'image' else Text(f'{kind}{i}', kind == 'answer')
        for i, kind in enumerate(kinds)
      ),
    )
  )
  new = shuffled(document, seed)
  assert sorted(texts(new)) == sorted(texts(document))
  assert measure(new, ByteTokenizer()) == measure(document, ByteTokenizer())
  old, order = document.spans, {id(span): i for i, span in enumerate(document.spans)}
  for place, span in enumerate(new.spans):
    if not isinstance(span, Text):
      assert order[id(span)] == place  # media stay where they are
    elif span.trained and order[id(span)] and isinstance(old[order[id(span)] - 1], Text):
      assert new.spans[place - 1] is old[order[id(span)] - 1]  # and answers follow


def test_turns_change_places_with_their_answers_and_by_epoch():
  orders = {tuple(texts(shuffled(TURNS, 0, 7, epoch))) for epoch in range(20)}
  assert len(orders) > 15
  firsts = {order[0] for order in orders}
  assert firsts == {f'q{i}' for i in range(6)}
  for order in orders:
    assert all(q[1] == a[1] for q, a in zip(order[::2], order[1::2]))
  assert texts(shuffled(TURNS, 0, 7, 3)) == texts(shuffled(TURNS, 0, 7, 3))
  assert shuffled(TURNS, 1).meta == {'origin': 'here'}  # types were in the old order


def test_mirror_turns_half_of_the_images_around():
  mirror = augment.build(['mirror'])
  seen = [augment.apply(mirror, TURNS, 0, i).spans[0].content for i in range(200)]
  turned = [not np.array_equal(image, PICTURE) for image in seen]
  assert 70 < sum(turned) < 130
  assert all(
    np.array_equal(image, PICTURE[:, ::-1] if t else PICTURE)
    for image, t in zip(seen, turned)
  )


@pytest.mark.parametrize('text', ['on the LEFT?', 'rightmost', 'a left-hand drive'])
def test_mirror_leaves_alone_what_speaks_of_sides(text):
  document = Document((Image(PICTURE), Text(text), Text('yes', True)))
  mirror = augment.build(['mirror'])
  assert all(augment.apply(mirror, document, i) is document for i in range(20))


def test_without_names_nothing_happens_and_a_wrong_one_is_told():
  assert augment.apply(augment.build(()), TURNS, 0) is TURNS
  with pytest.raises(ValueError, match="unknown augmentation 'miror'; did you mean 'mir"):
    augment.build(['miror'])
