"""SigLIP (2303.15343): a ViT with a map head, and a text tower that sees both ways.

The text is padded to 64 tokens, which see each other and of which the last is read: so
its pad tokens are tokens of the document, as many as it takes, and `text_pool` 'last'
finds the last of them.
"""

from typing import Any

from mmjax.interop.families.clip import (
  TEXT,
  TRANSFORMER,
  text_widths,
  their_widths,
  unused,
  widths,
)
from mmjax.interop.families.family import Family, linear, norm, under
from mmjax.interop.families.vit import (
  HALF,
  Patches,
  image_config,
  image_fields,
  preprocessor,
)
from mmjax.interop.leaf import Leaf
from mmjax.nn.vit import Vit


def _probe(name: str, part: int) -> tuple[Leaf, Leaf]:
  ours, theirs = f'map_head/attention/{name}', 'head.attention.in_proj_'
  return (
    Leaf(ours, f'{theirs}weight', '(3 N H) D -> D N H', part),
    Leaf(f'{ours}_bias', f'{theirs}bias', '(3 N H) -> N H', part),
  )


VISION = (
  Patches('patch/kernel', 'embeddings.patch_embedding.weight'),
  Leaf('patch/bias', 'embeddings.patch_embedding.bias', 'D -> D'),
  Leaf('position', 'embeddings.position_embedding.weight', 'S D -> S D'),
  *TRANSFORMER,
  *norm('transformer/norm', 'post_layernorm'),
  Leaf('map_head/query', 'head.probe', '1 1 D -> D'),
  *_probe('query', 0),
  *_probe('key', 1),
  *_probe('value', 2),
  *linear('map_head/attention/out', 'head.attention.out_proj', 'D (N H) -> N H D'),
  *norm('map_head/norm', 'head.layernorm'),
  *linear('map_head/mlp/up', 'head.mlp.fc1', 'F D -> D F'),
  *linear('map_head/mlp/down', 'head.mlp.fc2', 'F D -> D F'),
)
_SIGLIP = (
  *under('text/', 'text_model.', TEXT),
  *under('vision/', 'vision_model.', VISION),
  Leaf('text_out/kernel', 'text_model.head.weight', 'E D -> D E'),
  Leaf('text_out/bias', 'text_model.head.bias', 'D -> D'),
  Leaf('log_scale', 'logit_scale', '1 ->'),
  Leaf('bias', 'logit_bias', '1 ->'),
)
_WIDTHS = dict(
  hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
  hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6,
)  # fmt: skip
_TEXT = dict(_WIDTHS, vocab_size=32_000, max_position_embeddings=64)
_VISION = dict(_WIDTHS, image_size=224, patch_size=16, vision_use_head=True)


def vision_fields(config: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
  """A Vit of SigLIP's; `config` is that of the tower, `said` the whole."""
  config = {**_VISION, **config}
  return dict(
    **image_fields(config, said, (HALF, HALF)),
    **widths(config),
    pool='map' if config['vision_use_head'] else 'none',
  )


def vision_config(model: Vit) -> dict[str, Any]:
  """The tower's config."""
  return dict(
    model_type='siglip_vision_model',
    **image_config(model),
    **their_widths(model),
    vision_use_head=model.pool == 'map',
  )


def _fields(config, names):
  text = {**_TEXT, **config.get('text_config', {})}
  vision = vision_fields(config.get('vision_config', {}), config)
  shared = widths(text)
  N = shared['num_heads']
  return dict(
    vision=dict(vision, name='vit'),
    text=dict(
      name='encoder',
      **shared,
      vocab_size=text['vocab_size'],
      max_positions=text['max_position_embeddings'],
      num_kv_heads=N,
      head_dim=text['hidden_size'] // N,
      num_types=0,
      embedding_norm=False,
      post_norm=False,
    ),
    media=(('image', vision['channels']),),
    embed_dim=text.get('projection_size') or text['hidden_size'],
    text_pool='last',
    image_projection=False,
    projection_bias=True,
    temperature_init=0.1,
    bias_init=-10.0,
    max_scale=1000.0,  # theirs has no bound; the published ones are over CLIP's 100
  )


def _config(model):
  if not isinstance(model.vision, Vit):
    raise ValueError('its vision is no Vit')
  V = model.text.vocab_size
  return dict(
    architectures=['SiglipModel'],
    text_config=dict(
      model_type='siglip_text_model',
      **text_widths(model.text),
      projection_size=model.embed_dim,
      bos_token_id=V - 2,
      eos_token_id=V - 1,
    ),
    vision_config=vision_config(model.vision),
    **preprocessor(model.vision, 'SiglipImageProcessor'),
  )


def _tower_config(model):
  return dict(
    architectures=['SiglipVisionModel'],
    **vision_config(model),
    **preprocessor(model, 'SiglipImageProcessor'),
  )


SIGLIP = Family('dual', '', _SIGLIP, ('*position_ids',), _fields, _config)
SIGLIP_VISION = Family(
  'vit',
  'vision_model.',
  under('', 'vision_model.', VISION),
  lambda model: unused(model, '*'),
  lambda config, names: vision_fields(config, config),
  _tower_config,
)
