"""A Transformer over tagged slots; as given, Llama's layer (2302.13971).

  x = x + Attention(norm(x))         grouped-query heads, rotary positions, tags
  x = x + Mlp(norm(x))               SwiGLU (Shazeer, 2002.05202)

Fields of `Config` make of it the other layers there are:

            norm        bias  gated  rotary  post_norm  activation
  Llama     rms         none  yes    yes     no         silu
  Qwen2     rms         qkv   yes    yes     no         silu
  Gemma     rms_offset  none  yes    yes     no         gelu_tanh
  GPT-2     layer       all   no     no      no         gelu_tanh
  Persimmon layer       all   no     half    no         relu2
  ViT       layer       all   no     no      no         gelu
  CLIP      layer       all   no     no      no         quick_gelu
  BERT      layer       all   no     no      yes        gelu

The layers are one module, scanned: parameters are stacked, [L, ...], and a deep
model compiles as fast as a shallow one. Kernels are drawn with variance
1/fan-in, those that write to the residual stream with 1/(2 L fan-in), so that
the stream keeps its scale over the layers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mmjax.batch import KeyTags, QueryTags
from mmjax.nn.cache import KV, write
from mmjax.nn.dense import add_bias, kernel_init, project
from mmjax.nn.remat import MLP_GATE, MLP_UP, REMAT, remat
from mmjax.ops.attention import IMPLEMENTATIONS, attend
from mmjax.ops.linear import linear
from mmjax.ops.norms import layer_norm, rms_norm
from mmjax.ops.positions import Scaling, Sections, rotary_angles, rotate, scaled
from mmjax.sharding import constrain, device, param


@jax.custom_jvp
def relu2(x: jax.Array) -> jax.Array:
  """relu(x)^2 (Primer, 2109.08668); its slope 2 relu(x) asks nobody for x's sign."""
  return jnp.square(jax.nn.relu(x))


relu2.defjvps(lambda dx, y, x: 2 * jax.nn.relu(x) * dx)

ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
  'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP's
  'relu': jax.nn.relu,
  'relu2': relu2,
}
# Which products have a bias: attention's inputs (Qwen2), or all of them.
BIAS = ('none', 'qkv', 'all')


@dataclasses.dataclass(frozen=True)
class Config:
  """Fields of a Transformer; see `mmjax.models.unified.Unified` for each."""

  embed_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  activation: str = 'silu'
  gated: bool = True
  norm: str = 'rms'
  post_norm: bool = False
  bias: str = 'none'
  qk_norm: bool = False
  dropout: float = 0.0
  remat: str = 'none'
  scan: bool = True
  unroll: bool = False
  chunk: int = 512
  reach: int | tuple[int, int] | None = None
  attention: str = 'auto'
  rotary: bool = True
  rotary_dim: int | None = None
  rope_base: float = 10_000.0
  rope_sections: Sections | None = None
  rope_scaling: Scaling | None = None
  norm_eps: float = 1e-6
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'

  def __post_init__(self):
    tables = dict(
      activation=ACTIVATIONS,
      norm=NORMS,
      bias=BIAS,
      remat=REMAT,
      attention=IMPLEMENTATIONS,
    )
    for field, choices in tables.items():
      value = getattr(self, field)
      if value not in choices:
        raise ValueError(f'{field}={value!r} is none of {", ".join(sorted(choices))}')
    for field in ('dtype', 'param_dtype'):
      if not _is_float(getattr(self, field)):
        raise ValueError(f'{field}={getattr(self, field)!r} is no floating type')
    scaled(np.ones(1), self.rope_scaling)
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_heads={self.num_heads} does not divide over'
        f' num_kv_heads={self.num_kv_heads}'
      )
    if self.rotary_dim is not None and not 0 < self.rotary_dim <= self.head_dim:
      raise ValueError(
        f'rotary_dim={self.rotary_dim} is not in 1..head_dim={self.head_dim}'
      )

  @classmethod
  def of(cls, model: Any) -> 'Config':
    """Those fields of a model that are the Transformer's, by name."""
    names = [f.name for f in dataclasses.fields(cls) if hasattr(model, f.name)]
    return cls(**{name: getattr(model, name) for name in names})

  @property
  def out_scale(self) -> float:
    """Variance scale of the kernels that write to the residual stream."""
    return 1 / (2 * self.num_layers)

  def make_norm(self, name: str | None = None, axis: str = 'embed') -> nn.Module:
    """A norm of this kind, over an axis of this name."""
    return NORMS[self.norm](self.norm_eps, self.param_dtype, axis, name=name)


