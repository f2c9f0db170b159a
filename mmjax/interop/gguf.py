"""Language models from GGUF files, the format of llama.cpp, as `models.unified`.

  metadata   llama.block_count = 30, ...         -> fields of the model
  tensors    blk.0.attn_q.weight, Q4_1 blocks    -> float parameters, layers stacked

Numbers come dequantised. Rotary pairs stand side by side in a GGUF file of the Llama
type, (0, 1), (2, 3), ..., and half a head apart here, (i, i + H/2); so the rows of q
and k go back to where they were before the file was written:

  theirs  a0 b0 a1 b1 a2 b2   ->   ours  a0 a1 a2 b0 b1 b2

Beyond names and rows these are the families of Hugging Face, see `interop.families`.
"""

import dataclasses
import os
import re
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmjax import sharding
from mmjax.files import find, gguf_value, open_gguf
from mmjax.interop.families import FAMILIES, Family
from mmjax.interop.huggingface import assemble
from mmjax.interop.leaf import Leaf
from mmjax.names import closest
from mmjax.ops.positions import scaled

# Their words for the words of Hugging Face, in the names of tensors.
_WORDS = {
  'model.embed_tokens': 'token_embd',
  'model.layers': 'blk',
  'model.norm': 'output_norm',
  'lm_head': 'output',
  'input_layernorm': 'attn_norm',
  'post_attention_layernorm': 'ffn_norm',
  **{f'self_attn.{x}_proj': f'attn_{x}' for x in 'qkv'},
  'self_attn.o_proj': 'attn_output',
  **{f'mlp.{x}_proj': f'ffn_{x}' for x in ('gate', 'up', 'down')},
}
# A tensor that Llama 3 has besides, and the numbers that are the same in all of it.
_FACTORS = 'rope_freqs.weight'
_LLAMA3 = {
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}
# Architectures, and whether the rows of q and k are permuted.
_PERMUTED = {'llama': True, 'qwen2': False}


def load(
  path: str | os.PathLike,
  *,
  mesh: Mesh | None = None,
  rules: sharding.Rules | None = None,
  param_dtype: Any = None,
  **fields: Any,
) -> tuple[nn.Module, dict[str, Any]]:
  """A model and its parameters from a GGUF file.

  Args:
    path: or 'package:NAME/FILE', see `mmjax.files.find`.
    mesh: where the parameters go, by `rules`; None = the first device.
    rules: see `sharding.rules_for`; None = every parameter whole on every device.
    param_dtype: of storage; None = float32.
    **fields: of the model, over those from the file, e.g. dtype='bfloat16'.

  Returns:
    (model, params), with layers stacked; see the model's `unscanned`.

  Raises:
    ValueError: what is missing, extra, of a wrong shape or type, unknown or damaged;
      one line.
  """
  source, family = read(path)
  dtype = np.dtype(jnp.dtype(param_dtype or 'float32'))
  return assemble(source, family, dtype, None, mesh, rules, fields)


def read(path: str | os.PathLike) -> tuple['Source', Family]:
  """What `assemble` wants: a file's tensors and config, and how to understand them.

  Raises:
    ValueError: see `load`.
  """
  source = Source(find(path))
  family = FAMILIES[source.config['model_type']]
  leaves = tuple(
    Leaf(leaf.ours, _theirs(leaf.theirs), leaf.axes, leaf.part) for leaf in family.leaves
  )
  return source, dataclasses.replace(
    family, prefix='', leaves=leaves, ignored=(_FACTORS,)
  )


def _theirs(name: str) -> str:
  for word, their in _WORDS.items():
    name = name.replace(word, their)
  return name


