"""How right, how sure, and how much of it comes from the images: pure functions.

An accuracy alone doesn't say whether a model looks. Beside each stands a blind
baseline, the same model with the wrong images, and the difference of the two
is the gain. Questions about one image are not independent, so the interval of
a gain is taken over documents (the sandwich with clusters, Liang & Zeger 1986):

  gain = mean_q d_q,   d_q = correct_q - blind_q  in {-1, 0, 1}
  var  = G / (G - 1) * sum_g (sum_{q in g} (d_q - gain))^2 / n^2
"""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

_Z = 1.959963984540054  # 97.5 % point of the normal distribution


def exact(prediction: str, answer: str) -> bool:
  """Exact match; only white space around the strings is forgiven."""
  return prediction.strip() == answer.strip()


def accuracy(correct: Sequence[bool]) -> float:
  """The share of True; nan of nothing."""
  return float(np.mean(correct)) if len(correct) else math.nan


def accuracy_by(
  groups: Sequence[str], correct: Sequence[bool]
) -> dict[str, tuple[int, float]]:
  """Count and accuracy of each group, sorted by its name.

  Raises:
    ValueError: `groups` and `correct` are of different lengths.
  """
  if len(groups) != len(correct):
    raise ValueError(f'{len(groups)} groups for {len(correct)} answers')
  found: dict[str, list[bool]] = {}
  for group, hit in zip(groups, correct):
    found.setdefault(group, []).append(bool(hit))
  return {g: (len(hits), accuracy(hits)) for g, hits in sorted(found.items())}


def wilson(hits: int, count: int) -> tuple[float, float]:
  """Wilson's 95 % interval of a proportion (JASA 22, 1927); (0, 1) of nothing.

  Raises:
    ValueError: not 0 <= hits <= count.
  """
  if not 0 <= hits <= count:
    raise ValueError(f'{hits} hits of {count}')
  if not count:
    return 0.0, 1.0
  p, z2 = hits / count, _Z * _Z
  centre = (p + z2 / (2 * count)) / (1 + z2 / count)
  half = _Z * math.sqrt(p * (1 - p) / count + z2 / (4 * count * count))
  half /= 1 + z2 / count
  # At the ends the bound is the end itself; rounding must not move it.
  low = 0.0 if hits == 0 else centre - half
  high = 1.0 if hits == count else centre + half
  return low, high


def paired_gain(
  correct: Sequence[bool], blind: Sequence[bool], documents: Sequence[str]
) -> tuple[float, float, float]:
  """Accuracy minus blind accuracy with its 95 % interval, clustered by document.

  Args:
    correct, blind: the same questions, answered with and without their images.
    documents: the document of each question.

  Returns:
    (gain, low, high). With fewer than two documents the interval is (-1, 1).

  Raises:
    ValueError: different lengths.
  """
  if not len(correct) == len(blind) == len(documents):
    raise ValueError(
      f'{len(correct)} answers, {len(blind)} blind answers, {len(documents)} documents'
    )
  n = len(correct)
  if not n:
    return math.nan, -1.0, 1.0
  d = np.asarray(correct, np.float64) - np.asarray(blind, np.float64)
  gain = float(d.mean())
  names, cluster = np.unique(np.asarray(documents, dtype=str), return_inverse=True)
  if len(names) < 2:
    return gain, -1.0, 1.0
  sums = np.bincount(cluster, weights=d - gain)
  half = _Z * math.sqrt(len(names) / (len(names) - 1) * float(sums @ sums)) / n
  return gain, max(-1.0, gain - half), min(1.0, gain + half)


def bootstrap_ratio(
  sums: Sequence[float], counts: Sequence[float], clusters: Sequence[str], seed: int = 0
) -> tuple[float, float, float]:
  """sum(sums) / sum(counts) with a 95 % bootstrap interval over clusters.

  Whole clusters are drawn again with replacement, 4,000 times, and the ratio taken
  of each draw; the interval goes from its 2.5 % to its 97.5 % point (Efron, 1979).
  So the mean loss of a token gets its interval over documents.

  Args:
    sums, counts: of each member, e.g. the losses of a document and its tokens.
    clusters: whose members are not independent, e.g. the page a document is of.
    seed: of the draws.

  Returns:
    (ratio, low, high); with nothing to count all are nan, with fewer than two
    clusters low and high.

  Raises:
    ValueError: different lengths.
  """
  if not len(sums) == len(counts) == len(clusters):
    raise ValueError(f'{len(sums)} sums, {len(counts)} counts, {len(clusters)} clusters')
  names, cluster = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
  by_cluster = [np.bincount(cluster, weights=x) for x in (sums, counts)]
  total, count = (float(x.sum()) for x in by_cluster)
  if not count:
    return math.nan, math.nan, math.nan
  if len(names) < 2:
    return total / count, math.nan, math.nan
  rng, G = np.random.default_rng(seed), len(names)
  ratios = []
  for _ in range(40):  # not all draws at one time: they are [draws, clusters]
    draws = rng.multinomial(G, np.full(G, 1 / G), size=100)
    top, bottom = (draws @ x for x in by_cluster)
    ratios.append(top[bottom > 0] / bottom[bottom > 0])
  low, high = np.quantile(np.concatenate(ratios), (0.025, 0.975))
  return total / count, float(low), float(high)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
  """The soft accuracy of VQA v1/v2 (Antol et al., 1505.00468, and its evaluation code).

  Each human answer is left out in turn, and the prediction scores
  min(1, matches among the other nine / 3); the mean over the ten is taken. Both
  sides are normalised as in the official code when the humans disagree:
  lower case, no articles, digits for number words, no punctuation; its table of
  contractions (dont -> don't) is left out.

  Raises:
    ValueError: fewer than two human answers.
  """
  if len(answers) < 2:
    raise ValueError(f'soft accuracy needs at least 2 human answers, got {len(answers)}')
  answers = [_plain_space(a) for a in answers]
  prediction = _plain_space(prediction)
  if len(set(answers)) > 1:
    answers = [_normalise(a) for a in answers]
    prediction = _normalise(prediction)
  matches = sum(a == prediction for a in answers)
  scores = [min(1.0, (matches - (a == prediction)) / 3) for a in answers]
  return sum(scores) / len(scores)


_NUMBERS: Mapping[str, str] = {
  'none': '0', 'zero': '0', 'one': '1', 'two': '2', 'three': '3', 'four': '4',
  'five': '5', 'six': '6', 'seven': '7', 'eight': '8', 'nine': '9', 'ten': '10',
}  # fmt: skip
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def _plain_space(text: str) -> str:
  return text.replace('\n', ' ').replace('\t', ' ').strip()


def _normalise(text: str) -> str:
  # A mark beside a space goes, as all do if there is a number with a comma; any
  # other mark becomes a space. Only decimal points stay.
  number = bool(re.search(r'\d,\d', text))
  out = text
  for mark in _PUNCTUATION:
    beside = f'{mark} ' in text or f' {mark}' in text
    out = out.replace(mark, '' if beside or number else ' ')
  out = re.sub(r'\.(?!\d)', '', out)
  words = [_NUMBERS.get(w, w) for w in out.lower().split()]
  return ' '.join(w for w in words if w not in ('a', 'an', 'the'))
