"""How the next token is chosen from its logits.

Each sampler is a frozen dataclass called with logits f32[B, V] and a key, and
returns i32[B]; being hashable, it can be part of a compiled function's key.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mmjax.ops.vocabulary import largest
from mmjax.shape import check

Sampler = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Greedy:
  """The most probable token; of equal ones the first."""

  def __call__(self, logits: jax.Array, rng: jax.Array) -> jax.Array:
    V = check('B V', logits)['V']
    return jnp.minimum(largest(logits)[1], V - 1)


@dataclasses.dataclass(frozen=True)
class Sample:
  """A token drawn from softmax(logits / temperature), cut to the likely ones.

  temperature: above 0; below 1 sharpens.
  top_k: keep the k most probable (Fan et al., 1805.04833).
  top_p: keep the fewest most probable tokens whose probability reaches p
    (nucleus sampling, Holtzman et al., 1904.09751). The first is always kept.
  """

  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None

  def __post_init__(self):
    if not self.temperature > 0:
      raise ValueError(
        f'temperature must be above 0, got {self.temperature}; use Greedy() for 0'
      )
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(f'top_k must be at least 1, got {self.top_k}')
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise ValueError(f'top_p must be in (0, 1], got {self.top_p}')

  def __call__(self, logits: jax.Array, rng: jax.Array) -> jax.Array:
    logits = cut(logits.astype(jnp.float32) / self.temperature, self.top_k, self.top_p)
    return jax.random.categorical(rng, logits).astype(jnp.int32)


def cut(logits: jax.Array, top_k: int | None, top_p: float | None) -> jax.Array:
  """Logits f32[B, V] with those outside top-k and top-p at -inf."""
  V = check('B V', logits)['V']
  if top_k is None and top_p is None:
    return logits
  ranked = jnp.sort(logits, -1, descending=True)
  keep = jnp.arange(V)[None] < (V if top_k is None else top_k)
  if top_p is not None:
    probs = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), -1)
    # Kept while the tokens before it have not reached p.
    keep &= jnp.cumsum(probs, -1) - probs < top_p
  least = jnp.min(jnp.where(keep, ranked, jnp.inf), -1, keepdims=True)
  return jnp.where(logits < least, -jnp.inf, logits)
