"""Three tiny steps compute and move what they did; see golden.py.

A change that makes a step dearer is seen here on any machine, however slow or busy.
"""

import json

import pytest
from golden import FILE, MODELS, chip, cpu, line, load, off, products

GOLDEN = json.loads(FILE.read_text())
_FIRST = 'unified'


def of_line(name, where):
  """What was read with this version of JAX; another compiler makes other programs."""
  if line() not in GOLDEN[name][where]:
    pytest.skip(f'no {where} of JAX {line()} in {FILE.name}')
  return GOLDEN[name][where][line()]


def also(mark):
  """All cases, those after the first one with a mark."""
  return [n if n == _FIRST else pytest.param(n, marks=mark) for n in MODELS]


@pytest.mark.parametrize('name', MODELS)
def test_products(name):
  assert (
    off({'products': products(load(name))}, {'products': GOLDEN[name]['products']}) == {}
  )


@pytest.mark.parametrize('name', also(pytest.mark.slow))
def test_compiled_for_a_cpu(name):
  assert off(cpu(load(name)), of_line(name, 'cpu')) == {}


@pytest.mark.slow
@pytest.mark.usefixtures('tpu')
@pytest.mark.parametrize('name', also(pytest.mark.long))
def test_compiled_for_chips(name):
  assert off(chip(load(name, chip=True)), of_line(name, 'v5e')) == {}


@pytest.mark.parametrize('name', ['unified', 'flamingo'])
def test_a_loss_on_all_slots_is_found(name):
  now = products(load(name, **{'data.budget.targets': 256}))
  assert off({'products': now}, {'products': GOLDEN[name]['products']})


@pytest.mark.slow
@pytest.mark.usefixtures('tpu')
def test_float32_in_place_of_bfloat16_is_found():
  now = chip(load('unified', chip=True, **{'model.dtype': 'float32'}))
  assert {'bytes', 'hbm'} & off(now, of_line('unified', 'v5e')).keys()
