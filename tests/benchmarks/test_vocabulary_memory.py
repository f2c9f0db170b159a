"""What is compared there has the same value."""

import pathlib
import runpy

import jax
import numpy as np

from mmjax.batch import Budget
from mmjax.ops.vocabulary import Head

FILE = pathlib.Path(__file__).parents[2] / 'benchmarks' / 'vocabulary_memory.py'


def test_blocks_and_plain_agree(monkeypatch):
  monkeypatch.syspath_prepend(FILE.parent)
  losses = runpy.run_path(str(FILE))['LOSSES']
  rng = np.random.default_rng(0)
  stream = Budget(12, 12).empty(rows=2).stream
  stream.tokens[:] = rng.integers(0, 9, (2, 12))
  stream.segment_ids[:] = np.repeat([[1, 1, 2, 0]], 3, 1)
  stream.weights[:] = rng.integers(0, 3, (2, 12))
  hidden = rng.normal(size=(2, 12, 6)).astype(np.float32)
  head = Head((rng.normal(size=(6, 9)).astype(np.float32),), (('embed', 'vocab'),))

  def of(name):
    def loss(hidden, head):
      loss, weight, sums = losses[name](hidden, head, stream, 12, z_loss=0.1)
      return loss, (weight, {k: sums[k] for k in ('ce', 'correct', 'lost')})

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)

  pairs = zip(*(jax.tree.leaves(of(name)) for name in losses), strict=True)
  for blocks, plain in pairs:
    np.testing.assert_allclose(blocks, plain, rtol=1e-5, atol=1e-5)
