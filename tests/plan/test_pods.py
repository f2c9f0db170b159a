"""The pod configs against their budgets, compiled for TPUs that aren't here.

All of them take the better part of an hour on one core: `pytest -m pods tests/plan`.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from pods import FILE, PODS, budget, chips, load, off, table

from mmjax import sharding
from mmjax.plan.compile import lower

GOLDEN = json.loads(FILE.read_text())
TINY = 'unified_8b:tiny@v5e:2x2'
QUICK = {TINY}
# Two nodes of four GPUs, which CPU devices stand in for.
NODES = dict(slice=2, data=1, fsdp=4)
# One of each kind; that all configs lower for it, tests/train/test_slices.py asks.
KINDS = ('unified_8b', 'unified_4b_image', 'flamingo_9b', 'clip_l14')


@pytest.mark.slow
@pytest.mark.usefixtures('tpu')
@pytest.mark.parametrize(
  'name', [n if n in QUICK else pytest.param(n, marks=pytest.mark.pods) for n in PODS]
)
def test_takes_what_it_took(name):
  now = budget(load(name), name)
  assert off(now, GOLDEN[name]) == {}
  assert now['hbm'] < chips(name).chip.hbm


@pytest.mark.slow
@pytest.mark.usefixtures('tpu')
def test_a_wrong_partition_spec_is_found():
  """Kernels whole on every chip, as a forgotten axis name would leave them."""
  assert off(budget(load(TINY, embed=None), TINY), GOLDEN[TINY])


def test_table_says_which_goals_are_not_met():
  made = dict(hbm=16 * 2**30, wire=5e10, modelled_mfu=0.56)
  lines = table({'unified_8b@v5e:16x16': made}).splitlines()
  assert lines[2] == (
    '| `unified_8b` | `v5e:16x16` | 0.560 | **16.00** | 5e10 |'
    ' MaxText 0.509, 6.41, 6e10 | 0.550, 15.00, 6e10 |'
  )
  assert sum('not compiled yet' in line for line in lines) == len(lines) - 3


def full(budget, rows):
  """A picture and text in every row, of random values."""
  rng = np.random.default_rng(0)
  batch = budget.empty(rows)
  s, bank = batch.stream, batch.bank['image']
  n = s.tokens.shape[1]
  s.tokens[:] = rng.integers(1, 100, s.tokens.shape)
  s.segment_ids[:] = s.weights[:] = 1
  s.order[:] = s.last[:] = np.arange(n)
  s.positions[:] = np.arange(n)[:, None]
  bank.values[:] = rng.integers(0, 255, bank.values.shape)
  bank.items[:] = bank.item_segments[:, :1] = 1
  return batch


@pytest.mark.slow
@pytest.mark.parametrize('name', KINDS)
def test_runs_where_cpu_devices_stand_in(name):
  """The program of a plan, small, for GPUs' mesh: it runs, and has gradients."""
  config = load(f'{name}:tiny')
  config.data.rows = 8
  config.sharding.update(preset='fsdp', mesh=NODES, max_replicated=1.0)
  parts, lowered = lower(config, jax.devices())
  assert parts.mesh.shape['slice'] == 2
  rng = np.random.default_rng(1)

  def put(values):
    return lambda x: jax.device_put(values(x.shape).astype(x.dtype), x.sharding)

  state = jax.tree.map(put(np.zeros), parts.abstract)
  small = put(lambda shape: rng.normal(0, 0.02, shape))
  state = dataclasses.replace(state, params=jax.tree.map(small, parts.abstract.params))
  with sharding.use(parts.mesh, parts.rules):
    batch = sharding.place_batch(full(parts.budget, 8), 8, parts.mesh, parts.rules)
    state, metrics = lowered.compile()(state, batch)
  metrics = jax.device_get(metrics)
  assert state.step == 1 and metrics['skipped'] == 0 and metrics['weight'] > 0
  assert np.isfinite(metrics['loss']) and metrics['grad_norm'] > 0
