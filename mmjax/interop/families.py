"""Architectures of Hugging Face: their names for our parameters, their config.

A `Family` is a table of leaves and two functions: `fields` makes our model's fields
of a config.json, `config` makes a config.json of our model. Which of the leaves a
model has is the model's matter (a tied one has no head).
"""

import dataclasses
import re
from collections.abc import Callable, Set
from typing import Any

import flax.linen as nn

from mmjax.interop.leaf import Leaf
from mmjax.names import closest

_LAYERS = 'transformer/layers/'
_ACTIVATIONS = {
  'silu': 'silu',
  'gelu': 'gelu',
  'gelu_tanh': 'gelu_pytorch_tanh',
  'quick_gelu': 'quick_gelu',
}
_THEIR_ACTIVATIONS = {
  **{theirs: ours for ours, theirs in _ACTIVATIONS.items()},
  'gelu_new': 'gelu_tanh',
  'swish': 'silu',
}


@dataclasses.dataclass(frozen=True)
class Family:
  """One architecture.

  Fields:
    model: which of ours, see `mmjax.models.MODELS`.
    prefix: of their names, absent where the model was saved without its head.
    leaves: the table.
    ignored: patterns of tensors that say nothing that the model doesn't know.
    fields: (config, names of tensors) -> fields of ours.
    config: our model -> config, without model_type and dtype.
  """

  model: str
  prefix: str
  leaves: tuple[Leaf, ...]
  ignored: tuple[str, ...]
  fields: Callable[[dict[str, Any], Set[str]], dict[str, Any]]
  config: Callable[[nn.Module], dict[str, Any]]


def _linear(ours: str, theirs: str, axes: str) -> tuple[Leaf, Leaf]:
  """A torch Linear, f[out, in] and f[out], and ours, in first, the bias beside it."""
  bias = re.match(r'\(.*?\)|\w+', axes)[0]
  return (
    Leaf(_LAYERS + ours, f'{theirs}.weight', axes),
    Leaf(_LAYERS + f'{ours}_bias', f'{theirs}.bias', f'{bias} -> {bias.strip("()")}'),
  )


def _norm(ours: str, theirs: str) -> tuple[Leaf, Leaf]:
  return (
    Leaf(f'{ours}/scale', f'{theirs}.weight', 'D -> D'),
    Leaf(f'{ours}/bias', f'{theirs}.bias', 'D -> D'),
  )


def _only(config: dict[str, Any], key: str, *allowed: Any) -> None:
  """Refuses a value that the model doesn't have; absent means the first allowed."""
  value = config.get(key, allowed[0])
  if value not in allowed:
    raise ValueError(
      f'config.json: {key}={value!r} is not supported, only {allowed[0]!r}'
    )


def _activation(config, key, default) -> str:
  name = config.get(key) or default
  if name not in _THEIR_ACTIVATIONS:
    raise ValueError(
      f'config.json: unknown {key} {name!r}{closest(name, _THEIR_ACTIVATIONS)}'
    )
  return _THEIR_ACTIVATIONS[name]


# ---- Llama (2302.13971), Qwen2 (2407.10671), Gemma (2403.08295) ----

_LLAMA = (
  Leaf('embed/text', 'model.embed_tokens.weight', 'V D -> V D'),
  *_linear('attention/query', 'model.layers.{}.self_attn.q_proj', '(N H) D -> D N H'),
  *_linear('attention/key', 'model.layers.{}.self_attn.k_proj', '(K H) D -> D K H'),
  *_linear('attention/value', 'model.layers.{}.self_attn.v_proj', '(K H) D -> D K H'),
  *_linear('attention/out', 'model.layers.{}.self_attn.o_proj', 'D (N H) -> N H D'),
  *_linear('mlp/gate', 'model.layers.{}.mlp.gate_proj', 'F D -> D F'),
  *_linear('mlp/up', 'model.layers.{}.mlp.up_proj', 'F D -> D F'),
  *_linear('mlp/down', 'model.layers.{}.mlp.down_proj', 'D F -> F D'),
  *_norm(f'{_LAYERS}attention_norm', 'model.layers.{}.input_layernorm'),
  *_norm(f'{_LAYERS}mlp_norm', 'model.layers.{}.post_attention_layernorm'),
  *_norm('transformer/norm', 'model.norm'),
  Leaf('head', 'lm_head.weight', 'V D -> D V'),
)


