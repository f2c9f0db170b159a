"""What config.json of multimodal models may say, without weights."""

import re

import pytest

from mmjax import models
from mmjax.interop.families import FAMILIES

LAYERS = dict(
  hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4
)
SAID = {
  'llava': dict(
    vision_config=dict(LAYERS, image_size=8, patch_size=4),
    text_config=dict(LAYERS, vocab_size=40),
  ),
  'paligemma': dict(
    vision_config=dict(LAYERS, image_size=8, patch_size=4),
    text_config=dict(LAYERS, model_type='gemma', vocab_size=40),
  ),
  'idefics': dict(
    LAYERS, vocab_size=40, use_resampler=True,
    vision_config=dict(embed_dim=16, image_size=8, patch_size=4),
  ),
  'fuyu': dict(LAYERS, vocab_size=40, patch_size=4),
}  # fmt: skip


def build(kind, **change):
  family = FAMILIES[kind]
  fields = family.fields(SAID[kind] | change, frozenset())
  return models.build(family.model, **fields)


@pytest.mark.parametrize(
  ('layer', 'used'), [(-1, 3), (-2, 2), (2, 2), (3, 3), (0, 0), (-4, 0)]
)
def test_llava_takes_the_layers_up_to_the_one_that_is_read(layer, used):
  if used:
    assert build('llava', vision_feature_layer=layer).vision.num_layers == used
  else:
    with pytest.raises(ValueError, match='is no layer of 3'):
      build('llava', vision_feature_layer=layer)


@pytest.mark.parametrize(
  ('kind', 'change', 'message'),
  [
    ('llava', dict(vision_feature_layer=[-2, -1]), 'vision_feature_layer=[-2, -1] is no'),
    ('llava', dict(vision_feature_select_strategy='full'), "only 'default'"),
    ('llava', dict(text_config=dict(model_type='lama')), "'lama'; did you mean 'llama'"),
    ('llava', dict(vision_config=dict(model_type='pixtral')), "only 'clip_vision_model'"),
    ('paligemma', dict(text_config=dict(model_type='gemma2')), "only 'gemma'"),
    ('idefics', dict(use_resampler=False), 'use_resampler=False is not supported'),
    ('idefics', dict(cross_layer_interval=2), 'cross_layer_interval=2 is no divisor of'),
    ('idefics', dict(alpha_type='matrix'), "alpha_type='matrix' is not supported"),
    ('fuyu', dict(rope_scaling=dict(rope_type='yarn')), "rope_type='yarn' is not"),
  ],
)
def test_refuses(kind, change, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    build(kind, **change)


def test_export_says_why_a_model_is_none_of_them():
  other = models.build(
    'encoded', vocab_size=40, media=[['image', 48]], lm=dict(name='unified'),
    vision=dict(name='vit'), projector=dict(name='linear'),
  )  # fmt: skip
  with pytest.raises(ValueError, match='its projector is LinearProjector'):
    FAMILIES['llava'].config(other)
  made = build('idefics')
  assert FAMILIES['idefics'].config(made)['cross_layer_interval'] == 1
