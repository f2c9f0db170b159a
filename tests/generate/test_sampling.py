import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.generate.sampling import Greedy, Sample, cut

LOGITS = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25], [0.7, 0.1, 0.1, 0.1]]))


def kept(**kwargs):
  return np.isfinite(cut(LOGITS, **{'top_k': None, 'top_p': None, **kwargs})).tolist()


def test_greedy_takes_the_first_of_the_largest():
  logits = jnp.array([[0.0, 2.0, 2.0], [5.0, 1.0, 1.0]])
  np.testing.assert_array_equal(Greedy()(logits, jax.random.key(0)), [1, 0])


def test_top_k_keeps_the_k_likeliest():
  assert kept(top_k=1) == [[False, True, False, False], [True, False, False, False]]
  assert kept(top_k=2)[0] == [False, True, False, True]
  assert kept(top_k=99) == [[True] * 4] * 2


def test_top_p_keeps_the_fewest_that_reach_p():
  assert kept(top_p=0.4)[0] == [False, True, False, False]
  assert kept(top_p=0.6)[0] == [False, True, False, True]
  assert kept(top_p=1e-6) == kept(top_k=1)
  assert kept(top_p=1.0) == [[True] * 4] * 2
  # Among the two likeliest, 0.5 and 0.25 become 2/3 and 1/3.
  assert kept(top_k=2, top_p=0.6)[0] == [False, True, False, False]


def test_draws_follow_the_probabilities():
  sampler = Sample(temperature=0.5, top_k=3)
  draw = jax.jit(jax.vmap(lambda key: sampler(LOGITS[:1], key)[0]))
  counts = np.bincount(draw(jax.random.split(jax.random.key(0), 20_000)), minlength=4)
  want = np.array([0, 0.5, 0.15, 0.25]) ** 2
  np.testing.assert_allclose(counts / 20_000, want / want.sum(), atol=0.015)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(temperature=0.0), 'temperature must be above 0, got 0.0; use Greedy'),
    (dict(top_k=0), 'top_k must be at least 1, got 0'),
    (dict(top_p=1.5), r'top_p must be in \(0, 1\], got 1.5'),
  ],
)
def test_refuses(fields, message):
  with pytest.raises(ValueError, match=message):
    Sample(**fields)
