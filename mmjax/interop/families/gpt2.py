"""GPT-2 (Radford et al., 2019): kernels in-first; query, key and value are one tensor."""

from mmjax.interop.families.family import (
  ACTIVATIONS,
  LAYERS,
  Family,
  activation,
  norm,
  only,
)
from mmjax.interop.leaf import Leaf


def _gpt2_attention(part, name):
  theirs = 'transformer.h.{}.attn.c_attn'
  ours = f'{LAYERS}attention/{name}'
  return (
    Leaf(ours, f'{theirs}.weight', 'D (3 N H) -> D N H', part),
    Leaf(f'{ours}_bias', f'{theirs}.bias', '(3 N H) -> N H', part),
  )


def _conv(ours, theirs, axes):
  """A product with its input first, as ours, and its bias over the last axis."""
  theirs = f'transformer.h.{{}}.{theirs}'
  return (
    Leaf(LAYERS + ours, f'{theirs}.weight', axes),
    Leaf(f'{LAYERS}{ours}_bias', f'{theirs}.bias', f'{axes[-1]} -> {axes[-1]}'),
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
  *norm(f'{LAYERS}attention_norm', 'transformer.h.{}.ln_1'),
  *norm(f'{LAYERS}mlp_norm', 'transformer.h.{}.ln_2'),
  *norm('transformer/norm', 'transformer.ln_f'),
  Leaf('head', 'lm_head.weight', 'V D -> D V'),
)


def _gpt2_fields(config, names):
  only(config, 'scale_attn_weights', True)
  only(config, 'scale_attn_by_inverse_layer_idx', False)
  only(config, 'add_cross_attention', False)
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
    activation=activation(config, 'activation_function', 'gelu_new'),
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
    activation_function={**ACTIVATIONS, 'gelu_tanh': 'gelu_new'}[model.activation],
    layer_norm_epsilon=model.norm_eps,
    tie_word_embeddings=model.tie_embeddings,
  )


GPT2 = Family(
  'unified',
  'transformer.',
  _GPT2,
  ('*.attn.bias', '*.attn.masked_bias'),
  _gpt2_fields,
  _gpt2_config,
)
