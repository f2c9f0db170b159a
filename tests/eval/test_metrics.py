import itertools
import math

import numpy as np
import pytest

from mmjax.eval import metrics


def test_exact_match_forgives_only_outer_white_space():
  assert metrics.exact(' red\n', 'red')
  assert not metrics.exact('Red', 'red')
  assert not metrics.exact('', 'red')


def test_accuracy_by_group_against_a_plain_count():
  rng = np.random.default_rng(0)
  groups = rng.choice(['color', 'shape', 'yes/no'], 100).tolist()
  correct = (rng.random(100) < 0.7).tolist()
  found = metrics.accuracy_by(groups, correct)
  assert list(found) == ['color', 'shape', 'yes/no']
  for name, (count, accuracy) in found.items():
    hits = [c for g, c in zip(groups, correct) if g == name]
    assert count == len(hits)
    assert accuracy == sum(hits) / len(hits)
  assert math.isnan(metrics.accuracy([]))
  with pytest.raises(ValueError, match='2 groups for 1 answers'):
    metrics.accuracy_by(['a', 'b'], [True])


@pytest.mark.parametrize('hits, count', [(0, 10), (3, 10), (10, 10), (9340, 9673)])
def test_wilson_ends_where_the_score_test_does(hits, count):
  # The interval is defined by |p - hits/count| = z * sqrt(p (1 - p) / count).
  low, high = metrics.wilson(hits, count)
  for p in (low, high):
    distance = abs(p - hits / count)
    bound = 1.959963984540054 * math.sqrt(p * (1 - p) / count)
    assert distance == pytest.approx(bound, abs=1e-9)
  assert 0 <= low <= hits / count <= high <= 1
  assert (low == 0) == (hits == 0)
  assert (high == 1) == (hits == count)


def test_wilson_of_nothing_and_of_nonsense():
  assert metrics.wilson(0, 0) == (0.0, 1.0)
  with pytest.raises(ValueError, match='11 hits of 10'):
    metrics.wilson(11, 10)


def test_gain_of_independent_questions_is_the_paired_interval():
  rng = np.random.default_rng(1)
  right, blind = rng.random(400) < 0.9, rng.random(400) < 0.6
  gain, low, high = metrics.paired_gain(right, blind, [str(i) for i in range(400)])
  d = right.astype(float) - blind.astype(float)
  half = 1.959963984540054 * d.std(ddof=1) / math.sqrt(400)
  assert gain == pytest.approx(d.mean())
  assert (low, high) == pytest.approx((d.mean() - half, d.mean() + half))


def test_gain_interval_covers_when_questions_of_a_document_agree():
  # 20 questions a document that are all right or all wrong: the interval must be
  # that of the documents, not 20 times as sure.
  rng = np.random.default_rng(2)
  covered, naive_covered, trials = 0, 0, 400
  for _ in range(trials):
    right = np.repeat(rng.random(60) < 0.7, 20)
    blind = np.repeat(rng.random(60) < 0.5, 20)
    documents = np.repeat(np.arange(60), 20).astype(str).tolist()
    _, low, high = metrics.paired_gain(right, blind, documents)
    covered += low <= 0.2 <= high
    d = right.astype(float) - blind
    naive_covered += abs(d.mean() - 0.2) < 1.96 * d.std() / math.sqrt(len(d))
  assert 0.91 < covered / trials < 0.985
  assert naive_covered / trials < 0.6


def test_gain_of_little():
  assert metrics.paired_gain([True], [False], ['a']) == (1.0, -1.0, 1.0)
  gain, low, high = metrics.paired_gain([], [], [])
  assert math.isnan(gain)
  assert (low, high) == (-1.0, 1.0)
  assert metrics.paired_gain([True] * 4, [True] * 4, list('aabb')) == (0.0, 0.0, 0.0)
  with pytest.raises(ValueError, match='2 answers, 1 blind answers, 2 documents'):
    metrics.paired_gain([True, True], [True], ['a', 'b'])


@pytest.mark.parametrize('matches', range(11))
def test_soft_accuracy_is_the_mean_over_nine_of_ten(matches):
  answers = ['cat'] * matches + ['dog'] * (10 - matches)
  subsets = itertools.combinations(answers, 9)
  want = np.mean([min(1.0, nine.count('cat') / 3) for nine in subsets])
  assert metrics.vqa_accuracy('cat', answers) == pytest.approx(want)


def test_soft_accuracy_normalises_when_people_disagree():
  people = ['a cat', 'Cat.', 'the cat!', 'dog'] + ['dog'] * 6
  assert metrics.vqa_accuracy('cat', people) == metrics.vqa_accuracy(
    'cat', ['cat'] * 3 + ['dog'] * 7
  )
  assert metrics.vqa_accuracy('two', ['2'] * 9 + ['3']) == 1.0
  assert metrics.vqa_accuracy('1000', ['1,000'] * 9 + ['2']) == 1.0
  assert metrics.vqa_accuracy('2.5', ['25'] * 9 + ['2']) == 0.0
  assert metrics.vqa_accuracy('t shirt', ['t-shirt'] * 9 + ['x']) == 1.0
  # All agree: taken as it is.
  assert metrics.vqa_accuracy('two', ['2'] * 10) == 0.0
  with pytest.raises(ValueError, match='at least 2 human answers, got 1'):
    metrics.vqa_accuracy('cat', ['cat'])


def test_bootstrap_ratio_is_over_clusters():
  rng = np.random.default_rng(0)
  counts = rng.integers(1, 50, 300)
  sums = counts * 0.3 + rng.normal(size=300) * np.sqrt(counts)
  names = [str(i) for i in range(300)]
  ratio, low, high = metrics.bootstrap_ratio(sums, counts, names)
  np.testing.assert_allclose(ratio, sums.sum() / counts.sum())
  # The delta method for a ratio of sums, for many clusters.
  error = sums - ratio * counts
  half = 1.96 * np.sqrt((error**2).sum()) / counts.sum()
  np.testing.assert_allclose([low, high], [ratio - half, ratio + half], atol=0.1 * half)
  assert metrics.bootstrap_ratio(sums, counts, names) == (ratio, low, high)
  # The same members in a tenth of the clusters, which are alike inside: less is known.
  alike = np.repeat(rng.normal(size=30), 10) * counts
  wide = metrics.bootstrap_ratio(alike, counts, np.repeat(names[:30], 10))
  narrow = metrics.bootstrap_ratio(alike, counts, names)
  assert math.isclose(wide[0], narrow[0])
  assert wide[2] - wide[1] > 2 * (narrow[2] - narrow[1])


def test_bootstrap_ratio_of_little():
  assert metrics.bootstrap_ratio([1.0, 2.0], [2, 2], list('ab'))[0] == 0.75
  ratio, low, high = metrics.bootstrap_ratio([1.0, 2.0], [2, 2], list('aa'))
  assert ratio == 0.75 and math.isnan(low) and math.isnan(high)
  assert all(map(math.isnan, metrics.bootstrap_ratio([], [], [])))
  assert all(map(math.isnan, metrics.bootstrap_ratio([0.0], [0], ['a'])))
  # Clusters that count nothing may be drawn alone.
  assert metrics.bootstrap_ratio([0.0, 3.0], [0, 2], list('ab')) == (1.5, 1.5, 1.5)
  with pytest.raises(ValueError, match='2 sums, 1 counts, 1 clusters'):
    metrics.bootstrap_ratio([1.0, 2.0], [2], ['a'])
