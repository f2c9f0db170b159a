"""A CLIP type, 52 M parameters, beside transformers' CLIPModel: 64 pairs a step.

fixed    captions of 77 tokens, one pair a row
mixture  captions of lognormal lengths, here many pairs a row, there padded to the
         longest of 64
"""

import numpy as np
import step_documents as documents

SIZES = dict(
  projection_dim=512,
  text_config=dict(
    vocab_size=49_408,
    hidden_size=384,
    intermediate_size=1536,
    num_hidden_layers=6,
    num_attention_heads=6,
    max_position_embeddings=77,
    bos_token_id=49_406,
    eos_token_id=49_407,
  ),
  vision_config=dict(
    hidden_size=384,
    intermediate_size=1536,
    num_hidden_layers=12,
    num_attention_heads=6,
    image_size=96,
    patch_size=16,
  ),
)
ROWS = {'fixed': 64, 'mixture': 16}
PADDED = GROUP = 64
SIDE, T, PATCHES = 96, 77, 36
HEADS = {'torch': 'all', 'torch-bf16': 'all'}


def examples(case):
  rng = np.random.default_rng(case == 'mixture')

  def make(text):
    V = SIZES['text_config']['vocab_size']
    slots = lambda item: (0, 0, 0)  # noqa: E731
    return documents.example(
      rng, 1, text, side=SIDE, slots=slots, vocab_size=V, end_id=V - 1
    )

  if case == 'fixed':
    return [make(T) for _ in range(64)]
  lengths = np.clip(rng.lognormal(np.log(15), 0.5, 128), 4, T).astype(int)
  return [make(int(n)) for n in lengths]


def budget(case):
  items = 1 if case == 'fixed' else 4
  return documents.budget(T, T, PATCHES * items, items)


def _fields():
  from mmjax.interop.families import FAMILIES

  return FAMILIES['clip'].fields(SIZES, frozenset())


def config(dtype):
  fields = dict(_fields(), dtype=dtype)
  for part in ('text', 'vision'):
    fields[part] = dict(fields[part], dtype=dtype, scan=False)
  fields.pop('media')
  return dict(
    data=dict(image=dict(patch=16, resize='fixed', size=SIDE)),
    model=dict(fields, name='dual'),
    train=dict(task='contrastive'),
  )


def vocab_size():
  return SIZES['text_config']['vocab_size']


def torch_model():
  from transformers import CLIPConfig, CLIPModel

  return CLIPModel(CLIPConfig(**SIZES)).train()


def torch_batch(batch):
  import torch

  s = batch.stream
  vision = _fields()['vision']
  pixels = documents.pictures(batch, SIDE, vision['mean'], vision['std'])
  long = dict(input_ids=np.maximum(s.tokens, 0), attention_mask=s.segment_ids > 0)
  made = {k: torch.from_numpy(np.int64(v)) for k, v in long.items()}
  return {**made, 'pixel_values': torch.from_numpy(pixels[:, 0])}


def torch_loss(model, batch, head):
  del head
  return model(**batch, return_loss=True).loss


weights = documents.through_files
