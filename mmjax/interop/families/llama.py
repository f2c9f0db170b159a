"""Llama (2302.13971), Qwen2 (2407.10671), Gemma (2403.08295)."""

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
from mmjax.names import closest

_LLAMA = (
  Leaf('embed/text', 'model.embed_tokens.weight', 'V D -> V D'),
  *linear(
    f'{LAYERS}attention/query', 'model.layers.{}.self_attn.q_proj', '(N H) D -> D N H'
  ),
  *linear(
    f'{LAYERS}attention/key', 'model.layers.{}.self_attn.k_proj', '(K H) D -> D K H'
  ),
  *linear(
    f'{LAYERS}attention/value', 'model.layers.{}.self_attn.v_proj', '(K H) D -> D K H'
  ),
  *linear(
    f'{LAYERS}attention/out', 'model.layers.{}.self_attn.o_proj', 'D (N H) -> N H D'
  ),
  *linear(f'{LAYERS}mlp/gate', 'model.layers.{}.mlp.gate_proj', 'F D -> D F'),
  *linear(f'{LAYERS}mlp/up', 'model.layers.{}.mlp.up_proj', 'F D -> D F'),
  *linear(f'{LAYERS}mlp/down', 'model.layers.{}.mlp.down_proj', 'D F -> F D'),
  *norm(f'{LAYERS}attention_norm', 'model.layers.{}.input_layernorm'),
  *norm(f'{LAYERS}mlp_norm', 'model.layers.{}.post_attention_layernorm'),
  *norm('transformer/norm', 'model.norm'),
  Leaf('head', 'lm_head.weight', 'V D -> D V'),
)


# How frequencies are scaled: the numbers that go with each name.
_SCALINGS = {
  'default': (),
  'linear': ('factor',),
  'llama3': (
    'factor',
    'low_freq_factor',
    'high_freq_factor',
    'original_max_position_embeddings',
  ),
}


def _scaling(rope):
  """`ops.positions.Scaling` of rope_parameters."""
  name = rope.get('rope_type', rope.get('type', 'default'))
  if name not in _SCALINGS:
    raise ValueError(
      f'config.json: rope_type={name!r} is not supported{closest(name, _SCALINGS)}'
    )
  numbers = tuple(float(rope[key]) for key in _SCALINGS[name])
  return (name, *numbers) if numbers else None


def _rope(model):
  """rope_parameters of a model, and what has to go with them."""
  name, *numbers = model.rope_scaling or ('default',)
  said = dict(zip(_SCALINGS[name], numbers))
  extra = {}
  if name == 'llama3':
    key = 'original_max_position_embeddings'
    said[key] = int(said[key])
    extra = dict(max_position_embeddings=int(said['factor'] * said[key]))
  return dict(
    extra, rope_parameters=dict(rope_theta=model.rope_base, rope_type=name, **said)
  )


def _llama_fields(config, names):
  D, N = config['hidden_size'], config['num_attention_heads']
  rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
  only(config, 'use_sliding_window', False, None)
  only(config, 'attention_bias', config.get('mlp_bias', False))
  return dict(
    vocab_size=config['vocab_size'],
    embed_dim=D,
    num_layers=config['num_hidden_layers'],
    num_heads=N,
    num_kv_heads=config.get('num_key_value_heads') or N,
    head_dim=config.get('head_dim') or D // N,
    mlp_dim=config['intermediate_size'],
    activation=activation(config, 'hidden_act', 'silu'),
    bias='all' if config.get('attention_bias') else 'none',
    norm_eps=config.get('rms_norm_eps', 1e-6),
    rope_base=float(rope.get('rope_theta') or config.get('rope_theta') or 10_000),
    rope_scaling=_scaling(rope),
    tie_embeddings=config.get('tie_word_embeddings', False),
    scale_embedding=False,
  )


def _llama_config(model):
  return dict(
    architectures=['LlamaForCausalLM'],
    vocab_size=model.vocab_size,
    hidden_size=model.embed_dim,
    num_hidden_layers=model.num_layers,
    num_attention_heads=model.num_heads,
    num_key_value_heads=model.num_kv_heads,
    head_dim=model.head_dim,
    intermediate_size=model.mlp_dim,
    hidden_act=ACTIVATIONS[model.activation],
    attention_bias=model.bias == 'all',
    mlp_bias=model.bias == 'all',
    rms_norm_eps=model.norm_eps,
    rope_theta=model.rope_base,
    **_rope(model),
    tie_word_embeddings=model.tie_embeddings,
  )


def _qwen2_fields(config, names):
  return dict(_llama_fields(config, names), bias='qkv')


def _qwen2_config(model):
  config = _llama_config(model)
  del config['attention_bias'], config['mlp_bias']
  return dict(config, architectures=['Qwen2ForCausalLM'], use_sliding_window=False)


def _gemma_fields(config, names):
  fields = _llama_fields({'hidden_act': 'gelu_pytorch_tanh', **config}, names)
  if fields['activation'] == 'gelu':  # old files say so and mean the approximation
    fields['activation'] = 'gelu_tanh'
  return dict(
    fields,
    head_dim=config.get('head_dim', 256),
    norm='rms_offset',
    tie_embeddings=config.get('tie_word_embeddings', True),
    scale_embedding=True,
  )


def _gemma_config(model):
  config = _llama_config(model)
  del config['mlp_bias']
  return dict(config, architectures=['GemmaForCausalLM'])


_ROTARY = ('*.rotary_emb.inv_freq',)
LLAMA = Family('unified', 'model.', _LLAMA, _ROTARY, _llama_fields, _llama_config)
QWEN2 = Family('unified', 'model.', _LLAMA, _ROTARY, _qwen2_fields, _qwen2_config)
GEMMA = Family('unified', 'model.', _LLAMA, _ROTARY, _gemma_fields, _gemma_config)
