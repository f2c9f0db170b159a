"""The peers compute what mmjax computes, or comparing speed means nothing."""

import importlib
import pathlib

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / 'benchmarks'
VISION = dict(
  intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32,
  patch_size=16,
)  # fmt: skip
SMALL = {
  'unified': dict(
    vocab_size=50, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48,
  ),
  'flamingo': dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, vision_config=dict(VISION, embed_dim=32, hidden_act='gelu'),
    perceiver_config=dict(
      use_resampler=True, resampler_n_latents=4, resampler_depth=2, resampler_n_heads=2,
      resampler_head_dim=8, qk_layer_norms_perceiver=False,
    ),
  ),
  'clip': dict(
    projection_dim=16,
    text_config=dict(
      vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
      num_attention_heads=2, max_position_embeddings=77, bos_token_id=48,
      eos_token_id=49,
    ),
    vision_config=dict(VISION, hidden_size=32),
  ),
}  # fmt: skip


@pytest.fixture(params=sorted(SMALL))
def small(request, monkeypatch):
  """The benchmark and one of its models, with small sizes."""
  monkeypatch.syspath_prepend(BENCHMARKS)
  train_step = importlib.import_module('train_step')
  model = train_step.model_of(request.param)
  monkeypatch.setattr(model, 'SIZES', {**model.SIZES, **SMALL[request.param]})
  if request.param != 'unified':
    monkeypatch.setattr(model, 'SIDE', 32)
    monkeypatch.setattr(model, 'PATCHES', 4)
  return train_step, model


def test_same_weights_give_the_same_loss(small):
  train_step, model = small
  pytest.importorskip('transformers', reason="the extra 'parity' is not installed")
  losses = train_step.compare(model)
  assert losses['torch'] == pytest.approx(
    [losses['mmjax']] * len(losses['torch']), rel=1e-5
  )
  assert losses['mmjax'] > 1


def test_other_losses_are_refused(small):
  train_step, _ = small
  train_step.refuse_others({'mmjax': 4.0, 'torch': [4.0, 4.0003]})
  with pytest.raises(SystemExit, match='not the same model'):
    train_step.refuse_others({'mmjax': 4.0, 'torch': [4.0, 4.0005]})


@pytest.mark.parametrize('case', ['fixed', 'mixture'])
def test_packed_and_padded_hold_the_same_documents(small, case):
  train_step, model = small
  made = [train_step.batches_of(model, case, pack) for pack in (True, False)]
  slots = sum(map(len, model.examples(case)))
  assert [train_step.documents.useful(x) for x in made] == [slots, slots]
  targets = [sum((b.stream.weights > 0).sum() for b in x) for x in made]
  assert targets[0] == targets[1]
  images = [sum((b.bank['image'].item_segments > 0).sum() for b in x) for x in made]
  assert images[0] == images[1] > 0


@pytest.mark.parametrize('name', ['unified', 'flamingo', 'clip'])
def test_no_row_of_a_mixture_stays_empty(monkeypatch, name):
  monkeypatch.syspath_prepend(BENCHMARKS)
  train_step = importlib.import_module('train_step')
  for batch in train_step.batches_of(train_step.model_of(name), 'mixture', True):
    assert (batch.stream.segment_ids > 0).any(1).all()


def test_a_group_that_does_not_fit_is_refused(small):
  train_step, model = small
  found = model.examples('fixed')[:4]
  with pytest.raises(ValueError, match='takes 4 rows, not 3'):
    train_step.documents.packed(found, model.budget('fixed'), 3, group=4)
