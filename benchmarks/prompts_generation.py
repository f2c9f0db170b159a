"""What both sides of the benchmark of generation continue: pictures, then words.

In a module of its own, as mmjax' contestant has no need of PyTorch.
"""

import numpy as np

SIDE, PATCH, VOCAB = 96, 16, 32_000
IMAGES, WORDS = 2, 32
SLOTS = {'flamingo': 1, 'unified': (SIDE // PATCH) ** 2}  # of an image in the stream


def prompts(rows):
  """(words i64[rows, WORDS], pixels f32[rows, IMAGES, SIDE, SIDE, 3], normalised)."""
  rng = np.random.default_rng(0)
  words = rng.integers(3, VOCAB - 10, (rows, WORDS))
  return words, rng.normal(size=(rows, IMAGES, SIDE, SIDE, 3)).astype('f')


def patches(pixels):
  """f[B, I, SIDE, SIDE, 3] -> f[B, I, (SIDE / PATCH)^2, PATCH * PATCH * 3]."""
  B, I, side = pixels.shape[:3]
  n = side // PATCH
  cut = pixels.reshape(B, I, n, PATCH, n, PATCH, 3).transpose(0, 1, 2, 4, 3, 5, 6)
  return cut.reshape(B, I, n * n, -1)
