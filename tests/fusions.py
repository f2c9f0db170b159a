"""What holds for every fusion, as checks that a model's tests call.

Models take `PackedBatch` and give hidden, with methods `logits`, `extend`, `empty_cache`
and `unscanned`. Programs are compiled once for a model and kept.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from documents import length, pack

from mmjax import sharding
from mmjax.batch import PackedBatch
from mmjax.ops.losses import next_token_loss


@functools.partial(jax.jit, static_argnames='model')
def logits(params, batch, model):
  hidden = model.apply({'params': params}, batch)
  return model.apply({'params': params}, hidden, method='logits')


def loss_fn(model, params, batch):
  """(sum of losses, weight) over at most 24 trained slots a row."""
  hidden = model.apply({'params': params}, batch)
  head = model.apply({'params': params}, method='head')
  return next_token_loss(hidden, head, batch.stream, 24)[:2]


@functools.partial(jax.jit, static_argnames='model')
def loss_and_grads(params, batch, model):
  value, pull = jax.vjp(lambda p: loss_fn(model, p, batch), params)
  return value, pull((jnp.ones(()), jnp.zeros(())))[0]


def assert_close(got, want, rtol):
  """|got - want| <= rtol |want| in the Euclidean norm of each leaf.

  A key's bias moves all logits of a query alike: its gradient is 0 but for rounding.
  """
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  )
  for (path, g), w in pairs:
    norm = np.linalg.norm(np.ravel(w))
    if 'key_bias' in jax.tree_util.keystr(path):
      norm = 1.0
    error = np.linalg.norm(np.ravel(g - w)) / norm
    assert error <= rtol, f'{error:.2e} for {jax.tree_util.keystr(path)}'


# By name: preset, mesh and rules besides.
MESHES = {
  'dp8': ('dp', dict(data=8), {}),
  'fsdp8': ('fsdp', dict(fsdp=8), {}),
  'fsdp4 tensor2': ('fsdp+tensor', dict(fsdp=4, tensor=2), {}),
  'context8': ('fsdp', dict(context=8), {}),
  'mixed': ('fsdp+tensor', dict(fsdp=2, tensor=2, context=2), {}),
  'all to all': (
    'fsdp+tensor', dict(fsdp=2, tensor=2, context=2), {'attend_heads': 'context'}
  ),
}  # fmt: skip


def on_mesh(run, model, weights, batch, mesh):
  """run(weights, batch) where both are placed on one of `MESHES`; and the weights."""
  preset, sizes, others = MESHES[mesh]
  mesh, rules = sharding.make_mesh(sizes), sharding.rules_for(preset, others)
  names = sharding.axis_names(model.init, jax.random.key(0), batch)['params']
  with sharding.use(mesh, rules):
    where = sharding.shardings(names, weights, mesh, rules)
    weights = jax.device_put(weights, where)
    batch = jax.device_put(batch, sharding.batch_shardings(batch, mesh, rules))
    # A new jit: another one may hold the program without constraints.
    lowered = jax.jit(lambda p, b: run(p, b)).lower(weights, batch)
    assert 'sharding_constraint' in lowered.as_text()
    return lowered.compile()(weights, batch), weights


def eight_devices_equal_one(model, weights, batch, mesh='fsdp4 tensor2', rtol=1e-5):
  """Loss and gradients on one of `MESHES`; returns the placed parameters."""
  want = loss_and_grads(weights, batch, model)

  def run(p, b):
    return loss_and_grads.__wrapped__(p, b, model)

  got, weights = on_mesh(run, model, weights, batch, mesh)
  assert_close(got, want, rtol)
  return weights


@functools.partial(jax.jit, static_argnames='model')
def extend(params, batch, cache, slot, model):
  variables = {'params': params}
  hidden, cache = model.apply(variables, batch, cache, slot, method='extend')
  return model.apply(variables, hidden, method='logits'), cache


def cached_equals_full(model, weights, atol=2e-5):
  """Some spans at a time, padded to one width, each with the items that are new."""
  rng = np.random.default_rng(3)
  text = lambda n, *b: ('text', rng.integers(1, 39, n), True, *b)  # noqa: E731
  image = lambda *b: ('image', rng.integers(0, 99, (2, 2, 6)), False, *b)  # noqa: E731
  pieces = [
    [text(2), image(), text(3)],
    [image(), text(1, 0), text(2, 1), image(1)],
    [text(1, 1), text(2, 2), text(1, 0)],
  ]
  batch = pack([[sum(pieces, [])]], markers=True)
  want = logits(weights, batch, model)[0]
  width, t = 8, 0
  cache = model.empty_cache(1, width * len(pieces))
  for i, spans in enumerate(pieces):
    n, piece = length(spans, True), pack([[]], T=width)
    for name, x in vars(piece.stream).items():
      x[0, :n] = getattr(batch.stream, name)[0, t : t + n]
    # The whole bank, since `source` counts in it, but no item that stands elsewhere.
    bank = batch.bank['image']
    here = np.isin(np.arange(bank.item_order.shape[1]), piece.stream.source)
    bank = dataclasses.replace(bank, item_segments=bank.item_segments * here)
    piece = PackedBatch(piece.stream, {'image': bank} if here.any() else {})
    got, cache = extend(weights, piece, cache, jnp.int32(i * width), model)
    np.testing.assert_allclose(got[0, :n], want[t : t + n], rtol=0, atol=atol)
    t += n
