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


@pytest.mark.parametrize('name', ['warp', 'colour'])
def test_images_change_a_little_and_the_same_way_for_the_same_seed(name):
  rng = np.random.default_rng(0)
  image = np.full((16, 24, 3), 255, np.uint8)
  image[5:11, 8:16] = rng.integers(0, 200, 3)
  document = Document((Image(image), Text('a box', True)), 'x', {'label': 'box'})
  made = [augment.apply(augment.build([name]), document, 3, 1, e) for e in (0, 0, 1)]
  same, again, other = (m.spans[0].content for m in made)
  assert same.shape == image.shape and same.dtype == np.uint8
  np.testing.assert_array_equal(same, again)
  assert np.any(same != other) and np.any(same != image)
  assert (same[0, 0] == 255).all()  # the ground stays white
  assert made[0].spans[1:] == document.spans[1:] and made[0].meta == document.meta
  ink = [np.argwhere((m.spans[0].content < 250).any(-1)).mean(0) for m in made]
  assert np.abs(ink - np.array([7.5, 11.5])).max() < 5


def test_warp_without_amounts_is_the_image():
  image = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)
  made = augment.apply([augment.Warp(0, 1, 1, 0)], Document((Image(image),)), 0)
  np.testing.assert_array_equal(made.spans[0].content, image)
