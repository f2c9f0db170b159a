"""Augmentation: what may change from epoch to epoch without changing what is true.

  image  Q1 A1  Q2 A2  Q3 A3      ->   image (mirrored)  Q3 A3  Q1 A1  Q2 A2

Each is a frozen dataclass with one `map`, a pure function of the document and a
generator seeded with (seed, document, epoch); so a resumed run sees the same.
None changes how many slots, targets or patches a document needs: the pack plan
is made from lengths alone.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence

import numpy as np

from mmjax.data import media
from mmjax.data.document import Document, Image, Text

_SIDES = re.compile(r'\b(left|right)(\b|-|most|hand|ward)', re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class ShuffleTurns:
  """Asks the questions of a document in another order.

  A turn is prompts (untrained text) and the answers (trained) that follow. Turns
  change places among those of the same stretch between media. Without it, the
  first question after an image is always the same, and the only one that can't
  lean on what earlier turns gave away. For sets of questions, not for dialogues.
  """

  def map(self, document: Document, rng: np.random.Generator) -> Document:
    spans, turns = [], []

    def flush():
      spans.extend(span for i in rng.permutation(len(turns)) for span in turns[i])
      turns.clear()

    for span in document.spans:
      if not isinstance(span, Text):
        flush()
        spans.append(span)
      elif span.trained and not turns:
        spans.append(span)  # an answer without a prompt stays where it is
      elif span.trained or (turns and not turns[-1][-1].trained):
        turns[-1].append(span)
      else:
        turns.append([span])
    if turns and not turns[-1][-1].trained:
      last = turns.pop()  # a prompt without an answer stays at the end
      flush()
      spans.extend(last)
    flush()
    # `meta['types']` follows the old order of the answers.
    meta = {k: v for k, v in document.meta.items() if k != 'types'}
    return Document(tuple(spans), document.id, meta)


@dataclasses.dataclass(frozen=True)
class Mirror:
  """Mirrors all images of every other document, left to right.

  Never where a text of the document speaks of left or right.
  """

  def map(self, document: Document, rng: np.random.Generator) -> Document:
    texts = [span.text for span in document.spans if isinstance(span, Text)]
    if rng.random() < 0.5 or any(map(_SIDES.search, texts)):
      return document
    spans = tuple(
      Image(media.pixels(span)[:, ::-1]) if isinstance(span, Image) else span
      for span in document.spans
    )
    return dataclasses.replace(document, spans=spans)


AUGMENTATIONS = {'shuffle_turns': ShuffleTurns, 'mirror': Mirror}


def build(names: Sequence[str]) -> tuple[ShuffleTurns | Mirror, ...]:
  """The augmentations of these names.

  Raises:
    ValueError: an unknown name.
  """
  for name in names:
    if name not in AUGMENTATIONS:
      near = difflib.get_close_matches(str(name), AUGMENTATIONS, n=1)
      hint = f'; did you mean {near[0]!r}?' if near else ''
      raise ValueError(
        f'unknown augmentation {name!r}{hint} (choices: {", ".join(AUGMENTATIONS)})'
      )
  return tuple(AUGMENTATIONS[name]() for name in names)


def apply(augmentations, document: Document, *seed: int) -> Document:
  """Maps a document through all of them; `seed` is any number of integers >= 0."""
  if augmentations:
    rng = np.random.default_rng(seed)
    for augmentation in augmentations:
      document = augmentation.map(document, rng)
  return document
