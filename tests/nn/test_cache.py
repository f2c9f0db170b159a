import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import sharding
from mmjax.nn.cache import KV, empty_cache, join, write


@pytest.mark.parametrize(
  'platform, dtype', [('tpu', 'bfloat16'), ('cpu', 'float32'), ('gpu', 'bfloat16')]
)
def test_empty_cache_is_padding(monkeypatch, platform, dtype):
  monkeypatch.setattr(sharding, 'device', lambda: (platform, ''))
  cache = empty_cache(2, 5, 3, 2, 4, 'bfloat16', stacked=True)
  assert cache.layers.key.shape == (3, 2, 2, 5, 4)
  assert cache.layers.value.dtype == dtype
  assert not np.any(cache.tags.segment_ids)
  layers = empty_cache(2, 5, 3, 2, 4, 'float32', stacked=False).layers
  assert len(layers) == 3 and layers[0].key.shape == (2, 2, 5, 4)


def test_write_touches_only_its_slots():
  old = KV(jnp.zeros((2, 1, 5, 1)), jnp.zeros((2, 1, 5)))
  new = KV(jnp.ones((2, 1, 2, 1)), 2 * jnp.ones((2, 1, 2)))
  got = write(old, new, 3, 2)
  np.testing.assert_array_equal(got.key[:, 0, :, 0], [[0, 0, 0, 1, 1]] * 2)
  np.testing.assert_array_equal(got.value[:, 0], [[0, 0, 0, 2, 2]] * 2)


def test_heads_first_and_back():
  key, value = jnp.arange(48.0).reshape(2, 2, 3, 2, 2)
  kv = KV.of(key, value)
  np.testing.assert_array_equal(kv.key[1, 0, 2], key[1, 2, 0])
  for got, want in zip(kv.slots_first(), (key, value)):
    np.testing.assert_array_equal(got, want)
  both = join(kv, KV.of(-key, -value), 2)
  np.testing.assert_array_equal(both.key[:, :, 3:], -kv.key)
