"""The only run-time shape checker: letters in, sizes out.

  check('B T D', x, 'B S D', media)   ->  {'B': 8, 'T': 1024, 'D': 512, 'S': 64}

The same letter must have the same size everywhere in one call; a number stands
for itself. The letters are those of the glossary in the README (B rows, T
queries, S keys, D width, ...). It runs while tracing, so it costs nothing in
the compiled program.
"""


def check(*pairs) -> dict[str, int]:
  """Checks arrays against letters, e.g. `check('B T 3', positions, 'B T', tokens)`.

  Args:
    *pairs: alternately a string of axis letters and an array (anything with a
      `.shape`).

  Returns:
    The size of each letter.

  Raises:
    ValueError: a wrong number of axes, or one letter with two sizes.
  """
  sizes: dict[str, int] = {}
  for letters, array in zip(pairs[::2], pairs[1::2], strict=True):
    axes = letters.split()
    shape = tuple(array.shape)
    if len(axes) != len(shape):
      raise ValueError(f"expected axes '{letters}', got shape {shape}")
    for axis, size in zip(axes, shape):
      want = int(axis) if axis.isdigit() else sizes.setdefault(axis, size)
      if want != size:
        raise ValueError(
          f"axis {axis} is {want} and {size} (in '{letters}', shape {shape})"
        )
  return sizes
