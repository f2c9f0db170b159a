"""Slots that look at other slots: what resampler, pooling and cross-attention share.

Queries come from x f[B, T, D], keys and values from media f[B, S, C]; those can be
made once and used again, as in decoding. Who sees whom stands in tags; without biases
(of the attention) what sees nothing gets exactly 0.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from mmjax.batch import KeyTags, QueryTags
from mmjax.names import closest
from mmjax.nn import transformer
from mmjax.nn.cache import KV
from mmjax.nn.dense import kernel_init
from mmjax.ops.attention import IMPLEMENTATIONS, attend
from mmjax.ops.linear import linear
from mmjax.shape import check
from mmjax.sharding import constrain, param


@dataclasses.dataclass(frozen=True)
class Config:
  """Fields of a layer that looks at media, and of the `transformer.Mlp` after it.

  embed_dim: D, of the slots that look; media_dim: C, of what they look at.
  num_heads, head_dim, mlp_dim: N, H, F.
  activation, gated, bias: of the MLP, see `transformer.ACTIVATIONS` and `BIAS`.
  attention_bias: of queries, keys, values and the attention's output.
  qk_norm: normalise each head's queries and keys (2302.05442).
  norm: of the layers made of these, see `nn.transformer`.
  out_scale: variance scale of the kernels that write to the residual stream.
  chunk: see `ops.attention.attend`; attention: its implementation.
  """

  embed_dim: int
  media_dim: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  activation: str = 'relu2'
  gated: bool = False
  bias: str = 'none'
  attention_bias: bool = False
  qk_norm: bool = False
  norm: str = 'layer'
  out_scale: float = 1.0
  chunk: int = 512
  attention: str = 'auto'
  norm_eps: float = 1e-6
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'

  def __post_init__(self):
    for field, choices in (
      ('activation', transformer.ACTIVATIONS),
      ('norm', transformer.NORMS),
      ('bias', transformer.BIAS),
      ('attention', IMPLEMENTATIONS),
    ):
      value = getattr(self, field)
      if value not in choices:
        raise ValueError(f'unknown {field} {value!r}{closest(value, choices)}')

  def make_norm(self, name: str | None = None, axis: str = 'embed') -> nn.Module:
    return transformer.NORMS[self.norm](self.norm_eps, self.param_dtype, axis, name=name)


class CrossAttention(nn.Module):
  """Attention of x to media by tags, without the residual."""

  config: Config

  def setup(self):
    c = self.config
    D, C, N, H = c.embed_dim, c.media_dim, c.num_heads, c.head_dim

    def make(name, shape, axes, *init):
      return param(self, name, kernel_init(*init), shape, axes, c.param_dtype)

    inner = ('embed', 'heads', 'head_dim')
    self.query = make('query', (D, N, H), inner)
    self.key = make('key', (C, N, H), inner)
    self.value = make('value', (C, N, H), inner)
    self.out = make('out', (N, H, D), ('heads', 'head_dim', 'embed'), c.out_scale, 2)
    if c.attention_bias:
      zeros, heads = nn.initializers.zeros, ('heads', 'head_dim')
      for name in ('query', 'key', 'value'):
        bias = param(self, f'{name}_bias', zeros, (N, H), heads, c.param_dtype)
        setattr(self, f'{name}_bias', bias)
      self.out_bias = param(self, 'out_bias', zeros, (D,), ('embed',), c.param_dtype)
    if c.qk_norm:
      self.query_norm = c.make_norm(axis='head_dim')
      self.key_norm = c.make_norm(axis='head_dim')

  def keys(self, media: jax.Array) -> KV:
    """media f[B, S, C] -> keys and values, each f[B, N, S, H]."""

    def project(name):
      y = self._biased(linear(media, getattr(self, name)), name)
      if self.config.qk_norm and name == 'key':
        y = self.key_norm(y)
      return constrain(y, 'batch', 'kv_seq', 'act_heads', None)

    return KV.of(project('key'), project('value'))

  def __call__(
    self,
    x: jax.Array,
    kv: KV,
    query_tags: QueryTags,
    key_tags: KeyTags,
    scale: jax.Array | None = None,
  ) -> jax.Array:
    """x f[B, T, D], kv from `keys`, tags i32[B, T] and i32[B, S] -> f[B, T, D].

    Args:
      scale: f[] or f[D], a factor of the result.
    """
    check('B T D', x, 'B N S H', kv.key, 'B T', query_tags.segment_ids)
    c = self.config
    q = self._biased(linear(x, self.query), 'query')
    if c.qk_norm:
      q = self.query_norm(q)
    q = constrain(q, 'batch', 'seq', 'act_heads', None)
    y = attend(
      q, *kv.slots_first(), query_tags, key_tags,
      chunk=c.chunk, implementation=c.attention,
    )  # fmt: skip
    y = constrain(y, 'batch', 'seq', 'act_heads', None)
    return self._biased(linear(y, self.out, 2, scale=scale), 'out', scale)

  def _biased(self, y, name, scale=None):
    if not self.config.attention_bias:
      return y
    bias = getattr(self, f'{name}_bias')
    bias = (bias if scale is None else scale.astype(bias.dtype) * bias).astype(y.dtype)
    return y + bias[None, None]
