"""PaliGemma-3B (2407.07726) at 224 pixels, all of it trained, as in its stages 1 and 2.

Data: image and text (WebDataset, as img2dataset writes it); a picture takes 256 slots,
its text 128; 512 pictures a step.

Model: So400m/14 ViT (0.4 B), a linear projection, Gemma 2B (2.5 B). The prompt, picture
included, sees all of itself; bf16 compute, f32 parameters and moments.

Expect: no score; it was planned, never trained at this size. Modelled by the compiler's
estimates, on v5e:8x8: 454 ms a step, MFU 0.51, 3.1 GiB of a chip, 1.5e10 bytes sent; see
docs/planning.md.

COMMAND: python train.py --config=configs/paligemma_3b.py --workdir=runs/paligemma_3b
What it takes: python -m mmjax.plan --config=configs/paligemma_3b.py --topology=v5e:8x8
In under a minute, on a CPU (easy-VQA; all of it works, nothing is learnt):
  python train.py --config=configs/paligemma_3b.py:tiny --workdir=runs/paligemma_tiny
"""

import pathlib
import runpy

from ml_collections import ConfigDict

RELATIVE = pathlib.Path(__file__).with_name('unified_4b_image.py')


def get_config(variant: str = '') -> ConfigDict:
  config = runpy.run_path(str(RELATIVE))['get_config'](variant)
  config.data.prompt_attention = 'block'
  config.model.projector = dict(name='linear', dtype='bfloat16')
  config.model.lm.qk_norm = False
  config.model.lm.rope_base = 10_000.0
  config.optim.freeze = ()
  if variant:
    config.data.budget.stream = 512
    return config
  config.data.update(
    source='webdataset:data/webli/*.tar',
    path='data/webli_gemma',
    tokenizer='data/paligemma/tokenizer.json',
    vocab_size=257_216,
    rows=512,
  )
  config.data.options = {}
  config.data.image = dict(patch=14, resize='fixed', size=224)
  config.data.budget = dict(stream=384, targets=128, image=dict(patches=256, items=1))
  config.model.lm.update(
    embed_dim=2048,
    num_layers=18,
    num_heads=8,
    num_kv_heads=1,
    mlp_dim=16_384,
    remat='attention',
  )
  config.model.vision.update(position_grid=(16, 16), remat='attention')
  config.sharding.mesh = dict(data=-1, fsdp=32)
  config.optim.grad_dtype = 'bfloat16'
  config.train.steps = 100_000
  return config
