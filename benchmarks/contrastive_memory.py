"""Memory of the contrastive loss and its gradient per TPU chip, compiled without one.

python benchmarks/contrastive_memory.py                     # the loss alone
python benchmarks/contrastive_memory.py --model   # with CLIP B/16's towers

One JSON line per case: `ring` is `ops.contrastive`, `naive` the whole matrix of logits,
split by rows and differentiated by JAX. `peak_mib` is libtpu's peak per device, inputs
and gradients included. Needs jax[tpu]; nothing runs.
"""

import argparse
import json

import compiled  # before JAX
import jax
import jax.numpy as jnp

from mmjax import models, sharding
from mmjax.batch import BankBudget, Budget
from mmjax.ops.contrastive import contrastive_loss
from mmjax.train import tasks

# Chips and pairs: a global batch of 32,768 on both, and one of 2,048 a chip.
CASES = (('v5e:4x4', 32_768), ('v5e:16x16', 32_768), ('v5e:16x16', 524_288))


def naive(x, y, weights, scale):
  logits = scale * jnp.einsum('nE,mE->nm', x, y, precision='highest')
  own = jnp.diagonal(logits)
  losses = (jax.nn.logsumexp(logits, 1) + jax.nn.logsumexp(logits, 0)) / 2 - own
  return jnp.sum(weights * losses)


def ring(x, y, weights, scale):
  return contrastive_loss(x, y, weights, scale, jnp.zeros(()))[0]


LOSSES = {'ring': ring, 'naive': naive}


def loss_alone(loss, pairs, embed_dim, mesh, rules):
  """(function, shapes) of the loss and its gradient, of embeddings."""
  rows = sharding.NamedSharding(mesh, sharding.to_spec(('batch', None), rules))
  one = sharding.NamedSharding(mesh, sharding.to_spec(('batch',), rules))
  x = jax.ShapeDtypeStruct((pairs, embed_dim), jnp.float32, sharding=rows)
  weights = jax.ShapeDtypeStruct((pairs,), jnp.float32, sharding=one)
  scale = jax.ShapeDtypeStruct((), jnp.float32)
  run = jax.value_and_grad(LOSSES[loss], (0, 1, 3))
  return jax.jit(run, out_shardings=(None, (rows, rows, None))), (x, x, weights, scale)


def whole_model(pairs, mesh, rules):
  """(function, shapes) of the gradient of CLIP B/16, bfloat16, 128 pairs a microbatch."""
  tower = dict(num_layers=12, remat='full', dtype='bfloat16')
  model = models.build(
    'dual',
    vision=dict(
      name='vit', embed_dim=768, num_heads=12, mlp_dim=3072, pool='class',
      position_grid=(14, 14), chunk=256, **tower,
    ),
    text=dict(
      name='unified', embed_dim=512, num_heads=8, num_kv_heads=8, head_dim=64,
      mlp_dim=2048, norm='layer', bias='all', gated=False, rotary=False,
      max_positions=77, **tower,
    ),
    embed_dim=512, media=(('image', 768),), vocab_size=49_408,
  )  # fmt: skip
  empty = Budget(77, 77, {'image': BankBudget(196, 1, 768)}).empty(pairs)
  places = sharding.batch_shardings(empty, mesh, rules)
  batch = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), empty, places
  )
  small = Budget(77, 77, {'image': BankBudget(196, 1, 768)}).empty(mesh.size)

  def init(rng):
    return model.init(rng, small)['params']

  rng = jax.eval_shape(lambda: jax.random.key(0))
  shapes = jax.eval_shape(init, rng)
  placed = sharding.shardings(sharding.axis_names(init, rng), shapes, mesh, rules)
  params = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed
  )

  accumulate = max(pairs // mesh.size // 128, 1)
  loss_fn = tasks.contrastive(model, accumulate=accumulate)

  def value(params, batch):
    return loss_fn(params, batch, jax.random.key(0), True)[0]

  return jax.jit(jax.grad(value), out_shardings=placed), (params, batch)


def measure(topology, pairs, loss, model, embed_dim):
  """The line of one case."""
  devices = compiled.devices(topology)
  chips = len(devices)
  sizes = dict(data=chips // 16, fsdp=16)
  mesh = sharding.make_mesh(sizes, devices)
  rules = sharding.rules_for('fsdp')
  line = {
    'what': 'clip_b16' if model else 'loss', 'loss': loss, 'topology': topology,
    'chips': chips, 'pairs': pairs, 'pairs_per_chip': pairs // chips,
  }  # fmt: skip
  with sharding.use(mesh, rules):
    if model:
      run, shapes = whole_model(pairs, mesh, rules)
    else:
      run, shapes = loss_alone(loss, pairs, embed_dim, mesh, rules)
    return line | compiled.memory(run, shapes)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--model', action='store_true', help='both towers too')
  parser.add_argument('--embed-dim', type=int, default=512)
  parser.add_argument('--case', type=int, help='only this one of the cases')
  parser.add_argument('--loss', choices=LOSSES, help='only this one')
  args = parser.parse_args()
  for i, (topology, pairs) in enumerate(CASES):
    for loss in LOSSES:
      if args.case not in (None, i) or args.loss not in (None, loss):
        continue
      if args.model and loss == 'naive':
        continue
      line = measure(topology, pairs, loss, args.model, args.embed_dim)
      print(json.dumps(line), flush=True)


if __name__ == '__main__':
  main()
