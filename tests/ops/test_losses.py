import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.batch import FOREVER, Stream
from mmjax.ops.losses import (
  next_token_loss,
  previous_slots,
  select_targets,
  token_losses,
  trained_slots,
)
from mmjax.ops.vocabulary import Head

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
  order, until = branches(rng, segments)
  stream = Stream(
    tokens.astype(np.int32), segments.astype(np.int32), order, zeros, order, until,
    np.zeros((B, T, 3), np.int32), weights.astype(np.float32), zeros,
  )  # fmt: skip
  hidden = rng.normal(size=(B, T, D)).astype(np.float32)
  return hidden, rng.normal(size=(D, V)).astype(np.float32), stream


def branches(rng, segments):
  """Ranks that count the slots of each segment, and random branches inside them."""
  order, until = np.zeros_like(segments), np.full_like(segments, FOREVER)
  for b in range(len(segments)):
    for segment in np.unique(segments[b]):
      slots = np.flatnonzero(segments[b] == segment)
      order[b, slots] = np.arange(len(slots))
      cuts = np.unique(rng.integers(0, len(slots) + 1, 4))
      for start, stop in zip(cuts, cuts[1:]):
        if rng.random() < 0.7:
          until[b, slots[start:stop]] = stop - 1
  return order.astype(np.int32), until.astype(np.int32)


def before(stream, b, t):
  """The nearest earlier slot of the document that is still seen at t; -1 if none."""
  for s in range(t - 1, -1, -1):
    same = stream.segment_ids[b, s] == stream.segment_ids[b, t]
    if same and stream.until[b, s] >= stream.order[b, t]:
      return s
  return -1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_slot_before_is_the_nearest_that_is_still_seen(seed):
  stream = example(seed)[2]
  got = jax.jit(previous_slots)(stream)
  for b, t in np.ndindex(got.shape):
    assert got[b, t] == before(stream, b, t)


def full(hidden, table, stream, z_loss):
  """All logits, one slot after the other, float64."""
  ce = z = weight = correct = 0.0
  for b, t in np.ndindex(stream.tokens.shape):
    w = float(stream.weights[b, t])
    segment = stream.segment_ids[b, t]
    if w and segment and before(stream, b, t) >= 0:
      logits = hidden[b, before(stream, b, t)].astype(np.float64) @ table
      log_z = np.log(np.exp(logits).sum())
      ce += w * (log_z - logits[stream.tokens[b, t]])
      z += z_loss * w * log_z**2
      correct += w * (np.argmax(logits) == stream.tokens[b, t])
      weight += w
  return ce, z, weight, correct


# Bytes of logits: of two or three words of all 42 places at a time, or of all words.
LIMITS = [500, 2**20]


def head_of(table):
  return Head((table,), (('embed', 'vocab'),))


@functools.partial(jax.jit, static_argnames=('num_targets', 'z_loss', 'limit'))
def loss_of(hidden, table, stream, num_targets, **kwargs):
  return next_token_loss(hidden, head_of(table), stream, num_targets, **kwargs)


@functools.partial(jax.jit, static_argnames='limit')
def losses_of(hidden, table, stream, limit):
  return token_losses(hidden, head_of(table), stream, 14, limit=limit)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), limit=st.sampled_from(LIMITS))
def test_losses_by_token_are_those_of_full_logits(seed, limit):
  hidden, table, stream = example(seed)
  got = losses_of(hidden, table, stream, limit)
  for b in range(3):
    want = [t for t in range(14) if stream.weights[b, t] and stream.segment_ids[b, t]
            and before(stream, b, t) >= 0]  # fmt: skip
    used = np.asarray(got.used[b])
    assert got.slots[b][used].tolist() == want
    assert got.tokens[b][used].tolist() == stream.tokens[b, want].tolist()
    assert not got.losses[b][~used].any()
    for t, loss in zip(want, got.losses[b][used]):
      logits = hidden[b, before(stream, b, t)].astype(np.float64) @ table
      right = np.log(np.exp(logits).sum()) - logits[stream.tokens[b, t]]
      np.testing.assert_allclose(loss, right, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
  seed=st.integers(0, 1000),
  form=st.sampled_from(list(zip(LIMITS, (0.1, 0.0)))),
)
def test_equals_full_logits(seed, form):
  limit, z_loss = form
  hidden, table, stream = example(seed)
  loss, weight, sums = loss_of(hidden, table, stream, 14, z_loss=z_loss, limit=limit)
  want = full(hidden, table, stream, z_loss)
  got = [sums['ce'], sums['z_loss'], weight, sums['correct']]
  np.testing.assert_allclose(got, want, rtol=1e-6)
  np.testing.assert_allclose(loss, want[0] + want[1], rtol=1e-6)
  assert sums['lost'] == 0
  assert int(sums['targets']) == np.asarray(trained_slots(stream)).sum()


@pytest.mark.parametrize('limit', LIMITS)
def test_gradient_equals_plain(limit):
  hidden, table, stream = example(1)
  places = np.argwhere(trained_slots(stream))

  def plain(hidden, table):
    logp = jax.nn.log_softmax(hidden @ table)
    total = 0.0
    for b, t in places:
      token = stream.tokens[b, t]
      total -= stream.weights[b, t] * logp[b, before(stream, b, t), token]
    return total

  got = jax.grad(lambda h, w: loss_of(h, w, stream, 14, limit=limit)[0], (0, 1))(
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


@pytest.mark.parametrize('change', [dict(num_targets=0), dict(T=1)])
def test_refuses(change):
  hidden, table, stream = example(0)
  T = change.pop('T', 14)
  hidden, stream = hidden[:, :T], jax.tree.map(lambda x: x[:, :T], stream)
  with pytest.raises(ValueError, match='needs num_targets >= 1 and two slots'):
    loss_of(hidden, table, stream, **{'num_targets': 4, **change})
