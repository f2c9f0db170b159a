"""IDEFICS (2306.16527), an open Flamingo: Llama, CLIP's tower, resampler, gates.

Its cross-attention has the norms and the gated MLP of Llama; new words stand in tables
of their own, beside the frozen ones; the resampler reads the class token too. The
latest image is what a token looks at; an image's marker is the last word, '<image>'.
"""

from mmjax.interop.families import clip
from mmjax.interop.families.family import (
  Family,
  activation,
  linear,
  norm,
  only,
  under,
)
from mmjax.interop.families.llama import LLAMA
from mmjax.interop.families.vit import preprocessor
from mmjax.interop.leaf import Leaf
from mmjax.nn.vit import Vit

_CROSS = 'model.gated_cross_attn_layers.{}.'
_BLOCK = 'model.perceiver_resampler.blocks.{}.'
_HEADS = dict(query='(N H) D -> D N H', key='(N H) C -> C N H', value='(N H) C -> C N H')


def _attention(ours, theirs, out, norms):
  """Cross-attention; `norms` names theirs, of queries and of keys."""
  q, k = norms
  return (
    *(
      Leaf(f'{ours}{name}', f'{theirs}{name[0]}_proj.weight', axes)
      for name, axes in _HEADS.items()
    ),
    Leaf(f'{ours}out', f'{theirs}{out}.weight', 'D (N H) -> N H D'),
    *norm(f'{ours}query_norm', f'{theirs}{q}'),
    *norm(f'{ours}key_norm', f'{theirs}{k}'),
  )


def _table(model):
  gate = '1 1 D -> D' if model.gate_vector else '1 ->'
  norms = ('q_layer_norm', 'k_layer_norm')
  return (
    *under('lm/', '', LLAMA.leaves),
    Leaf(
      'lm/embed/extra', 'model.embed_tokens.additional_embedding.weight', 'X D -> X D'
    ),
    Leaf('lm/extra_head', 'lm_head.additional_fc.weight', 'X D -> D X'),
    *under('vision/', 'model.vision_model.', clip.VISION),
    Leaf('resampler/latents', 'model.perceiver_resampler.latents', 'R D -> R D'),
    *_attention('resampler/layers/attention/', f'{_BLOCK}0.', 'output_proj', norms),
    *norm('resampler/layers/media_norm', f'{_BLOCK}0.context_layer_norm'),
    *norm('resampler/layers/latent_norm', f'{_BLOCK}0.latents_layer_norm'),
    *norm('resampler/layers/mlp_norm', f'{_BLOCK}1.ln'),
    *linear('resampler/layers/mlp/up', f'{_BLOCK}1.fc', 'F D -> D F'),
    *linear('resampler/layers/mlp/down', f'{_BLOCK}1.c_proj', 'D F -> F D'),
    *norm('resampler/norm', 'model.perceiver_resampler.layer_norm'),
    *_attention('cross/attention/', f'{_CROSS}cross_attn.', 'o_proj', norms),
    *norm('cross/attention_norm', f'{_CROSS}input_layernorm'),
    *norm('cross/mlp_norm', f'{_CROSS}post_attention_layernorm'),
    *linear('cross/mlp/gate', f'{_CROSS}mlp.gate_proj', 'F D -> D F'),
    *linear('cross/mlp/up', f'{_CROSS}mlp.up_proj', 'F D -> D F'),
    *linear('cross/mlp/down', f'{_CROSS}mlp.down_proj', 'D F -> F D'),
    Leaf('cross/attention_gate', f'{_CROSS}alpha_cross_attn', gate),
    Leaf('cross/mlp_gate', f'{_CROSS}alpha_dense', gate),
  )


def _ignored(model):
  # The norm of the class token that CLIP pools, which nobody reads.
  return ('*.rotary_emb.inv_freq', '*vision_model*post_layernorm.*', '*position_ids')


