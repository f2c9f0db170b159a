import functools

import bridge
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documents import pack

from mmjax import sharding
from mmjax.batch import KeyTags, QueryTags, visible
from mmjax.nn.cross_attention import Config
from mmjax.nn.gated_xattn import GatedCrossAttention, latent_tags, look_at

CONFIG = Config(embed_dim=16, media_dim=12, num_heads=2, head_dim=8, mlp_dim=32)
MODULE = GatedCrossAttention(CONFIG)
R = 2


def example():
  """Row 0: text, image, text, image, text | image, text. Row 1: see the test of
  branches. One slot per image, as a Flamingo's stream has."""
  rng = np.random.default_rng(0)
  text = lambda n, *b: ('text', rng.integers(1, 40, n), True, *b)  # noqa: E731
  image = lambda *b: ('image', rng.integers(0, 255, (1, 1, 6)), False, *b)  # noqa: E731
  first = [text(2), image(), text(2), image(), text(1)]
  second = [image(), text(2)]
  branched = [image(), text(1), text(1, 1), image(1), text(1, 1), text(2, 2), text(1, 0)]
  return pack([[first, second], [branched]], T=12, I=4)


def tags(batch, latest):
  """Tags of queries and items; an item's `until` is that of its marker."""
  s, bank = batch.stream, batch.bank['image']
  until = np.full(bank.item_order.shape, 2**31 - 1, np.int32)
  b, t = np.nonzero(s.source >= 0)
  until[b, s.source[b, t]] = s.until[b, t]
  items = KeyTags(bank.item_segments, bank.item_order, until)
  return look_at(s.query_tags, items, latest), items


LATEST = [
  [(), (), (0,), (0,), (0,), (1,), (1,), (2,), (2,), (2,), (), ()],
  # image, text | branch: text, image, text | branch: text, text | text
  [(0,), (0,), (0,), (1,), (1,), (0,), (0,), (0,), (), (), (), ()],
]
ALL = [
  [(), (), (0,), (0,), (0,), (0, 1), (0, 1), (2,), (2,), (2,), (), ()],
  [(0,), (0,), (0,), (0, 1), (0, 1), (0,), (0,), (0,), (), (), (), ()],
]


@pytest.mark.parametrize(('latest', 'want'), [(True, LATEST), (False, ALL)])
def test_tokens_see_the_items_they_may(latest, want):
  queries, items = tags(example(), latest)
  seen = np.asarray(visible(queries, items))
  got = [[tuple(np.flatnonzero(t)) for t in row] for row in seen]
  assert got == want


def test_window_hides_what_stands_before_it():
  """An item before `first` is not the latest, though nothing newer is."""
  ones = np.ones((1, 3), np.int32)
  order = np.array([[0, 1, 2]], np.int32)
  first = np.array([[0, 0, 1]], np.int32)
  items = KeyTags(ones[:, :1], np.zeros((1, 1), np.int32))
  queries = look_at(QueryTags(ones, first, order), items, True)
  np.testing.assert_array_equal(visible(queries, items)[0, :, 0], [True, True, False])


@functools.cache
def params(gate=1.0):
  made = jax.jit(MODULE.init)(jax.random.key(0), *inputs(True))['params']
  fill = lambda x: jnp.full_like(x, gate)  # noqa: E731
  return {**made, 'attention_gate': fill(jnp.ones(())), 'mlp_gate': fill(jnp.ones(()))}


@functools.cache
def inputs(latest):
  queries, items = tags(example(), latest)
  x = jax.random.normal(jax.random.key(1), (2, 12, 16))
  latents = jax.random.normal(jax.random.key(2), (2, 4 * R, 12))
  return x, latents, queries, latent_tags(items, R)


run = jax.jit(lambda params, *args: MODULE.apply({'params': params}, *args))


def test_gate_at_zero_is_the_identity_bit_by_bit():
  x, *rest = inputs(True)
  variables = jax.jit(MODULE.init)(jax.random.key(0), x, *rest)
  np.testing.assert_array_equal(run(variables['params'], x, *rest), x)
  assert np.abs(run(params(), x, *rest) - x).max() > 0.1


def test_sigmoid_gate_is_half_open_at_zero():
  half = MODULE.clone(gate='sigmoid')
  zero = {**params(), 'mlp_gate': jnp.full((), -jnp.inf), 'attention_gate': jnp.zeros(())}
  got = half.apply({'params': zero}, *inputs(True))
  tanh = {**zero, 'mlp_gate': jnp.zeros(()), 'attention_gate': jnp.arctanh(0.5)}
  np.testing.assert_allclose(got, run(tanh, *inputs(True)), atol=1e-6)


@pytest.mark.parametrize(('latest', 'want'), [(True, LATEST), (False, ALL)])
def test_a_token_changes_when_and_only_when_its_image_does(latest, want):
  x, latents, *rest = inputs(latest)
  before = run(params(), x, latents, *rest)
  for b, i in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)):
    after = run(params(), x, latents.at[b, i * R].add(1.0), *rest)
    changed = np.any(np.asarray(before != after), -1)
    assert not changed[1 - b].any()
    np.testing.assert_array_equal(changed[b], [i in seen for seen in want[b]])


def test_a_token_before_any_image_gets_exactly_nothing():
  """Even from latents that are huge; only the feed-forward is left."""
  x, latents, *rest = inputs(True)
  shut = {**params(), 'mlp_gate': jnp.zeros(())}
  got = run(shut, x, latents * 1e20, *rest)
  np.testing.assert_array_equal(got[0, :2], x[0, :2])
  np.testing.assert_array_equal(got[0, 10:], x[0, 10:])
  assert np.isfinite(got).all() and np.any(got[0, 2] != x[0, 2])


def test_keys_made_before_change_nothing():
  x, latents, *rest = inputs(True)
  kv = MODULE.apply({'params': params()}, latents, method='keys')
  want = run(params(), x, latents, *rest)
  np.testing.assert_array_equal(run(params(), x, kv, *rest), want)


def test_every_parameter_has_names():
  init = lambda key: MODULE.init(key, *inputs(True))  # noqa: E731
  names = sharding.axis_names(init, jax.random.key(0))['params']
  assert tuple(names['attention']['out']) == ('heads', 'head_dim', 'embed')
  assert tuple(names['attention_gate']) == ()


def test_bridges_to_nnx():
  made, got, want = bridge.both(MODULE.clone(gate_init=0.5), *inputs(True))
  assert float(made['mlp_gate']) == 0.5
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_refuses():
  with pytest.raises(ValueError, match="unknown gate 'tan'; did you mean 'tanh'"):
    MODULE.clone(gate='tan').init(jax.random.key(0), *inputs(True))
  x, latents, *rest = inputs(True)
  with pytest.raises(ValueError, match='linear: x ends in .11,., the kernel takes .12,'):
    MODULE.apply({'params': params()}, x, latents[..., 1:], *rest)


def test_a_gate_per_channel_scales_each_of_them():
  """Equal entries are the one gate; entries of 0 leave their channel as it is."""
  x, *rest = inputs(True)
  many = jax.jit(MODULE.clone(gate_vector=True).apply)
  gates = dict.fromkeys(('attention_gate', 'mlp_gate'), jnp.full((16,), 0.5))
  got = many({'params': {**params(0.5), **gates}}, x, *rest)
  np.testing.assert_allclose(got, run(params(0.5), x, *rest), atol=1e-6)
  shut = {k: g.at[3].set(0.0) for k, g in gates.items()}
  got = many({'params': {**params(0.5), **shut}}, x, *rest)
  np.testing.assert_array_equal(got[..., 3], x[..., 3])