class Source:
  """A GGUF file as `interop.files.Source`: the config as of config.json, tensors.

  Raises:
    ValueError: no whole GGUF file, an unknown architecture, or one with parts that
      the model doesn't have.
  """

  def __init__(self, path):
    self.directory = path
    self.config_name = f'{path}, in its metadata,'
    self._reader = open_gguf(path)
    self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
    kind = gguf_value(self._reader, 'general.architecture')
    if kind not in _PERMUTED:
      raise ValueError(
        f'{path}: unknown architecture {kind!r}{closest(kind, sorted(_PERMUTED))}'
      )
    self.config = self._config(kind)
    self._heads = {
      'attn_q': self.config['num_attention_heads'],
      'attn_k': self.config['num_key_value_heads'],
    }
    self._permuted = _PERMUTED[kind]

  def _config(self, kind) -> dict[str, Any]:
    """The metadata in the words of a config.json."""

    def get(key, *default):
      value = gguf_value(self._reader, f'{kind}.{key}', *default)
      if value is None and not default:
        raise ValueError(f'{self.config_name} has no {kind}.{key}')
      # Numbers are stored as float32: 1e-5 is meant, not 9.99999975e-06.
      return float(str(np.float32(value))) if isinstance(value, float) else value

    if get('expert_count', 0):
      raise ValueError(f'{self.directory}: a mixture of experts is not supported')
    D, N = get('embedding_length'), get('attention.head_count')
    H = get('attention.key_length', D // N)
    if (turned := get('rope.dimension_count', H)) != H:
      raise ValueError(
        f'{self.directory}: rotary positions on {turned} of {H} of a head are not'
        ' supported'
      )
    if 'token_embd.weight' not in self._tensors:
      raise ValueError(f'{self.directory}: token_embd.weight is missing')
    scaling = get('rope.scaling.type', 'none')
    rope = {'rope_theta': get('rope.freq_base', 10_000.0)}
    if scaling != 'none':
      rope |= {'rope_type': scaling, 'factor': get('rope.scaling.factor')}
    if _FACTORS in self._tensors:
      rope |= self._llama3(rope['rope_theta'], H)
    return dict(
      model_type=kind,
      vocab_size=self.shape('token_embd.weight')[0],
      hidden_size=D,
      num_hidden_layers=get('block_count'),
      num_attention_heads=N,
      num_key_value_heads=get('attention.head_count_kv', N),
      head_dim=H,
      intermediate_size=get('feed_forward_length'),
      hidden_act='silu',
      rms_norm_eps=get('attention.layer_norm_rms_epsilon'),
      rope_parameters=rope,
      attention_bias='blk.0.attn_output.bias' in self._tensors,
      mlp_bias='blk.0.attn_output.bias' in self._tensors,
      tie_word_embeddings='output.weight' not in self._tensors,
    )

  def _llama3(self, base, head_dim) -> dict[str, Any]:
    """Llama 3's scaling, of which the file has only what each pair is divided by."""
    half = head_dim // 2
    frequency = base ** (-np.arange(half) / half)
    found = np.asarray(self._tensors[_FACTORS].data, np.float64)
    numbers = (float(found.max()), *_LLAMA3.values())
    want = frequency / scaled(frequency, ('llama3', *numbers))
    if found.shape != want.shape or not np.allclose(found, want, rtol=1e-4):
      raise ValueError(
        f'{self.directory}: {_FACTORS} is not the scaling of Llama 3 ({_LLAMA3})'
      )
    return {'rope_type': 'llama3', 'factor': numbers[0], **_LLAMA3}

  def names(self) -> set[str]:
    return set(self._tensors)

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(self._tensors[name].shape))

  def dtype(self, name: str) -> str:
    """'F32' for what comes dequantised, else its type as GGUF calls it, e.g. 'I8'."""
    kind = self._tensors[name].tensor_type.name
    return kind if re.fullmatch(r'I\d+', kind) else 'F32'

  def __getitem__(self, name: str) -> '_Tensor':
    """What reads a slice of the tensor, float32: source[name][2:4, :] -> np.ndarray."""
    tensor = self._tensors[name]
    heads = self._heads.get(name.split('.')[-2]) if self._permuted else None
    return _Tensor(tensor, self.shape(name), heads, f'{self.directory}: {name}')


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """Rows of a tensor, dequantised when they are asked for; all of them, if permuted."""

  tensor: Any
  shape: tuple[int, ...]
  heads: int | None
  where: str

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    from gguf.quants import dequantize

    data, rows = self.tensor.data, len(range(*index[0].indices(self.shape[0])))
    some = self.heads is None and len(self.shape) > 1
    try:
      x = dequantize(data[index[0]] if some else data, self.tensor.tensor_type)
    except NotImplementedError as error:
      raise ValueError(
        f'{self.where} is of type {self.tensor.tensor_type.name}, which has no reader'
      ) from error
    x = np.asarray(x, np.float32)
    if some:
      return x.reshape(rows, *self.shape[1:])[(slice(None), *index[1:])]
    x = x.reshape(self.shape)
    return (x if self.heads is None else halves(x, self.heads))[index]


def halves(x: np.ndarray, heads: int) -> np.ndarray:
  """Rows of heads from pairs side by side to halves: [heads * H, ...], the same shape."""
  pairs = x.reshape(heads, -1, 2, *x.shape[1:])
  return pairs.swapaxes(1, 2).reshape(x.shape)
