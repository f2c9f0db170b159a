"""Names that pick something from a table, and what to say when one isn't there.

  unknown model 'unifed'; did you mean 'unified'? (choices: flamingo, unified)

Leftmost in the import law and without imports of its own, so that every room can
end its errors with the same words.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar('T')


def closest(word: object, choices: Iterable[object]) -> str:
  """The end of an error's line: the closest right name, if one is near, and all."""
  choices = sorted(map(str, choices))
  near = difflib.get_close_matches(str(word), choices, n=1)
  hint = f'; did you mean {near[0]!r}?' if near else ''
  return f'{hint} (choices: {", ".join(choices)})'


def pick(what: str, name: object, table: Mapping[str, T]) -> T:
  """The entry of that name; `what` the table is of stands in the error.

  Raises:
    ValueError: there is none; says which is near and lists those there are.
  """
  if name not in table:
    raise ValueError(f'unknown {what} {name!r}{closest(name, table)}')
  return table[name]
