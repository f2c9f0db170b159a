"""The report: counts, first examples, histograms."""

import numpy as np
import PIL.Image

from mmjax.data import report
from mmjax.data.store import Index


def index(tokens, sides):
  """sides: of the images of each document."""
  flat = [side for some in sides for side in some]
  return Index(
    np.array(tokens, np.int32),
    np.array(tokens, np.int32),
    np.cumsum([0, *map(len, sides)]),
    np.zeros(len(flat), np.uint8),
    np.array([(1, side, side) for side in flat], np.int32).reshape(-1, 3),
  )


META = {
  'splits': {'train': {'documents': 3, 'text_tokens': 1300, 'shards': []}},
  'removed': {'image_small': 2},
  'removed_first': {'image_small': 'a: 4 x 4'},
  'dropped': {},
  'dropped_first': {},
}


def test_text_shows_counts_and_every_value_once():
  made = {'train': index([100, 200, 1000], [[64], [64, 128], []])}
  assert report.text(META) == (
    'train: 3 documents, 1,300 text tokens\n'
    'removed: 2 image_small\n  first image_small: a: 4 x 4\ndropped: none'
  )
  lines = report.text(META, made).removeprefix(report.text(META) + '\n').split('\n')
  bar = '#' * 30
  assert lines == [
    'train: text tokens of a document',
    f'           64-127 |{bar} 1',
    f'          128-255 |{bar} 1',
    '          256-511 | 0',
    f'        512-1,023 |{bar} 1',
    'train: images of a document',
    f'                0 |{bar} 1',
    f'                1 |{bar} 1',
    f'                2 |{bar} 1',
    'train: image size: square root of height x width',
    f'           64-127 |{bar} 2',
    f'          128-255 |{"#" * 15} 1',
  ]


def test_no_value_falls_out_of_the_histogram():
  rng = np.random.default_rng(0)
  for values in (rng.integers(0, 5000, 99), rng.integers(1, 9, 99), np.array([0, 10**6]),
                 np.array([11]), np.array([16, 32]), rng.random(9) * 5000):  # fmt: skip
    edges = report._edges(values)
    assert np.histogram(values, edges)[0].sum() == len(values)
    assert (np.diff(edges) > 0).all()


def test_picture_has_a_row_for_each_split(tmp_path):
  one = index([100, 200], [[64], [30]])
  report.draw(tmp_path / 'a.png', {'train': one})
  report.draw(tmp_path / 'b.png', {'train': one, 'test': index([1], [[]])})
  wide, high = size(tmp_path / 'a.png')
  assert size(tmp_path / 'b.png') == (wide, 2 * high)


def size(path):
  with PIL.Image.open(path) as image:
    return image.size
