import jax.numpy as jnp
import numpy as np

from mmjax.nn.cache import KV, empty_cache, write


def test_empty_cache_is_padding():
  cache = empty_cache(2, 5, 3, 2, 4, 'bfloat16', stacked=True)
  assert cache.layers.key.shape == (3, 2, 5, 2, 4)
  assert cache.layers.value.dtype == jnp.bfloat16
  assert not np.any(cache.tags.segment_ids)
  layers = empty_cache(2, 5, 3, 2, 4, 'float32', stacked=False).layers
  assert len(layers) == 3 and layers[0].key.shape == (2, 5, 2, 4)


def test_write_touches_only_its_slots():
  old = KV(jnp.zeros((2, 5, 1, 1)), jnp.zeros((2, 5)))
  new = KV(jnp.ones((2, 2, 1, 1)), 2 * jnp.ones((2, 2)))
  got = write(old, new, 3)
  np.testing.assert_array_equal(got.key[..., 0, 0], [[0, 0, 0, 1, 1]] * 2)
  np.testing.assert_array_equal(got.value, [[0, 0, 0, 2, 2]] * 2)
