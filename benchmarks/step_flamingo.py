"""A Flamingo type, 92 M parameters, beside transformers' IDEFICS, all of it trained.

fixed    8 rows of two images and 256 slots of text
mixture  64 documents of 0 to 3 images and lognormal text
"""

import numpy as np
import step_documents as documents

# As transformers names them. The gates begin open: at 0 nothing would be compared.
SIZES = dict(
  vocab_size=32_000,
  additional_vocab_size=2,
  hidden_size=512,
  intermediate_size=1408,
  num_hidden_layers=8,
  num_attention_heads=8,
  cross_layer_interval=2,
  qk_layer_norms=False,
  use_resampler=True,
  tie_word_embeddings=False,
  alpha_initializer='ones',
  alpha_type='float',
  rms_norm_eps=1e-6,
  vision_config=dict(
    embed_dim=384,
    intermediate_size=1536,
    num_hidden_layers=6,
    num_attention_heads=6,
    image_size=96,
    patch_size=16,
    hidden_act='gelu',
  ),
  perceiver_config=dict(
    use_resampler=True,
    resampler_n_latents=64,
    resampler_depth=6,
    resampler_n_heads=6,
    resampler_head_dim=64,
    qk_layer_norms_perceiver=False,
  ),
)
ROWS = {'fixed': 8, 'mixture': 7}
PADDED, GROUP = 8, None
SIDE, T, PATCHES = 96, 256, 36
HEADS = {'torch': 'all', 'torch-bf16': 'all'}


def examples(case):
  rng = np.random.default_rng(case == 'mixture')

  def make(images, text):
    slots, vocab_size = (lambda item: (1, 1, 1)), SIZES['vocab_size']
    return documents.example(
      rng, images, text, side=SIDE, slots=slots, vocab_size=vocab_size
    )

  if case == 'fixed':
    return [make(2, T - 2) for _ in range(8)]
  found = []
  while len(found) < 64:
    images = min(int(rng.geometric(0.5)) - 1, 3)
    text = int(rng.lognormal(np.log(60), 0.9))
    if 8 <= text <= T - images:
      found.append(make(images, text))
  return found


def budget(case):
  items = 2 if case == 'fixed' else 3
  return documents.budget(T, T - 2 if case == 'fixed' else T, PATCHES * items, items)


def _fields():
  from mmjax.interop.families import FAMILIES

  return FAMILIES['idefics'].fields(SIZES, frozenset())


def config(dtype):
  fields = _fields()
  for part in ('lm', 'vision', 'resampler'):
    fields[part] = dict(fields[part], dtype=dtype)
    if part != 'resampler':
      fields[part]['scan'] = False
  fields.pop('media')
  return dict(
    data=dict(image=dict(patch=16, resize='fixed', size=SIDE)),
    model=dict(fields, name='flamingo'),
  )


def vocab_size():
  return SIZES['vocab_size'] + SIZES['additional_vocab_size']


def torch_model():
  from transformers import IdeficsConfig, IdeficsForVisionText2Text

  net = IdeficsForVisionText2Text(IdeficsConfig(**SIZES)).train()
  # Theirs freezes what was trained before; here all is trained but a norm nobody reads.
  net.requires_grad_(True)
  net.model.vision_model.post_layernorm.requires_grad_(False)
  return net


def torch_batch(batch):
  import torch

  s = batch.stream
  vision = _fields()['vision']
  pixels = documents.pictures(batch, SIDE, vision['mean'], vision['std'])
  here, I = s.tokens < 0, pixels.shape[1]
  latest = np.cumsum(here, 1) - 1  # -1: there is no image yet
  seen = (latest[..., None] == np.arange(I)) & (s.segment_ids > 0)[..., None]
  long = dict(
    input_ids=np.where(here, vocab_size() - 1, s.tokens),
    attention_mask=s.segment_ids > 0,
    image_attention_mask=seen,
    labels=np.where((s.weights > 0) & ~here, s.tokens, -100),
  )
  made = {k: torch.from_numpy(np.int64(v)) for k, v in long.items()}
  return {**made, 'pixel_values': torch.from_numpy(pixels)}


def torch_loss(model, batch, head):
  import torch.nn.functional as F

  del head  # theirs makes the logits of all positions
  batch = dict(batch)
  # Its own loss takes no vocabulary that has additional words.
  labels = batch.pop('labels')[:, 1:].flatten()
  logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
  return F.cross_entropy(logits.float(), labels, ignore_index=-100)


weights = documents.through_files