def _llama_fields(config, names):
  D, N = config['hidden_size'], config['num_attention_heads']
  rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
  _only({'rope_type': rope.get('rope_type', rope.get('type', 'default'))},
        'rope_type', 'default')  # fmt: skip
  _only(config, 'use_sliding_window', False, None)
  _only(config, 'attention_bias', config.get('mlp_bias', False))
  return dict(
    vocab_size=config['vocab_size'],
    embed_dim=D,
    num_layers=config['num_hidden_layers'],
    num_heads=N,
    num_kv_heads=config.get('num_key_value_heads') or N,
    head_dim=config.get('head_dim') or D // N,
    mlp_dim=config['intermediate_size'],
    activation=_activation(config, 'hidden_act', 'silu'),
    bias='all' if config.get('attention_bias') else 'none',
    norm_eps=config.get('rms_norm_eps', 1e-6),
    rope_base=float(rope.get('rope_theta') or config.get('rope_theta') or 10_000),
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
    hidden_act=_ACTIVATIONS[model.activation],
    attention_bias=model.bias == 'all',
    mlp_bias=model.bias == 'all',
    rms_norm_eps=model.norm_eps,
    rope_theta=model.rope_base,
    rope_parameters=dict(rope_theta=model.rope_base, rope_type='default'),
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


# ---- GPT-2 (Radford et al., 2019): kernels in-first, query, key and value fused ----


def _gpt2_attention(part, name):
  theirs = 'transformer.h.{}.attn.c_attn'
  ours = f'{_LAYERS}attention/{name}'
  return (
    Leaf(ours, f'{theirs}.weight', 'D (3 N H) -> D N H', part),
    Leaf(f'{ours}_bias', f'{theirs}.bias', '(3 N H) -> N H', part),
  )


def _conv(ours, theirs, axes):
  """A product with its input first, as ours, and its bias over the last axis."""
  theirs = f'transformer.h.{{}}.{theirs}'
  return (
    Leaf(_LAYERS + ours, f'{theirs}.weight', axes),
    Leaf(f'{_LAYERS}{ours}_bias', f'{theirs}.bias', f'{axes[-1]} -> {axes[-1]}'),
  )


_GPT2 = (
  Leaf('embed/text', 'transformer.wte.weight', 'V D -> V D'),
  Leaf('embed/positions', 'transformer.wpe.weight', 'P D -> P D'),
  *_gpt2_attention(0, 'query'),
  *_gpt2_attention(1, 'key'),
  *_gpt2_attention(2, 'value'),
  *_conv('attention/out', 'attn.c_proj', '(N H) D -> N H D'),
  *_conv('mlp/up', 'mlp.c_fc', 'D F -> D F'),
  *_conv('mlp/down', 'mlp.c_proj', 'F D -> F D'),
  *_norm(f'{_LAYERS}attention_norm', 'transformer.h.{}.ln_1'),
  *_norm(f'{_LAYERS}mlp_norm', 'transformer.h.{}.ln_2'),
  *_norm('transformer/norm', 'transformer.ln_f'),
  Leaf('head', 'lm_head.weight', 'V D -> D V'),
)


def _gpt2_fields(config, names):
  _only(config, 'scale_attn_weights', True)
  _only(config, 'scale_attn_by_inverse_layer_idx', False)
  _only(config, 'add_cross_attention', False)
  D, N = config['n_embd'], config['n_head']
  return dict(
    vocab_size=config['vocab_size'],
    embed_dim=D,
    num_layers=config['n_layer'],
    num_heads=N,
    num_kv_heads=N,
    head_dim=D // N,
    mlp_dim=config.get('n_inner') or 4 * D,
    max_positions=config['n_positions'],
    activation=_activation(config, 'activation_function', 'gelu_new'),
    gated=False,
    norm='layer',
    bias='all',
    rotary=False,
    norm_eps=config.get('layer_norm_epsilon', 1e-5),
    tie_embeddings=config.get('tie_word_embeddings', True),
    scale_embedding=False,
  )


def _gpt2_config(model):
  return dict(
    architectures=['GPT2LMHeadModel'],
    vocab_size=model.vocab_size,
    n_embd=model.embed_dim,
    n_layer=model.num_layers,
    n_head=model.num_heads,
    n_inner=model.mlp_dim,
    n_positions=model.max_positions,
    # Its own name for the same approximation, which rounds as the original does.
    activation_function={**_ACTIVATIONS, 'gelu_tanh': 'gelu_new'}[model.activation],
    layer_norm_epsilon=model.norm_eps,
    tie_word_embeddings=model.tie_embeddings,
  )


# ---- BERT (1810.04805) ----

_BERT_LAYER = 'bert.encoder.layer.{}.'
_BERT_SELF = f'{_BERT_LAYER}attention.self.'
_BERT_HEAD = 'cls.predictions.transform.'
_BERT = (
  Leaf('embed/text', 'bert.embeddings.word_embeddings.weight', 'V D -> V D'),
  Leaf('embed/positions', 'bert.embeddings.position_embeddings.weight', 'P D -> P D'),
  Leaf('types', 'bert.embeddings.token_type_embeddings.weight', 'X D -> X D'),
  *_norm('embed_norm', 'bert.embeddings.LayerNorm'),
  *_linear('attention/query', f'{_BERT_SELF}query', '(N H) D -> D N H'),
  *_linear('attention/key', f'{_BERT_SELF}key', '(K H) D -> D K H'),
  *_linear('attention/value', f'{_BERT_SELF}value', '(K H) D -> D K H'),
  *_linear('attention/out', f'{_BERT_LAYER}attention.output.dense', 'D (N H) -> N H D'),
  *_norm(f'{_LAYERS}attention_norm', f'{_BERT_LAYER}attention.output.LayerNorm'),
  *_linear('mlp/up', f'{_BERT_LAYER}intermediate.dense', 'F D -> D F'),
  *_linear('mlp/down', f'{_BERT_LAYER}output.dense', 'D F -> F D'),
  *_norm(f'{_LAYERS}mlp_norm', f'{_BERT_LAYER}output.LayerNorm'),
  Leaf('pool_dense/kernel', 'bert.pooler.dense.weight', 'E D -> D E'),
  Leaf('pool_dense/bias', 'bert.pooler.dense.bias', 'D -> D'),
  Leaf('head_dense/kernel', f'{_BERT_HEAD}dense.weight', 'E D -> D E'),
  Leaf('head_dense/bias', f'{_BERT_HEAD}dense.bias', 'D -> D'),
  *_norm('head_norm', f'{_BERT_HEAD}LayerNorm'),
  Leaf('head_bias', 'cls.predictions.bias', 'V -> V'),
)


def _bert_fields(config, names):
  _only(config, 'position_embedding_type', 'absolute', None)
  _only(config, 'is_decoder', False)
  _only(config, 'tie_word_embeddings', True)
  D, N = config['hidden_size'], config['num_attention_heads']
  return dict(
    vocab_size=config['vocab_size'],
    embed_dim=D,
    num_layers=config['num_hidden_layers'],
    num_heads=N,
    num_kv_heads=N,
    head_dim=D // N,
    mlp_dim=config['intermediate_size'],
    max_positions=config['max_position_embeddings'],
    num_types=config.get('type_vocab_size', 2),
    activation=_activation(config, 'hidden_act', 'gelu'),
    norm_eps=config.get('layer_norm_eps', 1e-12),
    pooler=any(name.endswith('pooler.dense.weight') for name in names),
    mlm_head='cls.predictions.bias' in names,
  )


def _bert_config(model):
  return dict(
    architectures=['BertForMaskedLM' if model.mlm_head else 'BertModel'],
    vocab_size=model.vocab_size,
    hidden_size=model.embed_dim,
    num_hidden_layers=model.num_layers,
    num_attention_heads=model.num_heads,
    intermediate_size=model.mlp_dim,
    max_position_embeddings=model.max_positions,
    type_vocab_size=model.num_types,
    hidden_act=_ACTIVATIONS[model.activation],
    layer_norm_eps=model.norm_eps,
    tie_word_embeddings=True,
  )


_ROTARY = ('*.rotary_emb.inv_freq',)
FAMILIES = {
  'llama': Family(
    'unified', 'model.', _LLAMA, _ROTARY, _llama_fields, _llama_config
  ),
  'qwen2': Family(
    'unified', 'model.', _LLAMA, _ROTARY, _qwen2_fields, _qwen2_config
  ),
  'gemma': Family(
    'unified', 'model.', _LLAMA, _ROTARY, _gemma_fields, _gemma_config
  ),
  'gpt2': Family(
    'unified', 'transformer.', _GPT2,
    ('*.attn.bias', '*.attn.masked_bias'), _gpt2_fields, _gpt2_config,
  ),
  'bert': Family(
    'encoder', 'bert.', _BERT,
    ('*embeddings.position_ids', 'cls.seq_relationship.*', 'cls.predictions.decoder.*'),
    _bert_fields, _bert_config,
  ),
}  # fmt: skip
