"""Published multimodal models, from their config.json: every parameter is counted.

The counts are those of the models of transformers 5.23, made on torch's device 'meta'
with these values, less the parameters that they have and never use: of LLaVA CLIP's last
layer (12,596,224) and last norm (2,048), of IDEFICS the norm of the pooled class token
(2,560). What isn't said here is a default there, and must be one of ours.
"""

import math

import jax
import pytest

from mmjax import models
from mmjax.interop.families import FAMILIES

CLIP_336 = dict(
  hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
  image_size=336, patch_size=14,
)  # fmt: skip
SIGLIP_224 = dict(
  hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
  image_size=224, patch_size=14, vision_use_head=False,
)  # fmt: skip
GEMMA_2B = dict(
  model_type='gemma', hidden_size=2048, intermediate_size=16_384, num_hidden_layers=18,
  num_attention_heads=8, num_key_value_heads=1, vocab_size=257_216,
)  # fmt: skip
CLIP_H = dict(
  embed_dim=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
  image_size=224, patch_size=14,
)  # fmt: skip
PERCEIVER = dict(
  resampler_n_latents=64, resampler_depth=6, resampler_n_heads=16, resampler_head_dim=96,
  qk_layer_norms_perceiver=True,
)  # fmt: skip
FUYU = dict(
  vocab_size=262_144, hidden_size=4096, intermediate_size=16_384, num_hidden_layers=36,
  num_attention_heads=64, patch_size=30,
)  # fmt: skip
PUBLISHED = [
  ('fuyu', FUYU, 9_408_238_592),
  (
    'llava',  # LLaVA-1.5-7B
    dict(vision_config=CLIP_336, text_config=dict(vocab_size=32_064)),
    7_063_427_072 - 12_596_224 - 2_048,
  ),
  (
    'paligemma',  # PaliGemma-3B, 224 pixels
    dict(vision_config=SIGLIP_224, text_config=GEMMA_2B),
    2_923_466_480,
  ),
  (
    'idefics',  # IDEFICS-9B
    dict(
      additional_vocab_size=2, cross_layer_interval=4, qk_layer_norms=True,
      use_resampler=True, vision_config=CLIP_H, perceiver_config=PERCEIVER,
    ),
    8_929_679_632 - 2_560,
  ),
]  # fmt: skip


@pytest.mark.parametrize(
  ('kind', 'config', 'count'), PUBLISHED, ids=[row[0] for row in PUBLISHED]
)
def test_parameters_are_as_many_as_published(kind, config, count):
  family = FAMILIES[kind]
  model = models.build(family.model, **family.fields(config, frozenset()))
  made = jax.eval_shape(model.init, jax.random.key(0), models.padding(model))['params']
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(made)) == count
