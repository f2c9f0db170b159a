"""The pod configs against their budgets, compiled for TPUs that aren't here.

All of them take the better part of an hour on one core: `pytest -m pods tests/plan`.
"""

import json

import pytest
from pods import FILE, PODS, budget, chips, load, off

GOLDEN = json.loads(FILE.read_text())
TINY = 'unified_8b:tiny@v5e:2x2'
QUICK = {TINY}


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