def _is_float(dtype) -> bool:
  try:
    return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
  except TypeError:
    return False


class RMSNorm(nn.Module):
  """Scaled root-mean-square norm over the last axis, f[..., D] -> f[..., D].

  Fields: with `offset` the factor is offset + scale, and scale starts at 1 - offset.
  """

  eps: float = 1e-6
  param_dtype: Any = 'float32'
  axis: str = 'embed'
  offset: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.initializers.constant(1 - self.offset)
    scale = param(self, 'scale', init, x.shape[-1:], (self.axis,), self.param_dtype)
    if self.offset:
      scale = self.offset + scale.astype(jnp.float32)
    return rms_norm(x, scale, self.eps)


class LayerNorm(nn.Module):
  """Layer norm with scale and bias over the last axis, f[..., D] -> f[..., D]."""

  eps: float = 1e-6
  param_dtype: Any = 'float32'
  axis: str = 'embed'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape, axes, init = x.shape[-1:], (self.axis,), nn.initializers
    scale = param(self, 'scale', init.ones, shape, axes, self.param_dtype)
    bias = param(self, 'bias', init.zeros, shape, axes, self.param_dtype)
    return layer_norm(x, scale, bias, self.eps)


NORMS = {
  'rms': RMSNorm,
  'rms_offset': functools.partial(RMSNorm, offset=1.0),  # Gemma's
  'layer': LayerNorm,
}


class Attention(nn.Module):
  """Grouped-query attention by tags, optionally with a cache.

  Fields: config; qk_norm normalises each head's queries and keys (2302.05442).
  """

  config: Config

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    angles: tuple[jax.Array, jax.Array] | None,
    query_tags: QueryTags,
    key_tags: KeyTags,
    kv: KV | None = None,
    slot: jax.Array | int | None = None,
  ) -> tuple[jax.Array, KV | None]:
    """x f[B, T, D] -> (f[B, T, D], kv).

    Without angles nothing is rotated. Without kv the keys are x's own, tagged
    i32[B, T]. With kv they are written at `slot`, and all of kv, tagged i32[B, S],
    is attended to.
    """
    c = self.config
    D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim

    heads = (N, H), ('embed', 'heads', 'head_dim')
    kv_heads = (K, H), ('embed', 'kv_heads', 'head_dim')
    outs = ('query', *heads), ('key', *kv_heads), ('value', *kv_heads)
    q, k, v = (
      constrain(y, 'batch', 'seq', f'act_{axes[1]}', None)
      for y, (_, _, axes) in zip(
        project(self, x, outs, c.bias != 'none', c.param_dtype), outs, strict=True
      )
    )
    if c.qk_norm:
      q = c.make_norm('query_norm', 'head_dim')(q)
      k = c.make_norm('key_norm', 'head_dim')(k)
    if angles is not None:
      q, k = rotate(q, angles), rotate(k, angles)
    if kv is not None:
      # Written once: without the barrier XLA may write, and so copy, it for each use.
      kv = jax.lax.optimization_barrier(write(kv, KV.of(k, v), slot, 2))
      k, v = kv.slots_first()
      q = q.astype(k.dtype)
    reach = c.reach if kv is None else None
    out = attend(
      q, k, v, query_tags, key_tags,
      chunk=c.chunk, reach=reach, implementation=c.attention,
    )  # fmt: skip
    out = constrain(out.astype(x.dtype), 'batch', 'seq', 'act_heads', None)
    axes = ('heads', 'head_dim', 'embed')
    init = kernel_init(c.out_scale, 2)
    kernel = param(self, 'out', init, (N, H, D), axes, c.param_dtype)
    y = linear(out, kernel, 2)
    if c.bias == 'all':
      y = add_bias(self, 'out_bias', y, axes[2:], c.param_dtype)
    return y, kv


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _elementwise(f, *x):
  """f(*x). Backward: one pass over x and y's gradient, kept is x alone; autodiff would
  keep f's inner values. The results are made once, not anew in each product after it."""
  return jax.lax.optimization_barrier(_rounded_once(f)(*x))


