"""What is compared there has the same value."""

import pathlib
import runpy

import numpy as np

FILE = pathlib.Path(__file__).parents[2] / 'benchmarks' / 'contrastive_memory.py'


def test_ring_and_naive_agree(monkeypatch):
  monkeypatch.syspath_prepend(FILE.parent)
  losses = runpy.run_path(str(FILE))['LOSSES']
  x, y = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
  args = (x, y, np.ones(6, np.float32), np.float32(2))
  np.testing.assert_allclose(losses['ring'](*args), losses['naive'](*args), rtol=1e-5)
