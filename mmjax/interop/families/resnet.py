"""ResNet (1512.03385): kernels out-first, batch norm's mean and variance as buffers.

  resnet.embedder.embedder                         stem
  resnet.encoder.stages.0.layers.1.layer.2         stage_0_block_1/conv_2
  resnet.encoder.stages.0.layers.0.shortcut        stage_0_block_0/shortcut
  classifier.1                                     head

Their config.json says nothing of how pictures come: `image_size`, `patch_size`,
`pixel_mean`, `pixel_std` and `pool` are our words in it.
"""

import math

from mmjax.interop.families.family import Family, only
from mmjax.interop.leaf import Leaf

_NORM = dict(scale='weight', bias='bias', mean='running_mean', var='running_var')
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def _conv_norm(ours, theirs):
  return (
    Leaf(f'{ours}/conv/kernel', f'{theirs}.convolution.weight', 'E D h w -> h w D E'),
    *(
      Leaf(f'{ours}/norm/{a}', f'{theirs}.normalization.{b}', 'D -> D')
      for a, b in _NORM.items()
    ),
  )


def _leaves(model):
  found = [*_conv_norm('stem', 'resnet.embedder.embedder')]
  for i, depth in enumerate(model.depths):
    for j in range(depth):
      ours, theirs = f'stage_{i}_block_{j}', f'resnet.encoder.stages.{i}.layers.{j}'
      for k in range(2 if model.block == 'basic' else 3):
        found += _conv_norm(f'{ours}/conv_{k}', f'{theirs}.layer.{k}')
      found += _conv_norm(f'{ours}/shortcut', f'{theirs}.shortcut')
  found.append(Leaf('head/kernel', 'classifier.1.weight', 'E D -> D E'))
  found.append(Leaf('head/bias', 'classifier.1.bias', 'E -> E'))
  return tuple(found)


def _fields(config, names):
  only(config, 'num_channels', 3)
  only(config, 'hidden_act', 'relu')
  only(config, 'downsample_in_first_stage', False)
  patch = config.get('patch_size', 16)
  classes = config.get('num_labels', len(config.get('id2label', (0, 1))))
  return dict(
    channels=patch * patch * 3,
    image_grid=tuple(n // patch for n in config.get('image_size', (224, 224))),
    mean=tuple(config.get('pixel_mean', _MEAN)),
    std=tuple(config.get('pixel_std', _STD)),
    pool=config.get('pool', 'mean'),
    num_classes=classes if 'classifier.1.weight' in names else 0,
    stem=config['embedding_size'],
    widths=tuple(config['hidden_sizes']),
    depths=tuple(config['depths']),
    block=config.get('layer_type', 'bottleneck'),
    early_stride=config.get('downsample_in_bottleneck', False),
  )


def _config(model):
  patch = math.isqrt(model.channels // 3)
  config = dict(
    architectures=['ResNetModel'],
    num_channels=3,
    embedding_size=model.stem,
    hidden_sizes=list(model.widths),
    depths=list(model.depths),
    layer_type=model.block,
    hidden_act='relu',
    downsample_in_first_stage=False,
    downsample_in_bottleneck=model.early_stride,
    image_size=[n * patch for n in model.image_grid],
    patch_size=patch,
    pixel_mean=list(model.mean),
    pixel_std=list(model.std),
    pool=model.pool,
  )
  if not model.num_classes:
    return config
  labels = {str(i): f'LABEL_{i}' for i in range(model.num_classes)}
  return dict(
    config,
    architectures=['ResNetForImageClassification'],
    id2label=labels,
    label2id={label: int(i) for i, label in labels.items()},
  )


RESNET = Family(
  'resnet', 'resnet.', _leaves, ('*.num_batches_tracked',), _fields, _config
)