def _elementwise_backward(f, x, dy):
  return jax.lax.optimization_barrier(jax.vjp(_rounded_once(f), *x)[1](dy))


def _rounded_once(f):
  """f, but where a CPU computes bfloat16 in float32 and rounds slowly, not rounded after
  each of its operations."""

  def at_once(*x):
    dtype = x[0].dtype
    if dtype != jnp.bfloat16 or device()[0] != 'cpu':
      return f(*x)
    return f(*(z.astype(jnp.float32) for z in x)).astype(dtype)

  return at_once


_elementwise.defvjp(lambda f, *x: (_elementwise(f, *x), x), _elementwise_backward)


class Mlp(nn.Module):
  """act(x gate) * (x up) down, or act(x up) down; f[B, T, D] -> f[B, T, D].

  Fields: config, or anything that has its fields for an MLP.
  """

  config: Any

  @nn.compact
  def __call__(self, x: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """x f[B, T, D] -> f[B, T, D]; scale f[] or f[D] is a factor of the result."""
    c = self.config
    D, F = c.embed_dim, c.mlp_dim

    act, names = ACTIVATIONS[c.activation], ('up', 'gate')[: 1 + c.gated]
    outs = [(name, (F,), ('embed', 'mlp')) for name in names]
    made = project(self, x, outs, c.bias == 'all', c.param_dtype)
    hidden, *gate = (constrain(y, 'batch', 'seq', 'act_mlp') for y in made)
    hidden = checkpoint_name(hidden, MLP_UP)
    if c.gated:
      gate = checkpoint_name(*gate, MLP_GATE)
      hidden = _elementwise(lambda gate, up: act(gate) * up, gate, hidden)
    else:
      hidden = _elementwise(act, hidden)
    init = kernel_init(c.out_scale)
    kernel = param(self, 'down', init, (F, D), ('mlp', 'embed'), c.param_dtype)
    # D as rows: of a gradient whose columns are split, a TPU sums up all on every device.
    kernel = constrain(kernel.T, 'embed', 'mlp').T
    y = linear(hidden, kernel, scale=scale)
    if c.bias == 'all':
      y = add_bias(self, 'down_bias', y, ('embed',), c.param_dtype, scale)
    return y


class Block(nn.Module):
  """One layer. (x, kv, ...) -> (x, kv), as `nn.scan` wants it."""

  config: Config
  deterministic: bool = True

  @nn.compact
  def __call__(self, x, kv, angles, query_tags, key_tags, slot):
    c = self.config

    def around(x, name, branch):
      """x + branch(norm(x)), or norm(x + branch(x)) as in BERT."""
      norm = c.make_norm(name)
      y, kept = branch(x if c.post_norm else norm(x))
      y = nn.Dropout(c.dropout, deterministic=self.deterministic)(y)
      x = norm(x + y) if c.post_norm else x + y
      return constrain(x, 'batch', 'seq', 'act_embed'), kept

    attention, mlp = Attention(c, name='attention'), Mlp(c, name='mlp')
    rest = (angles, query_tags, key_tags, kv, slot)
    x, kv = around(x, 'attention_norm', lambda y: attention(y, *rest))
    x, _ = around(x, 'mlp_norm', lambda y: (mlp(y), None))
    return x, kv


class Before(NamedTuple):
  """What is done to the stream before layers 0, k, 2k, ..., by a pure function.

  every: k.
  run:   (part, f[B, T, D]) -> f[B, T, D].
  parts: what `run` gets, one part for each of the ceil(L / k) times: a tree stacked
    [ceil(L / k), ...] if the layers are scanned, else a tuple of trees.
  """

  every: int
  run: Callable[[Any, jax.Array], jax.Array]
  parts: Any


class Transformer(nn.Module):
  """A stack of blocks and a final norm (which post_norm blocks need not)."""

  config: Config
  final_norm: bool = True

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array | None,
    query_tags: QueryTags,
    key_tags: KeyTags,
    layers: KV | tuple[KV, ...] | None = None,
    slot: jax.Array | int | None = None,
    train: bool = False,
    before: Before | None = None,
  ) -> tuple[jax.Array, KV | tuple[KV, ...] | None]:
    """Runs the layers.

    Args:
      x: f[B, T, D]
      positions: i32[B, T, 3]; not needed without `rotary`.
      query_tags, key_tags: tags of x's slots; with a cache, key_tags are the cache's.
      layers: the cache's keys and values, stacked if `scan`.
      slot: where in the cache x's slots go.
      train: dropout on; needs the rng 'dropout'.
      before: what is put between the layers; parameters stay where they are.

    Returns:
      f[B, T, D] and the layers' cache, None if none was given.
    """
    c = self.config
    angles = None
    if c.rotary:
      width = c.rotary_dim or c.head_dim
      angles = rotary_angles(
        positions, width, c.rope_base, c.rope_sections, c.rope_scaling
      )
    block = Block
    if layers is None:
      block = remat(block, c.remat, prevent_cse=not c.scan)
    rest = (angles, query_tags, key_tags, slot)
    if before is not None and not self.is_initializing() and c.scan:
      make = functools.partial(block, c, not train, parent=None)
      x, layers = self._in_groups(make, x, layers, rest, before, train)
    elif c.scan:
      block = nn.scan(
        block,
        variable_axes={'params': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=(0, *[nn.broadcast] * len(rest)),
        length=c.num_layers,
        unroll=c.num_layers if c.unroll else 1,
        metadata_params={nn.PARTITION_NAME: 'layers'},
      )
      x, layers = block(c, not train, name='layers')(x, layers, *rest)
    else:
      new = []
      for i in range(c.num_layers):
        kv = None if layers is None else layers[i]
        if before is not None and i % before.every == 0:
          x = before.run(before.parts[i // before.every], x)
        x, kv = block(c, not train, name=f'layer_{i}')(x, kv, *rest)
        new.append(kv)
      layers = None if layers is None else tuple(new)
    if self.final_norm and not c.post_norm:
      x = c.make_norm('norm')(x)
    return x, layers

  def _in_groups(self, make, x, layers, rest, before, train):
    """A scan over groups of a scan over layers, on the same parameters [L, ...]."""
    L, k = self.config.num_layers, before.every
    whole = L // k * k
    scan = functools.partial(jax.lax.scan, unroll=self.config.unroll)

    def split(x):
      return x[:whole].reshape(L // k, k, *x.shape[1:])

    def layer(x, xs):
      params, kv, key = xs
      rngs = {} if key is None else {'dropout': key}
      return make().apply({'params': params}, x, kv, *rest, rngs=rngs)

    def group(x, xs):
      part, inner = xs
      return scan(layer, before.run(part, x), inner)

    dropout = train and self.config.dropout > 0
    keys = jax.random.split(self.make_rng('dropout'), L) if dropout else None
    params = self.variables['params']['layers']
    inner = (params, layers, keys)
    first = jax.tree.map(lambda x: x[: L // k], before.parts)
    x, done = scan(group, x, (first, jax.tree.map(split, inner)))
    done = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), done)
    if whole < L:  # a last group of fewer layers
      last = jax.tree.map(lambda x: x[-1], before.parts)
      x, rest_done = group(x, (last, jax.tree.map(lambda x: x[whole:], inner)))
      done = jax.tree.map(lambda *parts: jnp.concatenate(parts), done, rest_done)
    return x, done


def unstack(params: dict, num_layers: int) -> dict:
  """Parameters of a scanned `Transformer` as those of one with scan=False."""
  params = dict(params)
  stacked = params.pop('layers')
  for i in range(num_layers):
    params[f'layer_{i}'] = jax.tree.map(lambda x, i=i: x[i], stacked)
  return params
