"""Strict settings for every test: 8 CPU devices, no silent promotion, no warnings."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['TPU_SKIP_MDS_QUERY'] = '1'
# What one run compiled is no help to a test, and home is no place for it.
os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'
# Programs run for milliseconds here; to optimise them takes seconds.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

import hypothesis
import jax

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')

# How long an example takes says nothing of what it asks.
hypothesis.settings.register_profile('no deadline', deadline=None)
hypothesis.settings.load_profile('no deadline')
