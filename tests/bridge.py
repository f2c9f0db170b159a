"""A Linen module and the NNX module that Flax's bridge makes of it, beside each other."""

import jax
from flax import nnx


def both(module, *args):
  """(parameters that NNX made, what its module gives, what Linen's gives with them).

  Compiled: op by op, the making alone takes three times as long.
  """

  @jax.jit
  def bridged(*args):
    made = nnx.bridge.lazy_init(nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)), *args)
    return nnx.to_pure_dict(nnx.state(made, nnx.Param)), made(*args)

  params, got = bridged(*args)
  return params, got, jax.jit(module.apply)({'params': params}, *args)
