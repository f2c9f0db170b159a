"""Compiling for TPUs that aren't there: needs libtpu (`pip install 'mmjax[plan]'`)."""

import importlib.util

import jax
import numpy as np
import pytest
from tpu import optimised

from mmjax.plan import topology


@pytest.fixture
def tpu():
  """Makes a mesh of a topology: `tpu('v5e:2x2', data=2, fsdp=2)` -> (chip, mesh).

  Tests without it need no libtpu; with it they are skipped where it isn't installed.
  """
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('no libtpu: compiling for TPUs and reading that out is not tested')

  def make(name, slices=1, **axes):
    found = topology.parse(name, slices)
    devices = np.array(topology.devices(found)).reshape(tuple(axes.values()))
    return found.chip, jax.sharding.Mesh(devices, tuple(axes))

  # The other tests' switch for quick compiles would change what is read here.
  with optimised():
    yield make
