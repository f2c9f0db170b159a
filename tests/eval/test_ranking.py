import jinja2
import numpy as np
import pytest

from mmjax.eval import report
from mmjax.eval.ranking import Ranking, ranks, words


def test_ranks_against_sorting():
  rng = np.random.default_rng(0)
  queries, candidates = rng.normal(size=(2, 600, 8)).astype(np.float32)
  right = rng.permutation(600)
  found = ranks(queries, candidates, right)
  order = np.argsort(-(queries @ candidates.T), 1)
  place = np.argmax(order == right[:, None], 1)
  np.testing.assert_array_equal(found.better, place)
  np.testing.assert_array_equal(found.rank, place + 1)
  np.testing.assert_array_equal(found.top, order[:, :5])
  for k in (1, 5, 600):
    assert found.recall(k) == pytest.approx(np.mean(place < k))
  assert found.chance(6) == 0.01 and found.chance(1000) == 1


def test_ties_are_counted_as_if_shuffled():
  """The example at the top of the file; and all alike is chance."""
  similar = np.array([[0.9, 0.7, 0.7, 0.7, 0.2]], np.float32)
  found = ranks(np.ones((1, 1), np.float32), similar.T, [2])
  assert (found.better, found.ties, found.rank) == (1, 2, 3)
  got = [found.recall(k) for k in (1, 2, 3, 4)]
  np.testing.assert_allclose(got, [0, 1 / 3, 2 / 3, 1])
  alike = ranks(*np.ones((2, 40, 3), np.float32), np.arange(40))
  assert alike.recall(1) == pytest.approx(1 / 40) == alike.chance(1)
  assert np.median(alike.rank) == 20.5
  near = ranks(np.ones((1, 1), np.float32), similar.T + 1e-8, [1])
  assert near.ties == 2  # rounding is no difference


def test_ranks_of_nothing_are_refused():
  with pytest.raises(ValueError, match='ranks of 0 queries in 4 candidates'):
    ranks(np.ones((0, 3)), np.ones((4, 3)), [])


def _ranking(count=3):
  records = [
    dict(index=i, document=f'd{i}', task=task, query=query, right=f'text {i}',
         rank=1.0 + i, correct=i == 0,
         top=[[None if query is None else j, f'text {j}'] for j in (0, 1)])
    for task, query in (('image to text', None), ('text to image', '<b>q</b>'))
    for i in range(count)
  ]  # fmt: skip
  table = [('', 'R@1'), ('image to text', '33 %'), ('chance', '1 %')]

  def pictures(index):
    return [np.full((4, 4, 3), index, np.uint8)]

  return Ranking({'retrieval/r1': 1 / 3}, records, 'All found.', table, pictures)


def test_the_page_shows_queries_and_marks_the_right_ones(tmp_path):
  ranking = _ranking()
  paths = report.write(tmp_path, 7, {'retrieval': ranking})
  page = paths['html'].read_text()
  assert 'All found.' in page and page.count('<article') == 6
  assert '<b>q</b>' not in page and '&lt;b&gt;q' in page
  assert page.count('✓ text') == 2  # of image to text; 2 is not among the first two
  assert page.count('class="hit"') == 4
  assert page.count('background-image') == 3  # one rule a picture
  assert 'Shuffled:' not in page
  assert 'right: text 2, at rank 3' in page
  content = report.read(tmp_path, 7)
  assert report.same_predictions({'retrieval': ranking}, content) == (
    'retrieval: 6 queries in common, identical predictions'
  )
  content['results']['retrieval']['predictions'][0]['rank'] = 9
  assert '1 of them differ' in report.same_predictions({'retrieval': ranking}, content)
  assert report.table({'retrieval': ranking}).splitlines() == [
    'retrieval       R@1', 'image to text  33 %', 'chance          1 %', 'All found.'
  ]  # fmt: skip


def test_a_page_of_nothing_and_one_that_is_full(monkeypatch):
  assert 'All found.' in report.page(0, {'x': _ranking(0)})
  monkeypatch.setattr(report, '_BYTES', 150)
  assert report.page(0, {'x': _ranking(9)}).count('<article') < 9
  assert jinja2.__version__


def test_words():
  assert [words(x) for x in (0, 0.000264, 0.0531, 1)] == [
    '0.0\u00a0%', '0.026\u00a0%', '5.3\u00a0%', '100.0\u00a0%'
  ]  # fmt: skip