# What config.json leaves unsaid.
_VISION = dict(
  embed_dim=768, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
  hidden_act='gelu', layer_norm_eps=1e-5, patch_size=14,
)  # fmt: skip
_PERCEIVER = dict(
  resampler_n_latents=64, resampler_depth=6, resampler_n_heads=16,
  resampler_head_dim=96, qk_layer_norms_perceiver=False,
)  # fmt: skip
_LLAMA = dict(
  hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
  num_attention_heads=32, vocab_size=32_000, num_key_value_heads=None,
)  # fmt: skip


def _fields(config, names):
  only({'use_resampler': config.get('use_resampler', False)}, 'use_resampler', True)
  only(config, 'alpha_type', 'float', 'vector')
  config = {**_LLAMA, **config}
  D, k = config['hidden_size'], config.get('cross_layer_interval', 1)
  if config['num_hidden_layers'] % k:
    raise ValueError(
      f'config.json: cross_layer_interval={k} is no divisor of num_hidden_layers'
    )
  vision = {**_VISION, **(config.get('vision_config') or {})}
  vision.setdefault('hidden_size', vision['embed_dim'])
  perceiver = {**_PERCEIVER, **(config.get('perceiver_config') or {})}
  fields = clip.vision_fields(vision, config)
  fields |= dict(
    name='vit', pool='none', class_token=True, give_class=True, final_norm=False
  )
  extra = config.get('additional_vocab_size', 0)
  C, vocab = vision['hidden_size'], config['vocab_size'] + extra
  act = activation(config, 'hidden_act', 'silu')
  said = LLAMA.fields({'tie_word_embeddings': False, **config}, names)
  return dict(
    lm=dict(said, name='unified', vocab_size=vocab, extra_words=extra),
    vision=fields,
    resampler=dict(
      embed_dim=C,
      num_layers=perceiver['resampler_depth'],
      num_heads=perceiver['resampler_n_heads'],
      head_dim=perceiver['resampler_head_dim'],
      mlp_dim=4 * C,
      num_latents=perceiver['resampler_n_latents'],
      activation='relu',
      qk_norm=perceiver['qk_layer_norms_perceiver'],
      norm_eps=1e-5,
    ),
    media=(('image', fields['channels']),),
    marker=vocab - 1,
    cross_every=k,
    cross_heads=config['num_attention_heads'],
    cross_head_dim=D // config['num_attention_heads'],
    cross_mlp_dim=config['intermediate_size'],
    cross_norm='rms',
    cross_activation=act,
    cross_gated=True,
    cross_qk_norm=config.get('qk_layer_norms', False),
    gate_vector=config.get('alpha_type', 'float') == 'vector',
  )


def _config(model):
  lm, r = model.lm, model.resampler
  if not isinstance(model.vision, Vit):
    raise ValueError('its vision is no Vit')
  vision = clip.vision_config(model.vision)
  del vision['model_type']
  vision['embed_dim'] = vision.pop('hidden_size')
  text = LLAMA.config(lm)
  for key in ('num_key_value_heads', 'head_dim', 'attention_bias', 'mlp_bias'):
    del text[key]
  return dict(
    text,
    architectures=['IdeficsForVisionText2Text'],
    vocab_size=lm.vocab_size - lm.extra_words,
    additional_vocab_size=lm.extra_words,
    cross_layer_interval=model.cross_every,
    qk_layer_norms=model.cross_qk_norm,
    alpha_type='vector' if model.gate_vector else 'float',
    use_resampler=True,
    vision_config=vision,
    perceiver_config=dict(
      use_resampler=True,
      resampler_n_latents=r.num_latents,
      resampler_depth=r.num_layers,
      resampler_n_heads=r.num_heads,
      resampler_head_dim=r.head_dim,
      qk_layer_norms_perceiver=r.qk_norm,
    ),
    **preprocessor(model.vision, 'IdeficsImageProcessor'),
  )


IDEFICS = Family('flamingo', '', _table, _ignored, _fields, _config)
