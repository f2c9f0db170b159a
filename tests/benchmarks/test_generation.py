"""Both sides of the benchmark write the same words, or comparing speed means nothing."""

import importlib.util
import pathlib
import sys

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / 'benchmarks'

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]


@pytest.fixture
def generation(monkeypatch):
  for name in ('torch', 'transformers'):
    pytest.importorskip(name, reason=f"{name} is not installed (extra 'parity')")
  monkeypatch.syspath_prepend(BENCHMARKS)
  spec = importlib.util.spec_from_file_location(
    'generation', BENCHMARKS / 'generation.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  import torch_generation as peer

  monkeypatch.setattr(module, 'NEW', 12)
  monkeypatch.setattr(
    peer, 'WIDTHS', dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
  )
  monkeypatch.setattr(
    peer, 'VISION', dict(embed_dim=24, num_hidden_layers=2, num_attention_heads=2)
  )
  monkeypatch.setattr(peer, 'LATENTS', 3)
  monkeypatch.setattr(peer, 'DEPTH', 2)
  yield module, peer
  del sys.modules['torch_generation']


@pytest.mark.parametrize('name', ['flamingo', 'unified'])
def test_both_write_the_same_words(generation, tmp_path, name):
  module, peer = generation
  peer.save(name, tmp_path)
  want = peer.Peer(name, tmp_path, *module.prompts(3), False, False, 2).run(12)
  got = module.Mmjax(name, tmp_path, 3, False).run(12)
  np.testing.assert_array_equal(got, want)
  assert len(np.unique(want)) > 12  # not one word for ever


def test_agreement_ends_at_the_first_difference(generation):
  module, _ = generation
  got = np.array([[1, 2, 3, 4], [1, 2, 3, 4]])
  assert module.agreement(got, np.array([[1, 2, 3, 4], [1, 9, 3, 4]])) == 5 / 8
