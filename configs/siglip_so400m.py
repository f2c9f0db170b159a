"""SigLIP's two towers of the shape-optimised 400M (2303.15343, 2305.13035), 224 pixels.

Data: image and caption (WebDataset); 4,096 pairs a step, one a row: 256 patches, 64
tokens.

Model: 0.43 B and 0.45 B parameters; the sigmoid loss over all pairs of the step goes
round the ring of chips, so that no chip holds more than its own rows of logits.

Expect: no score; it was planned, never trained at this size. Modelled by the compiler's
estimates, on v5e:8x8: 645 ms a step, MFU 0.41, 3.4 GiB of a chip, 6.4e9 bytes sent; see
docs/planning.md.

COMMAND: python train.py --config=configs/siglip_so400m.py --workdir=runs/siglip_so400m
What it takes: python -m mmjax.plan --config=configs/siglip_so400m.py --topology=v5e:8x8
In under a minute, on a CPU (easy-VQA; all of it works, nothing is learnt):
  python train.py --config=configs/siglip_so400m.py:tiny --workdir=runs/siglip_tiny
"""

from ml_collections import ConfigDict


def get_config(variant: str = '') -> ConfigDict:
  if variant not in ('', 'tiny'):
    raise ValueError(f"siglip_so400m has no variant {variant!r}; there is ':tiny'")
  tower = dict(
    embed_dim=1152,
    num_layers=27,
    num_heads=16,
    mlp_dim=4304,
    activation='gelu_tanh',
    dtype='bfloat16',
  )
  config = ConfigDict(
    dict(
      data=dict(
        source='webdataset:data/webli/*.tar',
        path='data/webli_siglip',
        tokenizer='data/siglip/spiece.model',
        vocab_size=32_000,
        rows=4096,
        image=dict(patch=14, resize='fixed', size=224),
        budget=dict(stream=64, targets=64, image=dict(patches=256, items=1)),
        workers=8,
      ),
      model=dict(
        name='dual',
        embed_dim=1152,
        image_projection=False,
        projection_bias=True,
        temperature_init=0.1,
        bias_init=-10.0,
        dtype='bfloat16',
        vision=dict(
          name='vit', position_grid=(16, 16), pool='map', remat='full', **tower
        ),
        text=dict(
          name='encoder',
          num_kv_heads=16,
          head_dim=72,
          max_positions=64,
          num_types=0,
          embedding_norm=False,
          post_norm=False,
          remat='attention+up',
          **tower,
        ),
      ),
      optim=dict(
        name='adamw',
        learning_rate=1e-3,
        schedule=dict(name='cosine', warmup_steps=5000),
        weight_decay=1e-4,
        clip_norm=1.0,
        grad_dtype='bfloat16',
      ),
      sharding=dict(preset='fsdp', mesh=dict(data=-1, fsdp=32)),
      train=dict(
        task='contrastive',
        contrastive=dict(loss='sigmoid'),
        steps=200_000,
        log_every=50,
        checkpoint_every=2000,
        keep=2,
      ),
    )
  )
  if variant == 'tiny':
    config.data.update(
      source='easy_vqa', path='data/easy_vqa', tokenizer='bpe:512', rows=8, workers=0
    )
    config.data.vocab_size = 640
    config.data.image = dict(patch=8, resize='fixed', size=64)
    config.data.budget = dict(stream=256, targets=80, image=dict(patches=64, items=1))
    for part in (config.model.vision, config.model.text):
      part.update(embed_dim=64, num_layers=1, num_heads=2, mlp_dim=64)
    config.model.embed_dim = 64
    config.model.vision.position_grid = (8, 8)
    config.model.text.update(num_kv_heads=2, head_dim=32, max_positions=256)
    config.sharding = dict(
      preset='fsdp', mesh=dict(data=1, fsdp=-1), cpu_devices=2, max_replicated=1.0
    )
    config.optim.schedule.warmup_steps = 5
    config.train.update(steps=20, log_every=5, checkpoint_every=10)
  return config
