"""Flamingo (2204.14198) at the widths of OpenFlamingo-3B (2308.01390).

Data: pages of text and images (Multimodal C4); a row of 1,024 slots holds up to 4
pictures of 224 x 224; 1,024 rows a step, a million tokens.

Model: CLIP's ViT-L/14 and a language model of 1.3 B (24 layers), both frozen, which would
begin with published weights (`config.init`); a resampler of 64 latents and a gated
cross-attention before every layer are trained.

Expect: no score; it was planned, never trained at this size. Modelled, by the compiler's
estimates, for 256 chips of v5e (the second command): 5.6 GiB a chip, 1.1e10 bytes sent,
MFU 0.50; for 64 of v5p 19 GiB and 0.49; see docs/planning.md.

COMMAND: python train.py --config=configs/flamingo_3b.py --workdir=runs/flamingo_3b
What it takes: python -m mmjax.plan --config=configs/flamingo_3b.py --topology=v5e:16x16
In under a minute, on a CPU (easy-VQA; all of it works, nothing is learnt):
  python train.py --config=configs/flamingo_3b.py:tiny --workdir=runs/flamingo_3b_tiny
"""

from ml_collections import ConfigDict


def get_config(variant: str = '') -> ConfigDict:
  if variant not in ('', 'tiny'):
    raise ValueError(f"flamingo_3b has no variant {variant!r}; there is ':tiny'")
  config = ConfigDict(
    dict(
      data=dict(
        source='mmc4:data/mmc4/docs_*.jsonl',
        path='data/mmc4_neox',
        options=dict(images='data/mmc4/images'),
        tokenizer='data/neox/tokenizer.json',
        vocab_size=50_432,
        rows=1024,
        image=dict(patch=14, resize='fixed', size=224),
        budget=dict(stream=1024, targets=1024, image=dict(patches=1024, items=4)),
        workers=8,
      ),
      model=dict(
        name='flamingo',
        lm=dict(
          name='unified',
          embed_dim=2048,
          num_layers=24,
          num_heads=16,
          num_kv_heads=16,
          head_dim=128,
          mlp_dim=8192,
          norm='layer',
          gated=False,
          activation='gelu',
          scale_embedding=False,
          remat='attention+up',
          dtype='bfloat16',
        ),
        vision=dict(
          name='vit',
          embed_dim=1024,
          num_layers=24,
          num_heads=16,
          mlp_dim=4096,
          position_grid=(16, 16),
          class_token=True,
          patch_bias=False,
          embedding_norm=True,
          activation='quick_gelu',
          dtype='bfloat16',
        ),
        resampler=dict(
          embed_dim=1024, num_layers=6, num_heads=8, num_latents=64,
          remat='attention+up', dtype='bfloat16',
        ),
        cross_every=1,
        cross_heads=8,
        cross_head_dim=64,
      ),
      optim=dict(
        name='adamw',
        learning_rate=1e-4,
        schedule=dict(name='constant', warmup_steps=1875),
        weight_decay=0.1,
        clip_norm=1.0,
        freeze=('vision/*', 'lm/*'),
        grad_dtype='bfloat16',
      ),
      sharding=dict(preset='fsdp', mesh=dict(data=-1, fsdp=32)),
      train=dict(steps=50_000, log_every=20, checkpoint_every=1000, keep=2),
    )
  )  # fmt: skip
  if variant == 'tiny':
    config.data.update(
      source='easy_vqa', path='data/easy_vqa', tokenizer='bpe:512', rows=4, workers=0
    )
    config.data.options = {}
    config.data.vocab_size = 640
    config.data.image = dict(patch=8, resize='fixed', size=64)
    config.data.budget = dict(stream=256, targets=80, image=dict(patches=256, items=4))
    config.model.lm.update(
      embed_dim=64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=32, mlp_dim=64
    )
    config.model.vision.update(
      embed_dim=32, num_layers=1, num_heads=2, mlp_dim=64, position_grid=(8, 8)
    )
    config.model.resampler.update(embed_dim=32, num_layers=1, num_heads=2, num_latents=8)
    config.model.update(cross_heads=2, cross_head_dim=16, cross_mlp_dim=64)
    config.sharding = dict(preset='fsdp', mesh=dict(data=1, fsdp=-1), cpu_devices=2)
    config.optim.schedule.warmup_steps = 5
    config.train.update(steps=20, log_every=5, checkpoint_every=10)
  return config
