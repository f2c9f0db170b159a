"""Late fusion from random weights: which emoji is it, by picture and by name.

Data: 3,786 emoji with their English names (npm, see `mmjax.data.emoji`), trained on the
drawings of Twitter and tested on those of Google. A picture is 64 x 64, on white; it is
moved, scaled, turned and recoloured a little every time.

Model: a ViT over 8 x 8 patches and a text encoder that sees both ways, InfoNCE over the
256 pairs of a step.

Expect: half an hour on two cores that had other work, 1.1 M parameters. Among all 3,786
drawings of Google, after 900 steps (61 epochs):
  picture to name  R@1 16.2 %, R@5 35.2 %, R@10 44.7 %, median rank 15
  name to picture  R@1 18.1 %, R@5 39.9 %, R@10 50.2 %, median rank 10
by chance R@1 0.03 %, R@5 0.13 %, R@10 0.26 %. Its subcategory (99) is right for 3.4 %,
less than the commonest one would be (13.0 %): it knows names, not classes.

The packages, once (nothing is downloaded by mmjax):
  npm install --prefix data/npm emoji-datasource-twitter@16.0.0 \\
      emoji-datasource-google@16.0.0 emojibase-data@17.0.0

COMMAND: python train.py --config=configs/clip_emoji.py --workdir=runs/clip_emoji
In under a minute (all of it works, nothing is learnt):
  python train.py --config=configs/clip_emoji.py:tiny --workdir=runs/clip_emoji_tiny
"""

from ml_collections import ConfigDict


def get_config(variant: str = '') -> ConfigDict:
  if variant not in ('', 'tiny'):
    raise ValueError(f"clip_emoji has no variant {variant!r}; there is ':tiny'")
  config = ConfigDict(
    dict(
      data=dict(
        source='emoji:data/npm',
        path='data/emoji',
        tokenizer='bpe:1024',
        rows=256,
        image=dict(patch=8, resize='fixed', size=64),
        augment=('warp', 'colour'),
        budget=dict(stream=20, targets=20, image=dict(patches=64, items=1)),
      ),
      model=dict(
        name='dual',
        embed_dim=128,
        text_pool='mean',
        vision=dict(
          name='vit',
          embed_dim=128,
          num_layers=4,
          num_heads=4,
          mlp_dim=384,
          position_grid=(8, 8),
          pool='mean',
          scan=False,
        ),
        text=dict(
          name='encoder',
          embed_dim=128,
          num_layers=2,
          num_heads=4,
          num_kv_heads=4,
          head_dim=32,
          mlp_dim=256,
          num_types=0,
          max_positions=64,
          post_norm=False,
          scan=False,
        ),
      ),
      optim=dict(
        name='muon',
        learning_rate=6e-3,
        schedule=dict(name='cosine', warmup_steps=30),
        weight_decay=0.1,
        clip_norm=1.0,
      ),
      sharding=dict(preset='dp', max_replicated=1.0, cpu_devices=2),
      train=dict(
        task='contrastive', steps=900, log_every=20, checkpoint_every=300, keep=2
      ),
      eval=dict(
        retrieval=dict(split='test', every=300, limit=1000),
        zeroshot=dict(split='test', templates=('{}', '{} emoji', 'a drawing of {}')),
      ),
    )
  )
  if variant == 'tiny':
    config.data.rows = 32
    for tower in (config.model.vision, config.model.text):
      tower.update(embed_dim=64, num_layers=1, num_heads=2, mlp_dim=64)
    config.model.text.update(num_kv_heads=2)
    config.optim.schedule.warmup_steps = 5
    config.train.update(steps=20, log_every=5, checkpoint_every=10)
    config.eval.retrieval.update(every=10, limit=64)
    config.eval.zeroshot.limit = 64
  return config
