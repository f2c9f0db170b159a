import importlib.util
import os

import pytest

from mmjax.plan import topology
from mmjax.plan.chips import CHIPS


@pytest.mark.parametrize(
  'name, shape, devices',
  [
    ('v5e:16x16', (16, 16), 256),
    ('v5e-256', (16, 16), 256),
    ('v5litepod-8', (2, 4), 8),
    ('v6e-64', (8, 8), 64),
    ('v5p-128', (4, 4, 4), 64),
    ('v5p-8', (2, 2, 1), 4),
    ('v5p:16x16x24', (16, 16, 24), 6144),
    ('v4-32', (2, 2, 4), 16),
    ('v4-1024', (8, 8, 8), 512),
    ('tpu7x:2x2x1', (2, 2, 1), 8),
    ('v7x-128', (4, 4, 4), 128),
  ],
)
def test_names(name, shape, devices):
  found = topology.parse(name)
  assert found.shape == shape
  assert found.num_devices == devices
  assert topology.parse(found.name) == found
  assert topology.parse(name, slices=3).num_devices == 3 * devices


@pytest.mark.parametrize(
  'name, message',
  [
    ('v5e', 'is not like'),
    ('v5f:2x2', "unknown chip 'v5f'.*v5e"),
    ('v5e:32x32', 'no slice of shape.*nearest: 16x16'),  # aborts the process in libtpu
    ('v5e:8x4', "did you mean '4x8'"),
    ('v5e:2x2x1', 'v5e has no slice'),
    ('v5p:4x4', 'v5p has no slice'),
    ('v5p-100', 'nearest:.*v5p-128 = 4x4x4'),
    ('v4:16x16x24', 'v4 has no slice'),  # more chips than there are in a pod
  ],
)
def test_what_does_not_exist_is_refused(name, message):
  with pytest.raises(ValueError, match=message):
    topology.parse(name)


def test_slices_are_counted():
  with pytest.raises(ValueError, match='at least 1'):
    topology.parse('v5e:2x2', slices=0)


def test_without_libtpu_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r"pip install 'mmjax\[plan\]'"):
    topology.devices(topology.parse('v5e:2x2'))


@pytest.mark.parametrize('name', ['v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'])
def test_devices_of_each_chip(tpu, name):
  _, mesh = tpu(name, fsdp=4)
  assert mesh.size == 4
  assert os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] == '1'


def test_devices_of_two_slices_and_of_two_cores(tpu):
  _, mesh = tpu('v5e:2x2', slices=2, slice=2, fsdp=4)
  slices = [d.slice_index for d in mesh.devices.flat]
  assert slices == [0] * 4 + [1] * 4
  _, mesh = tpu('tpu7x:2x2x1', fsdp=8)
  assert mesh.size == 8


def test_what_libtpu_refuses_is_one_line(tpu):
  wrong = topology.Topology(CHIPS['v5e'], (3, 3))
  with pytest.raises(ValueError, match=r"libtpu refuses topology 'v5e:3x3': [^\n]+$"):
    topology.devices(wrong)


def test_a_device_count_that_is_wrong_is_refused(tpu, monkeypatch):
  monkeypatch.setattr(topology.Topology, 'num_devices', 5)
  with pytest.raises(ValueError, match='has 4 devices, not 5'):
    topology.devices(topology.parse('v5e:2x2'))


def test_rates_are_those_of_a_device():
  for chip in CHIPS.values():
    # A device can multiply many numbers for each one that it reads.
    assert 100 < chip.peak / chip.hbm_rate < 700, chip.name
    assert chip.link < chip.hbm_rate / 10 and chip.dcn < chip.link, chip.name
  assert CHIPS['tpu7x'].peak * 2 == 2307e12
