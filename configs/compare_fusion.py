"""One question, four fusions: where should text and picture meet?

The same data, steps, optimizer and, within 10 %, parameters (0.9 M):

  :early     raw patches enter the decoder's stream         4 layers
  :encoded   a ViT's tokens do                              2 + 2 layers
  :flamingo  the decoder looks at 16 latents of the ViT     2 + 1 + resampler
  :late      decoder and ViT meet at the logits             2 + 2 layers

Data: easy-VQA, as in configs/quickstart.py; a row holds at most 6 pictures, so that a
step has about as many documents in all four.

Expect: test accuracy 0.991 early, 0.962 encoded, 0.956 flamingo, 0.939 late, in four to
six minutes each on 2 CPU cores.

COMMAND: python train.py --config=configs/compare_fusion.py --workdir=runs/early
  for f in encoded flamingo late; do
    python train.py --config=configs/compare_fusion.py:$f --workdir=runs/$f; done
  python -m mmjax.eval.compare runs/early runs/encoded runs/flamingo runs/late
In under a minute (all of it works, nothing is learnt): ':tiny', ':late_tiny', ...
"""

from ml_collections import ConfigDict

VIT = dict(
  name='vit',
  embed_dim=128,
  num_layers=2,
  num_heads=4,
  mlp_dim=512,
  position_grid=(8, 8),
  scan=False,
  chunk=128,
  reach=63,
)
LM = dict(
  name='unified',
  embed_dim=128,
  num_layers=2,
  num_heads=4,
  num_kv_heads=4,
  head_dim=32,
  mlp_dim=384,
  qk_norm=True,
  scan=False,
  chunk=128,
  rope_base=100.0,
)
SHORT = LM | dict(reach=(194, 0))  # an image is one slot; 257 and 63 with its patches
MODELS = {
  'early': LM | dict(num_layers=4, reach=(257, 63)),
  'encoded': dict(
    name='encoded', lm=LM | dict(reach=(257, 63)), vision=VIT,
    projector=dict(name='linear'),
  ),
  'flamingo': dict(
    name='flamingo', lm=SHORT, vision=VIT | dict(num_layers=1),
    resampler=dict(embed_dim=128, num_layers=1, mlp_dim=128, num_latents=16, chunk=128),
    cross_mlp_dim=128, gate_init=0.5,
  ),
  'late': dict(name='late', lm=SHORT, vision=VIT | dict(pool='mean'), joint_dim=128),
}  # fmt: skip


def get_config(variant: str = 'early') -> ConfigDict:
  fusion, _, tiny = variant.partition('_')
  if variant == 'tiny':
    fusion, tiny = 'early', 'tiny'
  if fusion not in MODELS or tiny not in ('', 'tiny'):
    raise ValueError(
      f'compare_fusion has no variant {variant!r}; there are {", ".join(MODELS)}, each'
      " also with '_tiny', and 'tiny'"
    )
  slots = 1024 if fusion in ('early', 'encoded') else 640
  config = ConfigDict(
    dict(
      data=dict(
        source='easy_vqa',
        path='data/easy_vqa',
        tokenizer='bpe:512',
        rows=4,
        image=dict(patch=8, resize='fixed', size=64),
        budget=dict(stream=slots, targets=160, image=dict(patches=384, items=6)),
      ),
      model=MODELS[fusion],
      optim=dict(
        name='muon',
        learning_rate=2e-3,
        schedule=dict(name='cosine', warmup_steps=50),
        weight_decay=0.05,
        clip_norm=1.0,
      ),
      sharding=dict(preset='dp', max_replicated=1.0, cpu_devices=2),
      train=dict(steps=600, log_every=20, checkpoint_every=200, keep=1),
      eval=dict(vqa=dict(split='test', every=100, limit=500, rows=64, max_new=8)),
    )
  )
  if tiny:
    config.data.rows = 2
    config.train.update(steps=20, log_every=5, checkpoint_every=10)
    config.optim.schedule.warmup_steps = 5
    config.eval.vqa.update(every=10, limit=64)
    for part in (config.model, config.model.get('lm'), config.model.get('vision')):
      if part is not None and 'num_layers' in part:
        part.update(embed_dim=64, num_layers=1, num_heads=2, mlp_dim=64)
        if 'num_kv_heads' in part:
          part.num_kv_heads = 2
  return config
