import jax
import jax.numpy as jnp
import pytest

from mmjax.plan.flops import flops, model_flops

X, W = jnp.zeros((5, 3)), jnp.zeros((3, 3))
ONE = 2 * 5 * 3 * 3


def test_counts_products_alone():
  assert flops(lambda x, w: jnp.exp(x @ w) + 1, X, W) == ONE
  batched = (
    jax.ShapeDtypeStruct((4, 5, 3), 'float32'),
    jax.ShapeDtypeStruct((4, 3, 7), 'float32'),
  )
  assert (
    flops(lambda a, b: jnp.einsum('bij,bjk->bik', a, b), *batched) == 4 * 2 * 5 * 3 * 7
  )


def test_loops_count_by_their_trips():
  def chain(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=6)[0]

  assert flops(chain, X, W) == 6 * ONE
  nested = lambda x, w: jax.lax.fori_loop(0, 4, lambda _, x: chain(x, w), x)  # noqa: E731
  assert flops(nested, X, W) == 24 * ONE
  endless = lambda x, w: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x)  # noqa: E731
  with pytest.raises(ValueError, match='trips are not known'):
    flops(endless, X, W)


def test_gradients_and_what_is_made_anew():
  def loss(w, x):
    return jnp.sum(jnp.sin(x @ w))

  assert flops(jax.grad(loss), W, X) == 2 * ONE  # forward, and the weight's gradient
  assert flops(jax.grad(loss, (0, 1)), W, X) == 3 * ONE
  again = jax.checkpoint(lambda w, x: jnp.sum(jnp.sin(jnp.sin(x @ w) @ w)))
  once = lambda w, x: jnp.sum(jnp.sin(jnp.sin(x @ w) @ w))  # noqa: E731
  assert flops(jax.grad(again), W, X) > flops(jax.grad(once), W, X)


def test_calls_branches_and_devices():
  assert flops(jax.jit(lambda x, w: x @ w), X, W) == ONE
  pick = lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x)  # noqa: E731
  assert flops(pick, X, W) == 2 * ONE
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  P = jax.sharding.PartitionSpec
  each = jax.shard_map(
    lambda x, w: x @ w, mesh=mesh, in_specs=(P('data'), P()), out_specs=P('data')
  )
  assert flops(each, jnp.zeros((16, 3)), W) == 2 * 16 * 3 * 3


def test_convolutions():
  x, kernel = jnp.zeros((2, 8, 8, 6)), jnp.zeros((3, 3, 3, 10))

  def conv(x, kernel):
    numbers = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(
      x, kernel, (2, 2), 'SAME', dimension_numbers=numbers, feature_group_count=2
    )

  assert flops(conv, x, kernel) == 2 * (2 * 4 * 4 * 10) * (3 * 3 * 3)


class TestModelFlops:
  """x W1 W2, summed: what is needed depends on who is trained."""

  params = {'one': W, 'two': W}

  def count(self, loss=None, causal=(), **trained):
    loss = loss or (lambda p, x: jnp.sum(jnp.sin(x @ p['one']) @ p['two']))
    return model_flops(loss, self.params, {'one': True, 'two': True} | trained, X, causal)

  def test_all_frozen_or_trained(self):
    assert self.count() == (2 + 3) * ONE  # the data's own gradient isn't needed
    assert self.count(one=False) == (1 + 2) * ONE  # an encoder in front
    assert self.count(two=False) == (2 + 2) * ONE  # frozen, but passed through
    assert self.count(one=False, two=False) == 2 * ONE

  def test_loops_and_what_is_made_anew_count_once(self):
    def loss(p, x):
      layer = jax.checkpoint(lambda x, _: (jnp.sin(x @ p['one']), None))
      return jnp.sum(jax.lax.scan(layer, x, None, length=4)[0])

    # The loop's body is counted as it is from the second trip on.
    assert self.count(loss) == 4 * 3 * ONE

  def test_branches_calls_and_integers(self):
    def loss(p, x):
      y = jax.lax.cond(x.sum() > 0, lambda x: x @ p['one'], lambda x: x, x)
      ids = jnp.argmax(y, -1)
      table = jax.jit(lambda i: jax.nn.one_hot(i, 3))(ids)
      return jnp.sum(table @ p['two'])

    assert self.count(loss) == (2 + 2) * ONE

  def test_causal_products_count_half(self):
    def loss(p, x):
      with jax.named_scope('lm'), jax.named_scope('transformer'):
        y = x @ p['one']
        return jnp.sum(y @ y.T)

    half = 3 * 2 * 5 * 3 * 5 // 2
    assert self.count(loss) == 2 * ONE + 2 * half
    assert self.count(loss, ('lm/transformer',)) == 2 * ONE + half
    assert self.count(loss, ('vision/transformer',)) == 2 * ONE + 2 * half
    endless = lambda p, x: jax.lax.while_loop(lambda y: y.sum() > 0, lambda y: y @ W, x)  # noqa: E731
    with pytest.raises(ValueError, match='trips are not known'):
      self.count(endless)
