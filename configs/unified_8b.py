"""Untagged early fusion at the widths of Llama-3.1-8B, for a pod of 256 chips.

Data: pages of text and images in their order (Multimodal C4, `mmjax.data.mmc4`; the
images are fetched by others). Raw patches of 16 x 16 pixels at native aspect ratio stand
in the stream; 512 rows of 4,096 slots a step, two million tokens.

Model: 8.0 B parameters, all trained; bf16 compute, f32 parameters and moments, split over
64 chips, rows of the batch over all.

Expect: no score; it was planned, never trained at this size. Modelled, by the compiler's
estimates, for 256 chips of v5e (the second command): 14.4 GiB a chip, 4.5e10 bytes sent,
MFU 0.56; see docs/planning.md.

COMMAND: python train.py --config=configs/unified_8b.py --workdir=runs/unified_8b
What it takes: python -m mmjax.plan --config=configs/unified_8b.py --topology=v5e:16x16
In under a minute, on a CPU (easy-VQA; all of it works, nothing is learnt):
  python train.py --config=configs/unified_8b.py:tiny --workdir=runs/unified_8b_tiny
"""

from ml_collections import ConfigDict


def get_config(variant: str = '') -> ConfigDict:
  if variant not in ('', 'tiny'):
    raise ValueError(f"unified_8b has no variant {variant!r}; there is ':tiny'")
  config = ConfigDict(
    dict(
      data=dict(
        source='mmc4:data/mmc4/docs_*.jsonl',
        path='data/mmc4_llama',
        options=dict(images='data/mmc4/images'),
        tokenizer='data/llama3/tokenizer.json',
        vocab_size=128_256,
        rows=512,
        image=dict(patch=16, resize='native', max_patches=1024),
        budget=dict(stream=4096, targets=4096, image=dict(patches=2048, items=16)),
        workers=8,
      ),
      model=dict(
        name='unified',
        embed_dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=14_336,
        tie_embeddings=False,
        rope_base=500_000.0,
        norm_eps=1e-5,
        remat='attention+up',
        dtype='bfloat16',
      ),
      optim=dict(
        name='adamw',
        learning_rate=3e-4,
        schedule=dict(name='cosine', warmup_steps=2000, final_share=0.1),
        weight_decay=0.1,
        clip_norm=1.0,
        grad_dtype='bfloat16',
      ),
      sharding=dict(preset='fsdp', mesh=dict(data=-1, fsdp=64)),
      train=dict(steps=100_000, log_every=20, checkpoint_every=1000, keep=2),
    )
  )
  if variant == 'tiny':
    config.data.update(
      source='easy_vqa', path='data/easy_vqa', tokenizer='bpe:512', rows=4, workers=0
    )
    config.data.options = {}
    config.data.vocab_size = 640
    config.data.image = dict(patch=8, resize='fixed', size=64)
    config.data.budget = dict(stream=512, targets=80, image=dict(patches=256, items=4))
    config.model.update(
      embed_dim=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, mlp_dim=128
    )
    config.sharding = dict(preset='fsdp', mesh=dict(data=1, fsdp=-1), cpu_devices=2)
    config.optim.schedule.warmup_steps = 5
    config.train.update(steps=20, log_every=5, checkpoint_every=10)
  return config
