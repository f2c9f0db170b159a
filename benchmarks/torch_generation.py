"""The peers: public models of transformers, with media, that write greedily.

  flamingo   Idefics (2306.16527): Llama, CLIP's tower, a resampler, gated attention
  unified    Fuyu (Adept, 2023): raw patches in the stream of Persimmon

Weights are drawn once and saved; both sides read the same files. They are drawn wide
enough for greedy text to go on changing, and with gates that are open.
"""

import warnings

import numpy as np
import torch
import transformers
from prompts_generation import IMAGES, PATCH, SIDE, SLOTS, VOCAB, patches

# Of the language models, and of what makes latents of pictures.
WIDTHS = dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8)
VISION = dict(embed_dim=384, num_hidden_layers=6, num_attention_heads=6)
LATENTS, DEPTH = 64, 6
IMAGE = {'flamingo': VOCAB + 1, 'unified': VOCAB - 1}  # the token of an image's slot


def flamingo():
  config = transformers.IdeficsConfig(
    **WIDTHS,
    vocab_size=VOCAB,
    additional_vocab_size=2,
    intermediate_size=WIDTHS['hidden_size'] * 11 // 4,
    cross_layer_interval=2,
    alpha_initializer='ones',
    use_resampler=True,
    vision_config=dict(
      **VISION,
      intermediate_size=4 * VISION['embed_dim'],
      image_size=SIDE,
      patch_size=PATCH,
    ),
    perceiver_config=dict(
      use_resampler=True,
      resampler_n_latents=LATENTS,
      resampler_depth=DEPTH,
      resampler_n_heads=VISION['num_attention_heads'],
      resampler_head_dim=VISION['embed_dim'] // VISION['num_attention_heads'],
    ),
  )
  return transformers.IdeficsForVisionText2Text(config)


def unified():
  text = dict(
    **WIDTHS,
    model_type='persimmon',
    vocab_size=VOCAB,
    intermediate_size=4 * WIDTHS['hidden_size'],
  )
  config = transformers.FuyuConfig(
    text_config=text, patch_size=PATCH, image_token_id=IMAGE['unified']
  )
  return transformers.FuyuForCausalLM(config)


MODELS = {'flamingo': flamingo, 'unified': unified}
CLASSES = {
  'flamingo': transformers.IdeficsForVisionText2Text,
  'unified': transformers.FuyuForCausalLM,
}


def save(name, folder):
  """Draws a model's weights and writes them as transformers does."""
  torch.manual_seed(0)
  model = MODELS[name]()
  with torch.no_grad():
    for key, parameter in model.named_parameters():
      if 'embed_tokens' in key:
        parameter.mul_(50.0)  # so that a word tells on what follows
      elif parameter.ndim > 1:
        parameter.mul_(2.0)
  model.save_pretrained(folder)


class Peer:
  """A model of transformers that continues prompts."""

  def __init__(self, name, folder, words, pixels, bf16, static, threads):
    """words i64[B, WORDS], pixels f32[B, IMAGES, SIDE, SIDE, 3], already normalised."""
    torch.set_num_threads(threads)
    warnings.simplefilter('ignore')
    transformers.logging.set_verbosity_error()
    dtype = torch.bfloat16 if bf16 else torch.float32
    self.model = CLASSES[name].from_pretrained(folder, dtype=dtype).eval()
    self.more = {'cache_implementation': 'static'} if static else {}
    B, slots = len(words), IMAGES * SLOTS[name]
    ids = np.concatenate([np.full((B, slots), IMAGE[name]), words], 1)
    self.inputs = dict(
      input_ids=torch.tensor(ids), attention_mask=torch.ones(ids.shape, dtype=torch.long)
    )
    if name == 'flamingo':
      pixels = torch.tensor(pixels).permute(0, 1, 4, 2, 3)
      seen = np.minimum(np.arange(ids.shape[1]), IMAGES - 1)[:, None] == np.arange(IMAGES)
      mask = torch.tensor(np.broadcast_to(seen, (B, *seen.shape)).astype(int))
      self.inputs['image_attention_mask'] = mask
    else:
      pixels = torch.tensor(patches(pixels)).flatten(0, 1)
    self.inputs['pixel_values'] = pixels.to(dtype)

  @torch.inference_mode()
  def run(self, max_new):
    """The continuation, i64[B, max_new]."""
    out = self.model.generate(
      **self.inputs, max_new_tokens=max_new, min_new_tokens=max_new, do_sample=False,
      eos_token_id=None, pad_token_id=0, **self.more,
    )  # fmt: skip
    return out[:, -max_new:].numpy()
