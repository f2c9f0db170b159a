"""Gated cross-attention: lets a (frozen) language model look at media.

  x = x + tanh(a) * CrossAttention(norm(x), latents)
  x = x + tanh(b) * Mlp(norm(x))                 a = b = 0 at first: the identity

(Flamingo, 2204.14198, figure 4.) Which items a token may look at follows from the
tags of the stream; of these it looks at the latest, or at all:

  stream          i  a  b  i  c | d  i  e       two documents, i = an item's marker
  order           0  1  2  3  4   0  1  2
  latest          0  0  0  3  3   -  1  1       - = none: attention gives exactly 0
  all                      0,3
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.batch import KeyTags, QueryTags, visible
from mmjax.names import closest
from mmjax.nn.cache import KV
from mmjax.nn.cross_attention import Config, CrossAttention
from mmjax.nn.transformer import Mlp
from mmjax.sharding import constrain, param

GATES = {'tanh': jnp.tanh, 'sigmoid': jax.nn.sigmoid}


def look_at(query_tags: QueryTags, item_tags: KeyTags, latest: bool) -> QueryTags:
  """What tokens may see of the items, as tags of queries.

  Args:
    query_tags: of the stream, i32[B, T].
    item_tags: segment, order and until of the items, i32[B, I]; the order is that
      of the item's marker.
    latest: only the latest item that a token may see, at or before itself, counts.
      One in a branch that the token can't see, or out of first..last, is not it.
  """
  if not latest:
    return query_tags
  seen = visible(query_tags, item_tags)
  order = jnp.max(jnp.where(seen, item_tags.order[:, None, :], -1), -1)
  return QueryTags(query_tags.segment_ids, order, order, query_tags.order)


def latent_tags(item_tags: KeyTags, num_latents: int) -> KeyTags:
  """Tags of the items' latents, i32[B, I * R], from those of the items."""
  return jax.tree.map(lambda x: jnp.repeat(x, num_latents, 1), item_tags)


class GatedCrossAttention(nn.Module):
  """The block of the equations above.

  Fields:
    config: D of the stream, media_dim of the latents.
    gate: tanh, or sigmoid: x + sigmoid(a) * ..., which is 1/2 at a = 0.
    gate_init: a and b at the start.
    gate_vector: a and b have an entry for each of the stream's D.
  """

  config: Config
  gate: str = 'tanh'
  gate_init: float = 0.0
  gate_vector: bool = False

  def setup(self):
    c = self.config
    if self.gate not in GATES:
      raise ValueError(f'unknown gate {self.gate!r}{closest(self.gate, GATES)}')
    self.attention_norm = c.make_norm()
    self.attention = CrossAttention(c)
    self.mlp_norm = c.make_norm()
    self.mlp = Mlp(c)
    init = nn.initializers.constant(self.gate_init)
    shape = ((c.embed_dim,), ('embed',)) if self.gate_vector else ((), ())
    self.attention_gate = param(self, 'attention_gate', init, *shape, c.param_dtype)
    self.mlp_gate = param(self, 'mlp_gate', init, *shape, c.param_dtype)

  def keys(self, latents: jax.Array) -> KV:
    """latents f[B, S, C] -> keys and values, each f[B, N, S, H]; made once to decode."""
    return self.attention.keys(latents)

  def __call__(
    self,
    x: jax.Array,
    media: jax.Array | KV,
    query_tags: QueryTags,
    key_tags: KeyTags,
  ) -> jax.Array:
    """Lets the stream look at the latents.

    Args:
      x: f[B, T, D]
      media: latents f[B, S, C], or what `keys` made of them.
      query_tags: i32[B, T], from `look_at`.
      key_tags: i32[B, S], from `latent_tags`.

    Returns:
      f[B, T, D]; x itself, bit by bit, while tanh gates are 0.

    Raises:
      ValueError: an unknown gate, or shapes that don't fit.
    """
    kv = media if isinstance(media, KV) else self.keys(media)

    def share(gate):
      return GATES[self.gate](gate.astype(jnp.float32))

    def add(x, y):
      return constrain(x + y, 'batch', 'seq', 'act_embed')

    # The gates go into the last kernels, see `linear`.
    y, tags = self.attention_norm(x), (query_tags, key_tags)
    x = add(x, self.attention(y, kv, *tags, share(self.attention_gate)))
    return add(x, self.mlp(self.mlp_norm(x), share(self.mlp_gate)))
