import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.batch import Stream
from mmjax.ops.losses import next_token_loss, select_targets, trained_slots

V, D = 11, 6


def example(seed, B=3, T=14):
  """Random packed rows with padding at the end, real-valued weights, a few media."""
  rng = np.random.default_rng(seed)
  segments = np.sort(rng.integers(1, 4, (B, T)), 1)
  segments[:, T - int(rng.integers(1, 4)) :] = 0
  weights = rng.uniform(0.5, 2, (B, T)) * (rng.uniform(size=(B, T)) < 0.4)
  tokens = rng.integers(0, V, (B, T))
  weights, tokens[:, 4] = np.where(np.arange(T) == 4, 0, weights), -1
  zeros = np.zeros((B, T), np.int32)
  stream = Stream(
    tokens.astype(np.int32), segments.astype(np.int32), zeros, zeros, zeros,
    np.zeros((B, T, 3), np.int32), weights.astype(np.float32), zeros,
  )  # fmt: skip
  hidden = rng.normal(size=(B, T, D)).astype(np.float32)
  return hidden, rng.normal(size=(D, V)).astype(np.float32), stream


def full(hidden, table, stream, z_loss):
  """All logits, one slot after the other, float64."""
  ce = z = weight = correct = 0.0
  for b, t in np.ndindex(stream.tokens.shape):
    w = float(stream.weights[b, t])
    segment = stream.segment_ids[b, t]
    if t and w and segment and segment == stream.segment_ids[b, t - 1]:
      logits = hidden[b, t - 1].astype(np.float64) @ table
      log_z = np.log(np.exp(logits).sum())
      ce += w * (log_z - logits[stream.tokens[b, t]])
      z += z_loss * w * log_z**2
      correct += w * (np.argmax(logits) == stream.tokens[b, t])
      weight += w
  return ce, z, weight, correct


@functools.partial(jax.jit, static_argnames=('num_targets', 'z_loss', 'chunk'))
def loss_of(hidden, table, stream, num_targets, **kwargs):
  def head(h):
    return jnp.einsum('...d,dv->...v', h, table)

  return next_token_loss(hidden, head, stream, num_targets, **kwargs)


@settings(max_examples=15, deadline=None)
@given(
  seed=st.integers(0, 1000),
  form=st.sampled_from([(3, 0.1), (100, 0.0)]),
)
def test_equals_full_logits(seed, form):
  chunk, z_loss = form
  hidden, table, stream = example(seed)
  loss, weight, sums = loss_of(hidden, table, stream, 14, z_loss=z_loss, chunk=chunk)
  want = full(hidden, table, stream, z_loss)
  got = [sums['ce'], sums['z_loss'], weight, sums['correct']]
  np.testing.assert_allclose(got, want, rtol=1e-6)
  np.testing.assert_allclose(loss, want[0] + want[1], rtol=1e-6)
  assert sums['lost'] == 0
  assert int(sums['targets']) == np.asarray(trained_slots(stream)).sum()


@pytest.mark.parametrize('chunk', [3, 100])
def test_gradient_equals_plain(chunk):
  hidden, table, stream = example(1)

  def plain(hidden, table):
    logp = jax.nn.log_softmax(hidden[:, :-1] @ table)
    index = jnp.maximum(stream.tokens[:, 1:, None], 0)
    picked = jnp.take_along_axis(logp, index, -1)[..., 0]
    mask = trained_slots(stream)[:, 1:]
    return -jnp.sum(jnp.where(mask, stream.weights[:, 1:] * picked, 0.0))

  got = jax.grad(lambda h, w: loss_of(h, w, stream, 14, chunk=chunk)[0], (0, 1))(
    hidden, table
  )
  want = jax.jit(jax.grad(plain, (0, 1)))(hidden, table)
  for g, w in zip(got, want):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)
    assert np.any(g)


def test_too_few_places_are_counted_not_hidden():
  hidden, table, stream = example(2)
  number = np.asarray(trained_slots(stream)).sum(1)
  places = int(number.max()) - 1
  _, _, sums = loss_of(hidden, table, stream, places)
  assert int(sums['lost']) == np.maximum(number - places, 0).sum() > 0
  slots, used = select_targets(stream, places)
  for b in range(3):
    want = np.flatnonzero(trained_slots(stream)[b])[:places]
    np.testing.assert_array_equal(slots[b][used[b]], want)


def test_nothing_trained_is_zero_with_finite_gradient():
  hidden, table, stream = example(0)
  stream = jax.tree.map(np.zeros_like, stream)

  def f(h):
    return loss_of(h, table, stream, 4)[:2]

  (loss, weight), pull = jax.vjp(f, hidden)
  assert loss == weight == 0
  np.testing.assert_array_equal(pull((jnp.float32(1), jnp.float32(0)))[0], 0)


def test_logits_never_exist_at_all_slots():
  B, T, vocab = 2, 64, 1000
  hidden, _, stream = example(0, B, T)
  table = np.ones((D, vocab), np.float32)

  def f(h, w):
    return loss_of(h, w, stream, 16, chunk=4)[0]

  compiled = jax.jit(jax.grad(f, (0, 1))).lower(hidden, table).compile()
  # Two or three arrays of chunk logits and the gradient of the table.
  bound = 4 * (4 * B * 4 * vocab + 4 * D * vocab)
  assert compiled.memory_analysis().temp_size_in_bytes < bound < B * T * vocab * 4


@pytest.mark.parametrize('change', [dict(num_targets=0), dict(chunk=0), dict(T=1)])
def test_refuses(change):
  hidden, table, stream = example(0)
  T = change.pop('T', 14)
  hidden, stream = hidden[:, :T], jax.tree.map(lambda x: x[:, :T], stream)
  with pytest.raises(
    ValueError, match='needs num_targets >= 1, chunk >= 1 and two slots'
  ):
    loss_of(hidden, table, stream, **{'num_targets': 4, **change})
