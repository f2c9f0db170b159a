"""Bin packing: nothing lost, nothing over, few rows; types never understate a need."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmjax.data import binpack

ROOM = np.array([40, 12, 5])
needs_st = st.lists(
  st.tuples(st.integers(1, 40), st.integers(0, 12), st.integers(0, 5)),
  min_size=1,
  max_size=60,
).map(lambda rows: np.array(rows, np.int64))


def expand(patterns):
  return [list(p) for p, times in patterns for _ in range(times)]


@given(needs_st)
def test_every_document_once_and_no_row_over(needs):
  vectors, which = binpack.types(needs, ROOM)
  assert (vectors[which] >= needs).all()
  assert (vectors <= ROOM).all()
  assert len(np.unique(vectors, axis=0)) == len(vectors)
  counts = np.bincount(which)
  rows = expand(binpack.pack(vectors, counts, ROOM))
  placed = np.bincount(np.concatenate(rows), minlength=len(counts))
  assert placed.tolist() == counts.tolist()
  for row in rows:
    assert (vectors[row].sum(axis=0) <= ROOM).all()


@given(needs_st)
def test_no_two_rows_could_be_one(needs):
  vectors, which = binpack._group(needs, ROOM)
  assert (vectors[which] == needs).all()
  rows = expand(binpack.pack(vectors, np.bincount(which), ROOM))
  loads = np.array([vectors[row].sum(axis=0) for row in rows])
  for i in range(len(loads)):
    for j in range(i):
      assert (loads[i] + loads[j] > ROOM).any()


def test_the_picture_in_the_docstring():
  needs = np.array([[6], [6], [5], [4], [3], [3], [3], [1]])
  vectors, which = binpack._group(needs, np.array([10]))
  rows = expand(binpack.pack(vectors, np.bincount(which), np.array([10])))
  got = [sorted(vectors[row, 0].tolist(), reverse=True) for row in rows]
  assert got == [[6, 4], [6, 3, 1], [5, 3], [3]]


def test_rows_of_a_hard_mixture_are_nearly_full():
  rng = np.random.default_rng(0)
  patches = rng.geometric(0.01, 1500).clip(0, 900)
  stream = patches + np.exp(rng.normal(5, 1, 1500)).astype(int).clip(1, 1000)
  needs = np.stack([stream, patches], axis=1)
  room = np.array([2048, 1280])
  vectors, which = binpack.types(needs, room)
  rows = expand(binpack.pack(vectors, np.bincount(which), room))
  bound = needs.sum(axis=0) / room
  assert len(rows) <= 1.01 * bound.max() + 1


def test_a_need_that_is_not_scarce_is_rounded_first():
  rng = np.random.default_rng(1)
  needs = np.stack([rng.integers(80, 250, 4000), rng.integers(1, 30, 4000)], axis=1)
  vectors, which = binpack.types(needs, np.array([1024, 10_000]))
  assert len(np.unique(vectors[:, 1])) < 10 < 100 < len(np.unique(vectors[:, 0]))
  loss = vectors[which, 0].sum() / needs[:, 0].sum()
  assert loss <= 1.005


def test_many_distinct_vectors_make_few_types(monkeypatch):
  monkeypatch.setattr(binpack, '_MAX_TYPES', (300, 300))
  rng = np.random.default_rng(2)
  needs = rng.integers(0, 1000, (3000, 3))
  vectors, which = binpack.types(needs, np.array([1000, 1000, 1000]))
  assert len(vectors) <= 300
  assert (vectors[which] >= needs).all()


def test_grouping_survives_more_resources_than_one_integer_holds():
  rng = np.random.default_rng(3)
  needs = rng.integers(0, 3, (500, 4)) * 10**6
  vectors, which = binpack._group(needs, np.full(4, 2 * 10**6))
  assert (vectors[which] == needs).all()
  assert len(vectors) == len(np.unique(needs, axis=0))
