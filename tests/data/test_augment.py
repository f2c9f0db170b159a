import pickle

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.data import augment, document, media
from mmjax.data.document import BadDocument, Document, Image, Text
from mmjax.data.media import ImageRule

PICTURE = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
TURNS = Document(
  (
    Image(PICTURE),
    *(span for i in range(6) for span in (Text(f'q{i}'), Text(f'a{i}', True))),
  ),
  meta={'types': list('abcdef'), 'origin': 'here'},
)


def seen(document):
  """The first image as it is to be seen."""
  return media.pixels(document.spans[0])


def picture(height, width):
  rng = np.random.default_rng(height * 1000 + width)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


def test_mirror_turns_half_of_the_images_around():
  mirror = augment.build(['mirror'])
  images = [seen(augment.apply(mirror, TURNS, 0, i)) for i in range(200)]
  turned = [not np.array_equal(image, PICTURE) for image in images]
  assert 70 < sum(turned) < 130
  assert all(
    np.array_equal(image, PICTURE[:, ::-1] if t else PICTURE)
    for image, t in zip(images, turned)
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
  same, again, other = map(seen, made)
  assert same.shape == image.shape and same.dtype == np.uint8
  np.testing.assert_array_equal(same, again)
  assert np.any(same != other) and np.any(same != image)
  assert (same[0, 0] == 255).all()  # the ground stays white
  assert made[0].spans[1:] == document.spans[1:] and made[0].meta == document.meta
  ink = [np.argwhere((seen(m) < 250).any(-1)).mean(0) for m in made]
  assert np.abs(ink - np.array([7.5, 11.5])).max() < 5


def test_warp_without_amounts_is_the_image():
  image = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)
  made = augment.apply([augment.Warp(0, 1, 1, 0)], Document((Image(image),)), 0)
  np.testing.assert_array_equal(seen(made), image)


def test_colours_are_the_formula_s():
  """Darkness: a factor per channel, then saturation around the mean, then contrast."""
  image = picture(9, 7)
  made = augment.apply([augment.Colour(1.3, 1.6, 1.25)], Document((Image(image),)), 5)
  rng = np.random.default_rng((5,))
  dark = (255.0 - image) * 1.3 ** rng.uniform(-1, 1, 3)
  grey = dark.mean(-1, keepdims=True)
  dark = grey + 1.6 ** rng.uniform(-1, 1) * (dark - grey)
  want = 255 - dark * 1.25 ** rng.uniform(-1, 1)
  np.testing.assert_allclose(seen(made), want.clip(0, 255), atol=1)


ALL = (
  'mirror',
  {'name': 'crop', 'scale': [0.2, 0.9]},
  {'name': 'warp', 'turn': 40},
  'colour',
  {'name': 'randaugment', 'count': 3, 'strength': 0.8},
)


@settings(max_examples=50)
@given(
  st.lists(st.sampled_from(ALL), max_size=5),
  st.integers(1, 70),
  st.integers(1, 70),
  st.integers(0, 99),
)
def test_no_augmentation_changes_a_grid_and_each_is_a_function_of_its_seed(
  names, height, width, seed
):
  image = picture(height, width)
  before = image.copy()
  whole = Document((Text('what?'), Image(image), Text('a', True), Image(image[::-1])))
  rules = [
    ImageRule(8, 'native', max_patches=12, resample='area'),
    ImageRule(8, 'longest', 40),
  ]
  made = [augment.apply(augment.build(names), whole, 1, s) for s in (seed, seed)]
  made.append(pickle.loads(pickle.dumps(made[0])))
  for i in (1, 3):
    for rule in rules:
      grids, patches = zip(*(rule.patches_of(m.spans[i]) for m in made))
      assert set(grids) == {rule.grid(height, width)}
      np.testing.assert_array_equal(patches[0], patches[1])
      np.testing.assert_array_equal(patches[0], patches[2])
    assert media.native_size(made[0].spans[i]) == (1, height, width)
  assert made[0].spans[::2] == whole.spans[::2]
  np.testing.assert_array_equal(image, before)


def test_each_image_of_a_document_is_drawn_for_itself():
  twice = Document((Image(picture(20, 20)),) * 2)
  for name in ALL[1:]:
    made = augment.apply(augment.build([name]), twice, 3)
    assert not np.array_equal(*map(media.pixels, made.spans))


