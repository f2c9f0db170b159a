"""An encoder's tokens in the stream of a language model of Gemma 3's 4B widths.

Data: pages of text and images (Multimodal C4); a row of 4,096 slots holds one picture of
896 x 896, which takes 256 of them; 256 rows a step, a million tokens.

Model: So400m/14 ViT, frozen, each 4 x 4 of its 4,096 patches averaged; a projection and
the language model (3.9 B) are trained. Attention is whole in all layers (Gemma 3 has
windows in five of six).

Expect: no score; it was planned, never trained at this size. Modelled, by the compiler's
estimates, for 256 chips of v5e (the second command): 9.2 GiB a chip, 2.4e10 bytes sent,
MFU 0.56; see docs/planning.md.

COMMAND: python train.py --config=configs/unified_4b_image.py --workdir=runs/unified_4b
What it takes: python -m mmjax.plan --config=configs/unified_4b_image.py \\
  --topology=v5e:16x16
In under a minute, on a CPU (easy-VQA; all of it works, nothing is learnt):
  python train.py --config=configs/unified_4b_image.py:tiny --workdir=runs/4b_tiny
"""

from ml_collections import ConfigDict


def get_config(variant: str = '') -> ConfigDict:
  if variant not in ('', 'tiny'):
    raise ValueError(f"unified_4b_image has no variant {variant!r}; there is ':tiny'")
  config = ConfigDict(
    dict(
      data=dict(
        source='mmc4:data/mmc4/docs_*.jsonl',
        path='data/mmc4_gemma',
        options=dict(images='data/mmc4/images'),
        tokenizer='data/gemma3/tokenizer.json',
        vocab_size=262_144,
        rows=256,
        image=dict(patch=14, resize='fixed', size=896),
        image_positions='count',
        budget=dict(stream=4096, targets=4096, image=dict(patches=4096, items=1)),
        workers=8,
      ),
      model=dict(
        name='encoded',
        lm=dict(
          name='unified',
          embed_dim=2560,
          num_layers=34,
          num_heads=8,
          num_kv_heads=4,
          head_dim=256,
          mlp_dim=10_240,
          norm='rms_offset',
          activation='gelu_tanh',
          qk_norm=True,
          rope_base=1e6,
          remat='attention+mlp',
          dtype='bfloat16',
        ),
        vision=dict(
          name='vit',
          embed_dim=1152,
          num_layers=27,
          num_heads=16,
          mlp_dim=4304,
          position_grid=(64, 64),
          activation='gelu_tanh',
          dtype='bfloat16',
        ),
        projector=dict(name='pool', side=4, dtype='bfloat16'),
      ),
      optim=dict(
        name='adamw',
        learning_rate=2e-4,
        schedule=dict(name='cosine', warmup_steps=1000, final_share=0.1),
        weight_decay=0.1,
        clip_norm=1.0,
        freeze=('vision/*',),
        grad_dtype='bfloat16',
      ),
      sharding=dict(preset='fsdp', mesh=dict(data=-1, fsdp=32)),
      train=dict(steps=50_000, log_every=20, checkpoint_every=1000, keep=2),
    )
  )
  if variant == 'tiny':
    config.data.update(
      source='easy_vqa', path='data/easy_vqa', tokenizer='bpe:512', rows=4, workers=0
    )
    config.data.options = {}
    config.data.vocab_size = 640
    config.data.image = dict(patch=8, resize='fixed', size=64)
    config.data.budget = dict(stream=256, targets=80, image=dict(patches=256, items=4))
    config.model.lm.update(
      embed_dim=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, mlp_dim=128
    )
    config.model.vision.update(
      embed_dim=32, num_layers=1, num_heads=2, mlp_dim=64, position_grid=(8, 8)
    )
    config.sharding = dict(preset='fsdp', mesh=dict(data=1, fsdp=-1), cpu_devices=2)
    config.optim.schedule.warmup_steps = 5
    config.train.update(steps=20, log_every=5, checkpoint_every=10)
  return config
