"""Devices of a TPU that isn't there, to compile for."""

import contextlib
import importlib.util
import os

import jax
import pytest

NEEDED = pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='no libtpu')


def devices(name='v5e:2x2'):
  """The devices of a topology; libtpu asks nobody for its surroundings."""
  for key, value in (
    ('TPU_SKIP_MDS_QUERY', '1'),
    ('TPU_WORKER_HOSTNAMES', 'localhost'),
    ('TPU_ACCELERATOR_TYPE', 'v5litepod-4'),
    ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),
    ('TPU_LOG_DIR', 'disabled'),
  ):
    os.environ.setdefault(key, value)
  from jax.experimental import topologies

  return topologies.get_topology_desc(platform='tpu', topology_name=name).devices


@contextlib.contextmanager
def optimised():
  """Inside, programs are compiled as users do, see conftest."""
  old = jax.config.values['jax_disable_most_optimizations']
  jax.config.update('jax_disable_most_optimizations', False)
  try:
    yield
  finally:
    jax.config.update('jax_disable_most_optimizations', old)
