"""Published models are ours by fields: every parameter is counted, none is made.

The counts are those of the models of transformers 5.23, made on torch's device 'meta'
from the published config.json; more rows: (name, fields, count) in `PUBLISHED`.
"""

import math

import jax
import pytest

from mmjax import models


def vit(size, patch, **fields):
  """ViT-B or ViT-L over pictures of 224 pixels."""
  L, D, N = dict(B=(12, 768, 12), L=(24, 1024, 16), So400m=(27, 1152, 16))[size]
  side = fields.pop('pixels', 224) // patch
  return dict(
    name='vit', channels=3 * patch**2, embed_dim=D, num_layers=L, num_heads=N,
    mlp_dim=4304 if size == 'So400m' else 4 * D, position_grid=[side, side], **fields,
  )  # fmt: skip


def text(name, L, D, N, **fields):
  return dict(
    name=name, embed_dim=D, num_layers=L, num_heads=N, num_kv_heads=N, head_dim=D // N,
    mlp_dim=4 * D, **fields,
  )  # fmt: skip


def clip(vision, D, N):
  """2103.00020, table 20: text towers of 12 layers, 77 tokens, projected to their D."""
  tower = text(
    'unified', 12, D, N, vocab_size=49_408, max_positions=77, norm='layer', bias='all',
    gated=False, rotary=False, scale_embedding=False, activation='quick_gelu',
  )  # fmt: skip
  vision |= dict(pool='class', patch_bias=False, embedding_norm=True)
  return dict(
    name='dual', vision=vision, text=tower, embed_dim=D, logit_bias=False,
    media=[['image', vision['channels']]],
  )  # fmt: skip


def siglip(vision, tower):
  tower |= dict(vocab_size=32_000, max_positions=64, num_types=0, embedding_norm=False,
                post_norm=False, activation='gelu_tanh')  # fmt: skip
  return dict(
    name='dual', vision=vision | dict(pool='map', activation='gelu_tanh'), text=tower,
    embed_dim=vision['embed_dim'], image_projection=False, projection_bias=True,
    media=[['image', vision['channels']]],
  )  # fmt: skip


PUBLISHED = [
  # 2010.11929, table 1: 86 and 307 million; the head is of ImageNet's 1,000 classes.
  ('ViT-B/16', vit('B', 16, pool='class'), 85_798_656),
  ('ViT-B/16, head', vit('B', 16, pool='class', num_classes=1000), 86_567_656),
  ('ViT-L/16, head', vit('L', 16, pool='class', num_classes=1000), 304_326_632),
  ('CLIP B/32', clip(vit('B', 32), 512, 8), 151_277_313),
  ('CLIP L/14', clip(vit('L', 14), 768, 12), 427_616_513),
  ('CLIP L/14, 336 pixels', clip(vit('L', 14, pixels=336), 768, 12), 427_944_193),
  ('SigLIP B/16', siglip(vit('B', 16), text('encoder', 12, 768, 12)), 203_155_970),
  (
    'SigLIP So400m/14, 384 pixels',
    siglip(
      vit('So400m', 14, pixels=384), text('encoder', 27, 1152, 16) | dict(mlp_dim=4304)
    ),
    877_960_498,
  ),
]


@pytest.mark.parametrize(
  ('fields', 'count'), [row[1:] for row in PUBLISHED], ids=[row[0] for row in PUBLISHED]
)
def test_parameters_are_as_many_as_published(fields, count):
  model = models.build(**fields)
  made = jax.eval_shape(model.init, jax.random.key(0), models.padding(model))['params']
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(made)) == count
