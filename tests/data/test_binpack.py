"""Bin packing: nothing lost, nothing over, few rows; groups of documents alike."""

import math

import numpy as np
import pytest
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


def equal(needs):
  """Equal needs as one type: (vectors, which of them each is)."""
  vectors, which = np.unique(needs, axis=0, return_inverse=True)
  return vectors, which.reshape(-1)


@given(needs_st)
def test_every_document_once_and_no_row_over(needs):
  vectors, which = equal(needs)
  counts = np.bincount(which)
  rows = expand(binpack.pack(vectors, counts, ROOM))
  placed = np.bincount(np.concatenate(rows), minlength=len(counts))
  assert placed.tolist() == counts.tolist()
  for row in rows:
    assert (vectors[row].sum(axis=0) <= ROOM).all()


def test_the_picture_in_the_docstring():
  needs = np.array([[6], [6], [5], [4], [3], [3], [3], [1]])
  vectors, which = equal(needs)
  rows = expand(binpack.pack(vectors, np.bincount(which), np.array([10])))
  got = [sorted(vectors[row, 0].tolist(), reverse=True) for row in rows]
  assert got == [[6, 4], [6, 3, 1], [5, 3], [3]]


@pytest.mark.parametrize('scarce', [1280, 550])  # the stream; both about alike
def test_rows_of_a_hard_mixture_are_nearly_full(scarce):
  rng = np.random.default_rng(0)
  patches = rng.geometric(0.01, 1500).clip(0, 500)
  stream = patches + np.exp(rng.normal(5, 1, 1500)).astype(int).clip(1, 1000)
  needs, room = np.stack([stream, patches], axis=1), np.array([2048, scarce])
  vectors, which = equal(needs)
  rows = expand(binpack.pack(vectors, np.bincount(which), room))
  bound = needs.sum(axis=0) / room
  assert len(rows) <= 1.02 * bound.max() + 1


@given(needs_st, st.fractions(min_value='1/3', max_value=9))
def test_strata_hold_every_document_and_are_cut_at_the_stride(needs, stride):
  order, ends = binpack.strata(needs, ROOM, stride)
  assert sorted(order.tolist()) == list(range(len(needs)))
  assert ends[-1] == len(needs) and (np.diff(ends, prepend=0) > 0).all()
  stride = max(stride, 1)
  multiples = {math.ceil(i * stride) for i in range(len(needs) + 1)}
  assert all(int(end) in multiples for end in ends[:-1])


def test_strata_are_alike_where_it_costs_most():
  rng = np.random.default_rng(1)
  needs = np.stack([rng.integers(80, 250, 4096), rng.integers(1, 30, 4096)], axis=1)
  order, ends = binpack.strata(needs, np.array([1024, 10_000]), 16)
  starts = np.append(0, ends[:-1])
  largest = np.maximum.reduceat(needs[order], starts)
  size = np.diff(ends, prepend=0)
  over = (largest * size[:, None]).sum(axis=0) / needs.sum(axis=0)
  assert over[0] <= 1.005 and over[1] > 1.2


def test_groups_of_equals_are_not_cut():
  needs = np.repeat([[7, 1, 1], [9, 1, 1]], 64, axis=0)
  order, ends = binpack.strata(needs, ROOM)
  assert ends.tolist() == [64, 128]
