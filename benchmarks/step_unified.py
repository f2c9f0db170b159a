"""Untagged early fusion, 59 M parameters, beside a plain PyTorch model.

transformers has no model that takes raw patches in the stream of a Llama and lets those
of an image see each other, so the peer is written out: `torch_unified.py`.

  fixed    8 rows of 512 slots, full: two images of 12 x 12 patches, 224 text tokens
  mixture  72 documents as web pages come: lognormal text, a geometric number of images
"""

import numpy as np
import step_documents as documents

SIZES = dict(
  vocab_size=32_000,
  embed_dim=512,
  num_layers=8,
  num_heads=8,
  num_kv_heads=8,
  head_dim=64,
  mlp_dim=2048,
  patch_channels=documents.CHANNELS,
  rope_base=10_000.0,
)
ROWS = {'fixed': 8, 'mixture': 8}  # of a packed batch
PADDED, GROUP = 8, None  # documents of a padded batch; of a packed one
GRID = (1, 12, 12)
SIDE, T = 16 * GRID[1], 512
# Of torch, by contestant: logits of which positions.
HEADS = {'torch': 'all', 'torch-trained': 'trained', 'torch-bf16': 'trained'}


def examples(case):
  rng = np.random.default_rng(case == 'mixture')

  def make(images, text):
    slots, vocab_size = (lambda item: item.grid), SIZES['vocab_size']
    return documents.example(
      rng, images, text, side=SIDE, slots=slots, vocab_size=vocab_size
    )

  if case == 'fixed':
    return [make(2, 224) for _ in range(8)]
  found = []
  while len(found) < 72:
    images = min(int(rng.geometric(0.7)) - 1, 2)
    text = int(rng.lognormal(np.log(70), 0.9))
    if text >= 8 and 144 * images + text <= T:
      found.append(make(images, text))
  return found


def budget(case):
  """A row holds T slots and what the largest documents need of the rest."""
  return documents.budget(T, 224 if case == 'fixed' else 480, 288, 2)


def config(dtype):
  fields = {k: v for k, v in SIZES.items() if k not in ('vocab_size', 'patch_channels')}
  return dict(
    data=dict(image=dict(patch=16, resize='fixed', size=SIDE)),
    model=dict(name='unified', tie_embeddings=False, scan=False, dtype=dtype, **fields),
  )


def vocab_size():
  return SIZES['vocab_size']


def torch_model():
  import torch_unified

  half = SIZES['head_dim'] // 2
  return torch_unified.Unified({**SIZES, 'rope_axes': [i % 3 for i in range(half)]})


def torch_batch(batch):
  import torch

  s, image = batch.stream, batch.bank['image']
  long = ('tokens', 'source', 'positions', 'order', 'first', 'last', 'segment_ids')
  fields = {name: torch.from_numpy(np.int64(getattr(s, name))) for name in long}
  return {
    **fields,
    'weights': torch.from_numpy(s.weights.copy()),
    'patches': torch.from_numpy(image.values.copy()),
  }


def torch_loss(model, batch, head):
  return model.loss(batch, head)


def weights(torch_model, _):
  """(model, parameters) here with the weights of the PyTorch model."""
  import jax.numpy as jnp

  from mmjax import models

  c, theirs = SIZES, torch_model.state_dict()
  D, H = c['embed_dim'], c['head_dim']

  def get(name, *shape):
    x = theirs[name].numpy().T if theirs[name].ndim == 2 else theirs[name].numpy()
    return jnp.asarray(x.reshape(shape) if shape else x)

  layers = {}
  for i in range(c['num_layers']):
    block = f'blocks.{i}.'
    heads = dict(query=c['num_heads'], key=c['num_kv_heads'], value=c['num_kv_heads'])
    attention = {k: get(f'{block}{k}.weight', D, n, H) for k, n in heads.items()}
    attention['out'] = get(f'{block}out.weight', c['num_heads'], H, D)
    layers[f'layer_{i}'] = dict(
      attention=attention,
      mlp={k: get(f'{block}{k}.weight') for k in ('gate', 'up', 'down')},
      attention_norm=dict(scale=get(f'{block}norm_attention.weight')),
      mlp_norm=dict(scale=get(f'{block}norm_mlp.weight')),
    )
  params = dict(
    embed=dict(
      # Looked-up rows are multiplied by sqrt(D) here.
      text=get('embed.weight').T / D**0.5,
      image=dict(kernel=get('patch.weight'), bias=get('patch.bias')),
    ),
    head=get('head.weight'),
    transformer=dict(layers, norm=dict(scale=get('norm.weight'))),
  )
  fields = dict(config('float32')['model'])
  made = models.build(
    **fields, vocab_size=c['vocab_size'], media=(('image', c['patch_channels']),)
  )
  return made, params
