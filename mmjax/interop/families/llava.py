"""LLaVA (2304.08485, 2310.03744) and PaliGemma (2407.07726): `models.encoded` both.

LLaVA looks at CLIP's patches as its last layer but one gives them, so what is loaded is
a tower without its last layer, and what is exported says so. Its slots are tokens like
others, causal and counted on; PaliGemma's stand in a prefix that sees itself:

Which token their files have at an image's slot, our models don't know: `export` takes
image_token_index=..., where it isn't that of the published model.

  data for LLaVA      image_attention='causal', image_positions='count'
  data for PaliGemma  prompt_attention='block', image_positions='count'
"""

from typing import Any

from mmjax.interop.families import clip, siglip
from mmjax.interop.families.family import (
  ACTIVATIONS,
  Family,
  activation,
  linear,
  only,
  under,
)
from mmjax.interop.families.llama import GEMMA, LLAMA, QWEN2
from mmjax.interop.families.vit import preprocessor
from mmjax.names import closest
from mmjax.nn.projector import LinearProjector, MlpProjector
from mmjax.nn.vit import Vit

_TOWER, _PROJECTOR = 'vision_tower.vision_model.', 'multi_modal_projector.'
# Newer versions of transformers name their modules so; files are mostly as above.
ALIASES = (
  ('vision_tower.', 'model.vision_tower.'),
  (_TOWER, 'vision_tower.'),
  (f'model.{_TOWER}', 'model.vision_tower.'),
  (_PROJECTOR, f'model.{_PROJECTOR}'),
  ('language_model.model.', 'model.language_model.'),
  ('language_model.lm_head.', 'lm_head.'),
)
# By model_type of text_config, and what it leaves unsaid.
_TEXTS = {'llama': LLAMA, 'qwen2': QWEN2}
_LLAMA = dict(
  hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
  num_attention_heads=32,
)  # fmt: skip


def text_fields(family: Family, text: dict[str, Any], tied: bool) -> dict[str, Any]:
  """The language model's fields, with its name."""
  said = family.fields({**text, 'tie_word_embeddings': tied}, frozenset())
  return dict(said, name=family.model)


def text_config(family: Family, kind: str, model: Any) -> dict[str, Any]:
  """The language model's config, as a section."""
  said = family.config(model)
  del said['architectures']
  return dict(said, model_type=kind)


def _ignored(model):
  if not isinstance(model.vision, Vit):
    return ()
  return ('*.rotary_emb.inv_freq', *clip.unused(model.vision, '*vision_tower*'))


def _table(vision, *projector):
  return (
    *under('lm/', 'language_model.', LLAMA.leaves),
    *under('vision/', _TOWER, vision),
    *under('projector/', _PROJECTOR, projector),
  )


def _check(model, projector):
  if not isinstance(model.vision, Vit):
    raise ValueError('its vision is no Vit')
  if type(model.projector) is not projector:
    raise ValueError(f'its projector is {type(model.projector).__name__}')


def _llava_fields(config, names):
  vision = config.get('vision_config') or {}
  only(vision, 'model_type', 'clip_vision_model')
  only(config, 'vision_feature_select_strategy', 'default')
  only(config, 'multimodal_projector_bias', True)
  fields = clip.vision_fields(vision, config)
  layer, L = config.get('vision_feature_layer', -2), fields['num_layers']
  if not isinstance(layer, int) or not (-L <= layer <= L and layer):
    raise ValueError(f'config.json: vision_feature_layer={layer!r} is no layer of {L}')
  used = layer if layer >= 0 else L + 1 + layer
  fields |= dict(
    name='vit', num_layers=used, pool='none', class_token=True, final_norm=False
  )
  text = {**_LLAMA, **(config.get('text_config') or {})}
  kind = text.get('model_type', 'llama')
  if kind not in _TEXTS:
    raise ValueError(f'config.json: unknown text_config {kind!r}{closest(kind, _TEXTS)}')
  return dict(
    lm=text_fields(_TEXTS[kind], text, config.get('tie_word_embeddings', False)),
    vision=fields,
    projector=dict(
      name='mlp', activation=activation(config, 'projector_hidden_act', 'gelu')
    ),
    media=(('image', fields['channels']),),
  )


def _llava_config(model):
  _check(model, MlpProjector)
  kind = 'qwen2' if model.lm.bias == 'qkv' else 'llama'
  return dict(
    architectures=['LlavaForConditionalGeneration'],
    text_config=text_config(_TEXTS[kind], kind, model.lm),
    vision_config=clip.vision_config(model.vision),
    vision_feature_layer=-1,
    vision_feature_select_strategy='default',
    projector_hidden_act=ACTIVATIONS[model.projector.activation],
    tie_word_embeddings=model.lm.tie_embeddings,
    **preprocessor(model.vision, 'CLIPImageProcessor'),
  )


def _paligemma_fields(config, names):
  vision = config.get('vision_config') or {}
  only(vision, 'model_type', 'siglip_vision_model')
  fields = dict(siglip.vision_fields(vision, config), name='vit', pool='none')
  text = config['text_config']
  only(text, 'model_type', 'gemma')
  tied = config.get('tie_word_embeddings', text.get('tie_word_embeddings', True))
  return dict(
    lm=text_fields(GEMMA, text, tied),
    vision=fields,
    projector=dict(name='linear'),
    media=(('image', fields['channels']),),
  )


def _paligemma_config(model):
  _check(model, LinearProjector)
  return dict(
    architectures=['PaliGemmaForConditionalGeneration'],
    text_config=text_config(GEMMA, 'gemma', model.lm),
    vision_config=dict(
      siglip.vision_config(model.vision), projection_dim=model.lm.embed_dim
    ),
    projection_dim=model.lm.embed_dim,
    hidden_size=model.lm.embed_dim,
    tie_word_embeddings=model.lm.tie_embeddings,
    **preprocessor(model.vision, 'SiglipImageProcessor'),
  )


LLAVA = Family(
  'encoded',
  '',
  _table(
    clip.VISION,
    *linear('up', 'linear_1', 'F C -> C F'),
    *linear('down', 'linear_2', 'D F -> F D'),
  ),
  _ignored,
  _llava_fields,
  _llava_config,
  ALIASES,
)
PALIGEMMA = Family(
  'encoded',
  '',
  _table(siglip.VISION, *linear('out', 'linear', 'D C -> C D')),
  _ignored,
  _paligemma_fields,
  _paligemma_config,
  ALIASES,
)
