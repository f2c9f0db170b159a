"""Encoded early fusion, stage 1: an encoder learns to speak to a language model.

The language model is the quickstart's as it was trained, frozen, without its projection
of raw patches; its image slots get the tokens of a small ViT instead, through a two-layer
projector (LLaVA, 2304.08485). LLaVA's stage 1 trains the projector alone, after an
encoder that has seen much; this one is drawn, so encoder and projector train together
(`mmjax.models.encoded.STAGE1` freezes both others). Stage 2 goes on from here:
configs/encoded_easy_vqa_stage2.py.

Expect: not run to the end yet.

COMMAND: python train.py --config=configs/encoded_easy_vqa_stage1.py \
    --workdir=runs/encoded_stage1
It reads runs/quickstart, which comes first:
  python train.py --config=configs/quickstart.py --workdir=runs/quickstart
In under a minute, without the quickstart (all of it works, nothing is learnt):
  python train.py --config=configs/encoded_easy_vqa_stage1.py:tiny \
    --workdir=runs/encoded_stage1_tiny
"""

import pathlib
import runpy

from ml_collections import ConfigDict

QUICKSTART = pathlib.Path(__file__).with_name('quickstart.py')


def get_config(variant: str = '') -> ConfigDict:
  config = runpy.run_path(str(QUICKSTART))['get_config'](variant)
  D, L = (32, 1) if variant else (96, 2)
  config.model = ConfigDict(
    dict(
      name='encoded',
      lm=config.model.to_dict(),
      vision=dict(
        name='vit',
        embed_dim=D,
        num_layers=L,
        num_heads=4,
        mlp_dim=4 * D,
        position_grid=(8, 8),
        scan=False,
        chunk=128,
        reach=63,
      ),
      projector=dict(name='mlp'),
    )
  )
  if not variant:
    config.init = dict(lm=dict(spec='runs/quickstart', ignore=['embed/image/*']))
    config.train.steps = 300
  config.optim.freeze = ('lm/*',)
  return config
