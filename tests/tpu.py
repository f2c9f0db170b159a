"""Devices of a TPU that isn't there, to compile for."""

import contextlib
import importlib.util

import jax
import pytest

from mmjax.plan import topology

NEEDED = pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='no libtpu')


def devices(name='v5e:2x2'):
  """The devices of a topology."""
  return topology.devices(topology.parse(name))


@contextlib.contextmanager
def optimised():
  """Inside, programs are compiled as users do, see conftest."""
  old = jax.config.values['jax_disable_most_optimizations']
  jax.config.update('jax_disable_most_optimizations', False)
  try:
    yield
  finally:
    jax.config.update('jax_disable_most_optimizations', old)
