"""What devices of a TPU send each other in a step, read in the compiled program."""

import math
import re

import jax
import pytest
import tpu

from mmjax import sharding
from mmjax.train import build, step

MOVES = 'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute'


def sent(config):
  """Types of the arrays of 4,096 numbers or more that collectives give."""
  key = jax.random.key(0)
  p = build.build(config, 4096, tpu.devices())
  places = jax.tree.map(lambda x: x.sharding, p.abstract.params)
  with sharding.use(p.mesh, p.rules), tpu.optimised():
    run = step.make_step(p.loss_fn, p.optimizer, key, grad_shardings=places)
    batch = p.batch_shapes(config.data.rows)
    text = step.compile_step(run, p.abstract, batch).as_text()
  found = {}
  for result, kind in re.findall(rf' = (.*?) ({MOVES})(?:-start)?\(', text):
    for dtype, shape in re.findall(r'(\w+)\[([\d,]+)\]', result):
      if math.prod(map(int, shape.split(','))) >= 4096:
        found.setdefault(dtype, set()).add((kind, shape))
  return found


@pytest.mark.slow
@tpu.NEEDED
def test_narrow_gradients_and_parameters_are_what_is_sent(tiny):
  config = tiny(
    model=dict(
      dtype='bfloat16', embed_dim=256, head_dim=128, mlp_dim=512, tie_embeddings=False,
      remat='full',
    ),
    optim=dict(grad_dtype='bfloat16'),
    sharding=dict(preset='fsdp', mesh=dict(data=2, fsdp=2)),
  )  # fmt: skip
  found = sent(config)
  assert found['bf16'] and 'f32' not in found, found
