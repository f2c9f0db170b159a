"""BERT (1810.04805)."""

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

_BERT_LAYER = 'bert.encoder.layer.{}.'
_BERT_SELF = f'{_BERT_LAYER}attention.self.'
_BERT_HEAD = 'cls.predictions.transform.'
_BERT = (
  Leaf('embed/text', 'bert.embeddings.word_embeddings.weight', 'V D -> V D'),
  Leaf('embed/positions', 'bert.embeddings.position_embeddings.weight', 'P D -> P D'),
  Leaf('types', 'bert.embeddings.token_type_embeddings.weight', 'X D -> X D'),
  *norm('embed_norm', 'bert.embeddings.LayerNorm'),
  *linear(f'{LAYERS}attention/query', f'{_BERT_SELF}query', '(N H) D -> D N H'),
  *linear(f'{LAYERS}attention/key', f'{_BERT_SELF}key', '(K H) D -> D K H'),
  *linear(f'{LAYERS}attention/value', f'{_BERT_SELF}value', '(K H) D -> D K H'),
  *linear(
    f'{LAYERS}attention/out', f'{_BERT_LAYER}attention.output.dense', 'D (N H) -> N H D'
  ),
  *norm(f'{LAYERS}attention_norm', f'{_BERT_LAYER}attention.output.LayerNorm'),
  *linear(f'{LAYERS}mlp/up', f'{_BERT_LAYER}intermediate.dense', 'F D -> D F'),
  *linear(f'{LAYERS}mlp/down', f'{_BERT_LAYER}output.dense', 'D F -> F D'),
  *norm(f'{LAYERS}mlp_norm', f'{_BERT_LAYER}output.LayerNorm'),
  Leaf('pool_dense/kernel', 'bert.pooler.dense.weight', 'E D -> D E'),
  Leaf('pool_dense/bias', 'bert.pooler.dense.bias', 'D -> D'),
  Leaf('head_dense/kernel', f'{_BERT_HEAD}dense.weight', 'E D -> D E'),
  Leaf('head_dense/bias', f'{_BERT_HEAD}dense.bias', 'D -> D'),
  *norm('head_norm', f'{_BERT_HEAD}LayerNorm'),
  Leaf('head_bias', 'cls.predictions.bias', 'V -> V'),
)


def _bert_fields(config, names):
  only(config, 'position_embedding_type', 'absolute', None)
  only(config, 'is_decoder', False)
  only(config, 'tie_word_embeddings', True)
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
    activation=activation(config, 'hidden_act', 'gelu'),
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
    hidden_act=ACTIVATIONS[model.activation],
    layer_norm_eps=model.norm_eps,
    tie_word_embeddings=True,
  )


BERT = Family(
  'encoder',
  'bert.',
  _BERT,
  ('*embeddings.position_ids', 'cls.seq_relationship.*', 'cls.predictions.decoder.*'),
  _bert_fields,
  _bert_config,
)
