"""CPU devices that stand in for two nodes of four GPUs: slice 2 x fsdp 4."""

import pathlib

import jax
import numpy as np
import pytest

from mmjax import sharding
from mmjax.train import build, config
from mmjax.train import step as step_lib

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / 'configs').glob('*.py'))
SLOW = dict(name='sgd', learning_rate=1.0, options=dict(momentum=0.0))
NODES = dict(slice=2, data=1, fsdp=4)


def test_a_step_on_two_nodes_is_the_step_on_one_device(tiny, pictures, stepper):
  """Each node holds all parameters, split over its devices; rows are split over all."""
  one, parts = stepper(tiny(optim=SLOW))
  two, _ = stepper(tiny(optim=SLOW, sharding=dict(preset='fsdp', mesh=NODES)), devices=8)
  batch = pictures(parts.budget, 8)
  before = jax.device_get(one.state.params)
  want, got = one(batch), two(batch)
  for name in ('loss', 'grad_norm', 'weight'):
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)
  after = [jax.device_get(run.state.params) for run in (one, two)]
  for start, a, b in zip(*map(jax.tree.leaves, (before, *after)), strict=True):
    assert np.abs(a - b).max() <= 1e-5 * max(np.abs(a - start).max(), 1e-6)
  for leaf in jax.tree.leaves(two.state.params):
    held = leaf.sharding.devices_indices_map(leaf.shape)
    nodes = [{k.id % 4: v for k, v in held.items() if k.id // 4 == n} for n in (0, 1)]
    assert nodes[0] == nodes[1]
  assert any(not x.is_fully_replicated for x in jax.tree.leaves(two.state.params))


@pytest.mark.slow
@pytest.mark.parametrize('file', CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_lower_for_two_nodes(file):
  made = config.load(f'{file}:tiny')
  made.data.rows = 8 * made.train.accumulate
  made.sharding.update(preset='fsdp', mesh=NODES, max_replicated=1.0)
  parts = build.build(made, 512, jax.devices())
  places = jax.tree.map(lambda x: x.sharding, parts.abstract.params)
  with sharding.use(parts.mesh, parts.rules):
    run = step_lib.make_step(
      parts.loss_fn,
      parts.optimizer,
      jax.random.key(1),
      accumulate=parts.accumulate,
      grad_shardings=places,
    )
    shapes = parts.batch_shapes(made.data.rows)
    text = jax.jit(run).lower(parts.abstract, shapes).as_text()
  assert '"slice"=2' in text and '{"slice", "data", "fsdp"}' in text
