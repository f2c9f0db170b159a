"""The peer in PyTorch computes what mmjax computes, or comparing speed means nothing."""

import importlib.util
import pathlib
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / 'benchmarks'


@pytest.fixture
def train_step(monkeypatch):
  pytest.importorskip('torch', reason="torch is not installed (extra 'parity')")
  monkeypatch.syspath_prepend(BENCHMARKS)
  spec = importlib.util.spec_from_file_location(
    'train_step', BENCHMARKS / 'train_step.py'
  )
  module = importlib.util.module_from_spec(spec)
  sys.modules['train_step'] = module
  spec.loader.exec_module(module)
  small = dict(vocab_size=50, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2)
  monkeypatch.setattr(
    module, 'SIZES', {**module.SIZES, **small, 'head_dim': 8, 'mlp_dim': 48}
  )
  return module


def test_same_weights_give_the_same_loss(train_step):
  losses = train_step.compare()
  assert losses['torch'] == pytest.approx([losses['mmjax']] * 2, rel=1e-5)
  assert losses['mmjax'] > 1


def test_padded_and_packed_hold_the_same_documents(train_step):
  found = train_step.mixture_examples()
  packed, _ = train_step.mixture_packed(found)
  padded = train_step.mixture_padded(found)
  assert train_step.useful(packed) == train_step.useful(padded) == sum(map(len, found))
