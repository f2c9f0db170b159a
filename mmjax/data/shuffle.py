"""Shuffles that are evaluated only where they are asked: no list, no state.

`permute` is a Feistel network over a rectangle that is a little larger than the
numbers; who lands outside of them goes on walking (Black and Rogaway 2002,
"Ciphers with arbitrary finite domains"):

  x = left + width * right
  left  += hash(right)  mod width
  right += hash(left)   mod height       a few times: each can be undone
"""

import numpy as np

_ROUNDS = 4


def hashed(x, *salts) -> np.ndarray:
  """Pseudo-random u64 of integers (splitmix64, Steele et al. 2014)."""
  with np.errstate(over='ignore'):
    z = np.uint64(0)
    for part in (*salts, x):
      z = z ^ np.asarray(part).astype(np.uint64)
      z = z + np.uint64(0x9E3779B97F4A7C15)
      z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
      z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
      z = z ^ (z >> np.uint64(31))
  return z


def permute(x: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
  """Where x goes in the shuffle number `key` of 0..size-1.

  Args:
    x: i64[n], 0 <= x < size.
    size: i64[n].
    key: u64[n]; equal sizes and keys are one shuffle.

  Returns:
    i64[n]; one to one for each (size, key).
  """
  x, size = np.asarray(x, np.int64), np.asarray(size, np.int64)
  out, key = np.empty_like(x), np.asarray(key, np.uint64)
  width = np.sqrt(size.astype(np.float64)).astype(np.int64) + 1
  height = -(-size // width)
  width, height = width.astype(np.uint64), height.astype(np.uint64)
  todo, now = np.arange(len(x)), x.astype(np.uint64)
  while len(todo):
    w, h, k = width[todo], height[todo], key[todo]
    right, left = np.divmod(now, w)
    for i in range(_ROUNDS):
      left = (left + hashed(right, k + np.uint64(2 * i)) % w) % w
      right = (right + hashed(left, k + np.uint64(2 * i + 1)) % h) % h
    now = left + w * right
    inside = now < size[todo].astype(np.uint64)
    out[todo[inside]] = now[inside]
    todo, now = todo[~inside], now[~inside]
  return out
