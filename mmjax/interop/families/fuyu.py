"""Fuyu (Adept, 2023): raw patches in the stream of Persimmon, one module of ours.

Slots of an image are tokens like others: causal, and with positions that count on, so
data for it have image_attention='causal' and image_positions='count'. `export` takes
image_token_id=..., where their token of a slot isn't that of the published model.
"""

from mmjax.interop.families.family import (
  ACTIVATIONS,
  LAYERS,
  Family,
  activation,
  linear,
  norm,
  only,
)
from mmjax.interop.leaf import Leaf

_LM = 'language_model.model.'
_LAYER = f'{_LM}layers.{{}}.'


def _attention(part, name):
  ours, theirs = f'{LAYERS}attention/{name}', f'{_LAYER}self_attn.query_key_value'
  return (
    Leaf(ours, f'{theirs}.weight', '(N 3 H) D -> D N H', part),
    Leaf(f'{ours}_bias', f'{theirs}.bias', '(N 3 H) -> N H', part),
  )


_FUYU = (
  Leaf('embed/text', f'{_LM}embed_tokens.weight', 'V D -> V D'),
  Leaf('embed/image/kernel', 'vision_embed_tokens.weight', 'D C -> C D'),
  Leaf('embed/image/bias', 'vision_embed_tokens.bias', 'D -> D'),
  *_attention(0, 'query'),
  *_attention(1, 'key'),
  *_attention(2, 'value'),
  *linear(f'{LAYERS}attention/out', f'{_LAYER}self_attn.dense', 'D (N H) -> N H D'),
  *norm(f'{LAYERS}attention/query_norm', f'{_LAYER}self_attn.q_layernorm'),
  *norm(f'{LAYERS}attention/key_norm', f'{_LAYER}self_attn.k_layernorm'),
  *linear(f'{LAYERS}mlp/up', f'{_LAYER}mlp.dense_h_to_4h', 'F D -> D F'),
  *linear(f'{LAYERS}mlp/down', f'{_LAYER}mlp.dense_4h_to_h', 'D F -> F D'),
  *norm(f'{LAYERS}attention_norm', f'{_LAYER}input_layernorm'),
  *norm(f'{LAYERS}mlp_norm', f'{_LAYER}post_attention_layernorm'),
  *norm('transformer/norm', f'{_LM}final_layernorm'),
  Leaf('head', 'language_model.lm_head.weight', 'V D -> D V'),
)


def _fields(config, names):
  # Published files say all of it flat, newer ones in a section.
  text = {**config, **(config.get('text_config') or {})}
  only(text, 'model_type', 'persimmon', 'fuyu')
  rope = text.get('rope_parameters') or text.get('rope_scaling') or {}
  only(rope, 'rope_type', 'default')
  share = rope.get('partial_rotary_factor') or text.get('partial_rotary_factor') or 0.5
  D, N = text['hidden_size'], text['num_attention_heads']
  patch, channels = config.get('patch_size', 30), config.get('num_channels', 3)
  return dict(
    vocab_size=text['vocab_size'],
    media=(('image', patch * patch * channels),),
    embed_dim=D,
    num_layers=text['num_hidden_layers'],
    num_heads=N,
    num_kv_heads=N,
    head_dim=D // N,
    mlp_dim=text['intermediate_size'],
    activation=activation(text, 'hidden_act', 'relu2'),
    gated=False,
    norm='layer',
    bias='all',
    qk_norm=text.get('qk_layernorm', True),
    rotary_dim=int(D // N * share),
    norm_eps=text.get('layer_norm_eps', 1e-5),
    rope_base=float(rope.get('rope_theta') or text.get('rope_theta') or 25_000),
    tie_embeddings=config.get('tie_word_embeddings', False),
    scale_embedding=False,
  )


def _config(model):
  channels = dict(model.media).get('image', 0)
  patch = round((channels / 3) ** 0.5)
  rope = dict(
    rope_type='default',
    rope_theta=model.rope_base,
    partial_rotary_factor=(model.rotary_dim or model.head_dim) / model.head_dim,
  )
  text = dict(
    model_type='persimmon',
    vocab_size=model.vocab_size,
    hidden_size=model.embed_dim,
    num_hidden_layers=model.num_layers,
    num_attention_heads=model.num_heads,
    intermediate_size=model.mlp_dim,
    hidden_act=ACTIVATIONS[model.activation],
    qk_layernorm=model.qk_norm,
    layer_norm_eps=model.norm_eps,
    rope_parameters=rope,
  )
  return dict(
    architectures=['FuyuForCausalLM'],
    text_config=text,
    patch_size=patch,
    num_channels=3,
    tie_word_embeddings=model.tie_embeddings,
  )


_ALIASES = (
  ('language_model.model.', 'model.language_model.'),
  ('language_model.lm_head.', 'lm_head.'),
  ('vision_embed_tokens.', 'model.vision_embed_tokens.'),
)
FUYU = Family(
  'unified', '', _FUYU, ('*.rotary_emb.inv_freq',), _fields, _config, _ALIASES
)