def test_crops_are_parts_of_the_image_of_the_size_asked_for():
  # Each pixel says where it is from.
  rows, cols = np.indices((100, 160), np.uint8)
  image = np.stack([rows, cols, rows], -1)
  crop = augment.build([{'name': 'crop', 'scale': (0.3, 0.6), 'ratio': (0.8, 1.25)}])
  corners, shares = [], []
  for i in range(300):
    part = seen(augment.apply(crop, Document((Image(image),)), i))
    h, w, _ = part.shape
    y, x = part[0, 0, :2].astype(int)
    np.testing.assert_array_equal(part, image[y : y + h, x : x + w])
    corners.append([y / max(100 - h, 1), x / max(160 - w, 1)])
    shares.append(h * w / 16000)
    assert 0.78 < (h / w) / (100 / 160) < 1.28
  assert 0.28 < min(shares) < 0.33 and 0.57 < max(shares) < 0.62
  # Every place is as likely as any other: up to the edges, 0.5 in the mean.
  assert np.min(corners, 0).max() < 0.05 and np.max(corners, 0).min() > 0.95
  np.testing.assert_allclose(np.mean(corners, 0), 0.5, atol=0.06)


def test_a_crop_of_a_scaled_jpeg_is_that_of_the_whole():
  import io

  file = io.BytesIO()
  smooth = PIL.Image.fromarray(picture(5, 7)).resize((700, 500), PIL.Image.BICUBIC)
  smooth.save(file, 'JPEG', quality=95)
  crop = augment.build([{'name': 'crop', 'scale': (0.3, 0.5)}])
  made = augment.apply(crop, Document((Image(file.getvalue()),)), 0).spans[0]
  grid, fast = ImageRule(16, size=112, resample='area').patches_of(made)
  want_grid, want = ImageRule(16, size=112).patches_of(made)
  assert grid == want_grid
  assert np.abs(fast.astype(int) - want).mean() < 2


@pytest.mark.parametrize('name', augment.OPERATIONS)
def test_operations_of_randaugment(name):
  image = PIL.Image.fromarray(np.tile(picture(1, 24), (16, 1, 1)) // 2 + 40)
  change = augment.OPERATIONS[name]
  made = [np.asarray(change(image, x)) for x in (0, 0.3, -1, 1)]
  assert {m.shape for m in made} == {(16, 24, 3)}
  if name not in ('autocontrast', 'equalize'):  # these know no amount
    np.testing.assert_array_equal(made[0], image)
  if name == 'identity':
    np.testing.assert_array_equal(made[3], image)
  elif name not in ('shear_y', 'move_y'):
    assert np.any(made[3] != image)
  if name.startswith('move_x'):  # 0.45 of 24, what comes in is grey
    assert (made[3][:, -10:] == 128).all() and (made[2][:, :10] == 128).all()
    assert (made[3][:, :13] != 128).any()
  if name == 'posterize':
    assert not np.any(made[3] % 16) and np.any(np.asarray(image) % 16)


def test_all_fourteen_operations_are_drawn():
  drawn = augment.RandAugment(count=2000)._draw(np.random.default_rng(0))
  names, amounts = zip(*drawn.keywords['operations'])
  assert set(names) == set(augment.OPERATIONS) and len(augment.OPERATIONS) == 14
  assert set(np.round(amounts, 9)) == {-0.3, 0.3}


def test_augmented_images_are_never_stored():
  made = augment.apply(augment.build(['colour']), TURNS, 0)
  with pytest.raises(BadDocument, match='never stored'):
    document.encode(made)


@pytest.mark.parametrize(
  'one, message',
  [
    ({'scale': (0.1, 1)}, 'unknown augmentation None'),
    ({'name': 'crop', 'scal': (0.1, 1)}, "'crop' has no 'scal'; did you mean 'scale'"),
    ({'name': 'crop', 'scale': (0.0, 1)}, 'crop: scale=.* least <= most <= 1'),
    ({'name': 'crop', 'scale': (0.5, 1.5)}, 'crop: scale='),
    ({'name': 'crop', 'ratio': (2, 1)}, 'crop: ratio='),
    ({'name': 'randaugment', 'count': 0}, 'randaugment: count=0'),
    ({'name': 'randaugment', 'strength': 1.1}, 'strength=1.1'),
  ],
)
def test_wrong_options_are_one_line(one, message):
  with pytest.raises(ValueError, match=message) as error:
    augment.build([one])
  assert '\n' not in str(error.value)


def test_options_stay_plain_data_in_a_config():
  from ml_collections import ConfigDict

  from mmjax.train import config as lib

  config = lib.defaults()
  config.data.augment = ALL
  again = lib.from_json(lib.to_json(config))
  for data in (config.data, again.data, ConfigDict(config).data):
    assert augment.build(data.augment) == augment.build(ALL)
