"""Flamingo at the widths of IDEFICS-9B: `flamingo_3b` with larger parts.

Data and step as of configs/flamingo_3b.py.

Model: a ViT-H/14 and a language model of Llama-7B's widths, both frozen; a resampler and
a gated cross-attention before every fourth layer are trained.

Expect: no score; it was planned, never trained at this size. Modelled, by the compiler's
estimates, for 256 chips of v5e (the second command): 9.3 GiB a chip, 3.7e10 bytes sent,
MFU 0.50; see docs/planning.md.

COMMAND: python train.py --config=configs/flamingo_9b.py --workdir=runs/flamingo_9b
What it takes: python -m mmjax.plan --config=configs/flamingo_9b.py --topology=v5e:16x16
In under a minute, on a CPU (easy-VQA; all of it works, nothing is learnt):
  python train.py --config=configs/flamingo_9b.py:tiny --workdir=runs/flamingo_9b_tiny
"""

import pathlib
import runpy

from ml_collections import ConfigDict

SMALLER = pathlib.Path(__file__).with_name('flamingo_3b.py')


def get_config(variant: str = '') -> ConfigDict:
  config = runpy.run_path(str(SMALLER))['get_config'](variant)
  config.model.cross_every = 4
  config.model.lm.update(norm='rms', gated=True, activation='silu', remat='attention+up')
  config.model.lm.tie_embeddings = False
  if not variant:
    config.data.update(
      path='data/mmc4_llama', tokenizer='data/llama/tokenizer.model', vocab_size=32_064
    )
    config.model.lm.update(
      embed_dim=4096, num_layers=32, num_heads=32, num_kv_heads=32, mlp_dim=11_008
    )
    config.model.vision.update(embed_dim=1280, num_layers=32, mlp_dim=5120)
    config.model.resampler.update(embed_dim=1280, num_heads=16, head_dim=96)
    config.model.update(cross_heads=32, cross_head_dim=128, cross_mlp_dim=11_008)
    config.model.update(cross_gated=True, cross_activation='silu', cross_norm='rms')
  return config
