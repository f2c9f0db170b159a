"""CLIP's L/14 (2103.00020, table 20) with its batch of 32,768 pairs.

Data: image and caption (WebDataset), one pair a row: 256 patches and a class token, 77
tokens.

Model: 0.43 B parameters; InfoNCE over all pairs of the step goes round the ring of chips,
so that memory a chip depends on its own rows, not on how many chips there are.

Expect: no score; it was planned, never trained at this size. What a step takes and could
reach by the compiler's estimates is in tests/plan/pods.json; see docs/planning.md.

COMMAND: python train.py --config=configs/clip_l14.py --workdir=runs/clip_l14
What it takes: python -m mmjax.plan --config=configs/clip_l14.py --topology=v5e:16x16
In under a minute, on a CPU (easy-VQA; all of it works, nothing is learnt):
  python train.py --config=configs/clip_l14.py:tiny --workdir=runs/clip_l14_tiny
"""

import pathlib
import runpy

from ml_collections import ConfigDict

RELATIVE = pathlib.Path(__file__).with_name('siglip_so400m.py')


def get_config(variant: str = '') -> ConfigDict:
  config = runpy.run_path(str(RELATIVE))['get_config'](variant)
  tower = dict(activation='quick_gelu', remat='full', dtype='bfloat16')
  vision, text = config.model.vision, config.model.text
  config.model = dict(
    name='dual',
    embed_dim=768,
    logit_bias=False,
    dtype='bfloat16',
    vision=dict(
      name='vit',
      embed_dim=1024,
      num_layers=24,
      num_heads=16,
      mlp_dim=4096,
      position_grid=(16, 16),
      pool='class',
      patch_bias=False,
      embedding_norm=True,
      **tower,
    ),
    text=dict(
      name='unified',
      embed_dim=768,
      num_layers=12,
      num_heads=12,
      num_kv_heads=12,
      head_dim=64,
      mlp_dim=3072,
      max_positions=77,
      norm='layer',
      bias='all',
      gated=False,
      rotary=False,
      scale_embedding=False,
      **tower,
    ),
  )
  config.train.contrastive = dict(loss='infonce')
  config.optim.update(learning_rate=5e-4, weight_decay=0.2)
  if variant:
    small = 'embed_dim', 'num_layers', 'num_heads', 'mlp_dim'
    config.model.embed_dim = 64
    config.model.vision.update({k: vision[k] for k in (*small, 'position_grid')})
    text = {k: text[k] for k in (*small, 'num_kv_heads', 'head_dim', 'max_positions')}
    config.model.text.update(text)
    return config
  config.data.update(
    source='webdataset:data/laion/*.tar',
    path='data/laion_clip',
    tokenizer='data/clip/tokenizer.json',
    vocab_size=49_408,
    rows=32_768,
  )
  config.data.budget.update(stream=77, targets=77)
  config.sharding.mesh = dict(data=-1, fsdp=8)
  return config
