"""ViT (2010.11929), and what other vision towers have in common with it.

Their patches are cut by a convolution, f[D, 3, p, p]; ours are rows of p * p * 3 values,
so the kernel is the same numbers as f[p p 3, D]. What makes pixels of bytes stands in a
file of its own, preprocessor_config.json: `mean` and `std` of ours, 255 times as large.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.interop.families.family import (
  ACTIVATIONS,
  LAYERS,
  Family,
  activation,
  linear,
  norm,
  only,
)
from mmjax.interop.files import PREPROCESSOR
from mmjax.interop.leaf import Index, Leaf
from mmjax.nn.vit import Vit

HALF = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class Patches(Leaf):
  """The kernel of square patches of three colours: 'D 3 p p' -> '(p p 3) D'."""

  axes: str = 'D C -> C D'

  def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    p = patch_size(shape[0])
    return shape[1], 3, p, p

  def take(self, theirs: Any, shape: Sequence[int], index: Index) -> np.ndarray:
    x = theirs[index[1], :, :, :]
    return x.transpose(2, 3, 1, 0).reshape(shape[0], -1)[index[0]]

  def give(self, ours: np.ndarray) -> np.ndarray:
    p = patch_size(ours.shape[0])
    return ours.reshape(p, p, 3, -1).transpose(3, 2, 0, 1)


def patch_size(channels: int) -> int:
  """p, of patches of p * p * 3 values.

  Raises:
    ValueError: there is none.
  """
  p = math.isqrt(channels // 3)
  if p * p * 3 != channels:
    raise ValueError(f'{channels} channels are no square patch of three colours')
  return p


def image_fields(config: dict[str, Any], said: dict[str, Any], colours) -> dict[str, Any]:
  """The fields of a Vit that say what its images are.

  Args:
    config: of the tower.
    said: the whole config, with what is said of preprocessing.
    colours: mean and std where nothing is said.
  """
  only(config, 'num_channels', 3)
  p, size = config['patch_size'], config['image_size']
  if not isinstance(p, int):
    only({'patch_size': p[0]}, 'patch_size', p[1])
    p = p[0]
  rows, columns = (size, size) if isinstance(size, int) else size
  images = said.get(PREPROCESSOR, {})
  mean, std = (
    tuple(round(255.0 * a, 6) for a in images.get(key, default))
    for key, default in zip(('image_mean', 'image_std'), colours)
  )
  return dict(
    channels=p * p * 3, position_grid=(rows // p, columns // p), mean=mean, std=std
  )


def image_config(model: Vit) -> dict[str, Any]:
  """What a tower's config says of images.

  The size is that of whole patches: 384 pixels in patches of 14 come back as 378, which
  are those that were read.
  """
  p = patch_size(model.channels)
  rows, columns = (p * n for n in model.position_grid)
  size = rows if rows == columns else [rows, columns]
  return dict(patch_size=p, image_size=size, num_channels=3)


def preprocessor(model: Vit, kind: str) -> dict[str, Any]:
  """What preprocessor_config.json says: images as the model takes them."""
  p = patch_size(model.channels)
  rows, columns = (p * n for n in model.position_grid)
  return {
    PREPROCESSOR: dict(
      image_processor_type=kind,
      do_resize=True,
      size=dict(height=rows, width=columns),
      do_center_crop=False,
      do_rescale=True,
      rescale_factor=1 / 255,
      do_normalize=True,
      image_mean=[a / 255 for a in model.mean],
      image_std=[a / 255 for a in model.std],
    )
  }


_LAYER = 'vit.encoder.layer.{}.'
_SELF = f'{_LAYER}attention.attention.'
_VIT = (
  Patches('patch/kernel', 'vit.embeddings.patch_embeddings.projection.weight'),
  Leaf('patch/bias', 'vit.embeddings.patch_embeddings.projection.bias', 'D -> D'),
  Leaf('class', 'vit.embeddings.cls_token', '1 1 D -> D'),
  Leaf('position', 'vit.embeddings.position_embeddings', '1 S D -> S D'),
  *linear(f'{LAYERS}attention/query', f'{_SELF}query', '(N H) D -> D N H'),
  *linear(f'{LAYERS}attention/key', f'{_SELF}key', '(K H) D -> D K H'),
  *linear(f'{LAYERS}attention/value', f'{_SELF}value', '(K H) D -> D K H'),
  *linear(
    f'{LAYERS}attention/out', f'{_LAYER}attention.output.dense', 'D (N H) -> N H D'
  ),
  *norm(f'{LAYERS}attention_norm', f'{_LAYER}layernorm_before'),
  *linear(f'{LAYERS}mlp/up', f'{_LAYER}intermediate.dense', 'F D -> D F'),
  *linear(f'{LAYERS}mlp/down', f'{_LAYER}output.dense', 'F D -> D F'),
  *norm(f'{LAYERS}mlp_norm', f'{_LAYER}layernorm_after'),
  *norm('transformer/norm', 'vit.layernorm'),
  Leaf('pool_dense/kernel', 'vit.pooler.dense.weight', 'E D -> D E'),
  Leaf('pool_dense/bias', 'vit.pooler.dense.bias', 'D -> D'),
  Leaf('head/kernel', 'classifier.weight', 'E D -> D E'),
  Leaf('head/bias', 'classifier.bias', 'D -> D'),
)


def _fields(config, names):
  only(config, 'qkv_bias', True)
  only(config, 'pooler_act', 'tanh')
  D = config['hidden_size']
  only({'pooler_output_size': config.get('pooler_output_size') or D},
        'pooler_output_size', D)  # fmt: skip
  classes = 0
  if 'classifier.weight' in names:
    classes = len(config.get('id2label', (0, 1)))  # not written where there are two
  return dict(
    **image_fields(config, config, (HALF, HALF)),
    embed_dim=D,
    num_layers=config['num_hidden_layers'],
    num_heads=config['num_attention_heads'],
    mlp_dim=config['intermediate_size'],
    pool='class',
    pooler=any(name.endswith('pooler.dense.weight') for name in names),
    num_classes=classes,
    activation=activation(config, 'hidden_act', 'gelu'),
    norm_eps=config.get('layer_norm_eps', 1e-12),
  )


def _config(model):
  labels = {str(i): f'LABEL_{i}' for i in range(model.num_classes)}
  kind = 'ViTForImageClassification' if labels else 'ViTModel'
  return dict(
    architectures=[kind],
    **image_config(model),
    **preprocessor(model, 'ViTImageProcessor'),
    hidden_size=model.embed_dim,
    num_hidden_layers=model.num_layers,
    num_attention_heads=model.num_heads,
    intermediate_size=model.mlp_dim,
    hidden_act=ACTIVATIONS[model.activation],
    layer_norm_eps=model.norm_eps,
    qkv_bias=True,
    **(dict(id2label=labels, label2id={v: int(k) for k, v in labels.items()})
       if labels else {}),
  )  # fmt: skip


VIT = Family('vit', 'vit.', _VIT, (), _fields, _config)
