"""CLIP (2103.00020): a ViT and a causal text tower that is read at its last token.

That is the token of the end of the text, the largest of the vocabulary; what transformers
pads with after it, the causal tower doesn't see, and a packed row doesn't have.
"""

from typing import Any

from mmjax.interop.families.family import (
  ACTIVATIONS,
  LAYERS,
  Family,
  activation,
  linear,
  norm,
  under,
)
from mmjax.interop.families.vit import Patches, image_config, image_fields, preprocessor
from mmjax.interop.leaf import Leaf
from mmjax.nn.vit import Vit

# What the published models were trained with, as shares of 255.
COLOURS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

_LAYER = 'encoder.layers.{}.'
_SELF = f'{_LAYER}self_attn.'
# Of both towers, and of SigLIP's.
TRANSFORMER = (
  *linear(f'{LAYERS}attention/query', f'{_SELF}q_proj', '(N H) D -> D N H'),
  *linear(f'{LAYERS}attention/key', f'{_SELF}k_proj', '(K H) D -> D K H'),
  *linear(f'{LAYERS}attention/value', f'{_SELF}v_proj', '(K H) D -> D K H'),
  *linear(f'{LAYERS}attention/out', f'{_SELF}out_proj', 'D (N H) -> N H D'),
  *norm(f'{LAYERS}attention_norm', f'{_LAYER}layer_norm1'),
  *linear(f'{LAYERS}mlp/up', f'{_LAYER}mlp.fc1', 'F D -> D F'),
  *linear(f'{LAYERS}mlp/down', f'{_LAYER}mlp.fc2', 'F D -> D F'),
  *norm(f'{LAYERS}mlp_norm', f'{_LAYER}layer_norm2'),
)
TEXT = (
  Leaf('embed/text', 'embeddings.token_embedding.weight', 'V D -> V D'),
  Leaf('embed/positions', 'embeddings.position_embedding.weight', 'P D -> P D'),
  *TRANSFORMER,
  *norm('transformer/norm', 'final_layer_norm'),
)
VISION = (
  Patches('patch/kernel', 'embeddings.patch_embedding.weight'),
  Leaf('class', 'embeddings.class_embedding', 'D -> D'),
  Leaf('position', 'embeddings.position_embedding.weight', 'S D -> S D'),
  *norm('embed_norm', 'pre_layrnorm'),  # their spelling
  *TRANSFORMER,
  *norm('transformer/norm', 'post_layernorm'),
)
_CLIP = (
  *under('text/', 'text_model.', TEXT),
  *under('vision/', 'vision_model.', VISION),
  Leaf('image_out/kernel', 'visual_projection.weight', 'E D -> D E'),
  Leaf('text_out/kernel', 'text_projection.weight', 'E D -> D E'),
  Leaf('log_scale', 'logit_scale', '->'),
)
_BUFFERS = ('*position_ids',)

# config.json says what differs from these.
_WIDTHS = dict(num_hidden_layers=12, hidden_act='quick_gelu', layer_norm_eps=1e-5)
_TEXT = dict(
  _WIDTHS, vocab_size=49_408, hidden_size=512, intermediate_size=2048,
  num_attention_heads=8, max_position_embeddings=77,
)  # fmt: skip
_VISION = dict(
  _WIDTHS, hidden_size=768, intermediate_size=3072, num_attention_heads=12,
  image_size=224, patch_size=32,
)  # fmt: skip


def widths(config: dict[str, Any]) -> dict[str, Any]:
  """The fields that the towers have in common."""
  return dict(
    embed_dim=config['hidden_size'],
    num_layers=config['num_hidden_layers'],
    num_heads=config['num_attention_heads'],
    mlp_dim=config['intermediate_size'],
    activation=activation(config, 'hidden_act', None),
    norm_eps=config['layer_norm_eps'],
  )


def their_widths(model: Any) -> dict[str, Any]:
  """The inverse of `widths`."""
  return dict(
    hidden_size=model.embed_dim,
    num_hidden_layers=model.num_layers,
    num_attention_heads=model.num_heads,
    intermediate_size=model.mlp_dim,
    hidden_act=ACTIVATIONS[model.activation],
    layer_norm_eps=model.norm_eps,
  )


def vision_fields(config: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
  """A Vit of CLIP's; `config` is that of the tower, `said` the whole.

  With pool='none', class_token=True, fewer num_layers and no final_norm it is what
  LLaVA reads.
  """
  config = {**_VISION, **config}
  return dict(
    **image_fields(config, said, COLOURS),
    **widths(config),
    pool='class',
    patch_bias=False,
    embedding_norm=True,
  )


def vision_config(model: Vit) -> dict[str, Any]:
  """The tower's config."""
  return dict(
    model_type='clip_vision_model', **image_config(model), **their_widths(model)
  )


def unused(model: Vit, prefix: str = '') -> tuple[str, ...]:
  """Tensors of a tower that a part of it leaves where they are."""
  patterns = [f'{prefix}embeddings.position_ids']
  if not model.final_norm:  # of a deeper one
    patterns += [f'{prefix}post_layernorm.*']
    layers = range(model.num_layers, 256)
    patterns += [f'{prefix}encoder.layers.{i}.*' for i in layers]
  if model.pool != 'map':
    patterns += [f'{prefix}head.*']
  return tuple(patterns)


def text_widths(model: Any) -> dict[str, Any]:
  """A text tower's config, but for its kind."""
  return dict(
    **their_widths(model),
    vocab_size=model.vocab_size,
    max_position_embeddings=model.max_positions,
  )


def _fields(config, names):
  text = {**_TEXT, **config.get('text_config', {}), **_old(config, 'text')}
  vision = {**config.get('vision_config', {}), **_old(config, 'vision')}
  vision = dict(vision_fields(vision, config), name='vit')
  shared = widths(text)
  N = shared['num_heads']
  return dict(
    vision=vision,
    text=dict(
      name='unified',
      **shared,
      vocab_size=text['vocab_size'],
      max_positions=text['max_position_embeddings'],
      num_kv_heads=N,
      head_dim=text['hidden_size'] // N,
      gated=False,
      norm='layer',
      bias='all',
      rotary=False,
      scale_embedding=False,
    ),
    media=(('image', vision['channels']),),
    embed_dim=config.get('projection_dim', 512),
    text_pool='last',
    logit_bias=False,
  )


def _old(config, tower):
  """What old files say in a second place, which counts more."""
  return config.get(f'{tower}_config_dict') or {}


def _config(model):
  text, vision = model.text, model.vision
  if not isinstance(vision, Vit):
    raise ValueError('its vision is no Vit')
  V = text.vocab_size
  return dict(
    architectures=['CLIPModel'],
    projection_dim=model.embed_dim,
    text_config=dict(
      model_type='clip_text_model',
      **text_widths(text),
      bos_token_id=V - 2,
      eos_token_id=V - 1,
    ),
    vision_config=vision_config(vision),
    **preprocessor(vision, 'CLIPImageProcessor'),
  )


def _tower_fields(config, names):
  return vision_fields(config, config)


def _tower_config(model):
  return dict(
    architectures=['CLIPVisionModel'],
    **vision_config(model),
    **preprocessor(model, 'CLIPImageProcessor'),
  )


CLIP = Family('dual', '', _CLIP, _BUFFERS, _fields, _config)
CLIP_VISION = Family(
  'vit',
  'vision_model.',
  under('', 'vision_model.', VISION),
  lambda model: unused(model, '*'),
  _tower_fields,
  _tower_config,
)
