import numpy as np
import pytest

from mmjax.data import augment
from mmjax.data.document import Document, Image, Text

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
