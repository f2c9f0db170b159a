"""From test documents to prompts: each question alone after its images.

From a document of several turns, every trained text (an answer) becomes a prompt
of its own, so no gold answer of another turn is ever in sight:

  document   <image> question 1, answer 1, question 2, answer 2
  prompts    <image> question 1       and       <image> question 2

In a dialogue (its template's words are `special`) a question has all that stands before
it, earlier turns too. Support documents with their answers may stand before all; see
`data.fewshot`.

Each comes three times: with its own images, with the images of another document
(never its own), and with mid-grey images of the same sizes. Equal prompts are
kept once, and all prompts that show the same images share one copy of them.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmjax.data import media
from mmjax.data.document import BadDocument, Document, Image, Text, Video, kind_of
from mmjax.data.example import Example

_GREY = 128


@dataclasses.dataclass(frozen=True)
class Question:
  """One question of a document: which of its media come before it, text and answer.

  frame: the prompt's spans, None where the next of these media stands.
  """

  media: tuple[int, ...]
  text: str
  answer: str
  turn: int
  type: str
  frame: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Asked:
  """A question as it is asked: what its record says, and its three prompts.

  record: index, document, turn, type, question, answer, shuffled_from.
  own, shuffled, blank: places of its prompts in the pool.
  """

  record: dict[str, Any]
  own: int
  shuffled: int
  blank: int


def questions(document: Document, end: str = '') -> list[Question]:
  """All questions of a document, one for each trained text.

  The question is the untrained text right before the answer; an answer without
  one (a caption) is asked with its media alone: those of the trunk, and of its branch.
  A dialogue's is what was said last before it.

  Args:
    document: the document.
    end: the end token's name, which closes earlier answers of a dialogue.
  """
  types = document.meta.get('types', ())
  found, seen = [], []
  for i, span in enumerate(document.spans):
    if not isinstance(span, Text):
      seen.append(span.branch)
    elif span.trained:
      before = document.spans[i - 1] if i else None
      asked = isinstance(before, Text) and not before.trained
      asked = asked and before.branch in (0, span.branch)
      turn = len(found)
      kind = types[turn] if turn < len(types) else ''
      text = before.text if asked else ''
      shown = tuple(i for i, b in enumerate(seen) if b in (0, span.branch))
      frame = (*[None] * len(shown), Text(text))
      visible = [s for s in document.spans[:i] if s.branch in (0, span.branch)]
      if any(isinstance(s, Text) and s.special for s in visible):
        frame = _dialogue(visible, end)
        said = [s.text for s in visible if isinstance(s, Text) and not s.special]
        text = said[-1] if said else ''
      found.append(Question(shown, text, span.text.strip(), turn, kind, frame))
  return found


def _dialogue(visible: Sequence[Any], end: str) -> tuple[Any, ...]:
  """All that stands before an answer, as untrained text of the trunk."""
  frame: list[Any] = []
  for span in visible:
    if not isinstance(span, Text):
      frame.append(None)
    elif span.trained:
      # An empty text keeps it from being read with what stands before.
      frame += [Text(''), Text(span.text), Text(end, special=True)]
    else:
      frame.append(dataclasses.replace(span, branch=0))
  return tuple(frame)


def derange(groups: Sequence[Any], seed: int = 0) -> list[int | None]:
  """A partner for each entry: another one of the same group, each used once.

  One random cycle through each group, so nobody is their own partner; None for
  an entry that is alone in its group.
  """
  members = collections.defaultdict(list)
  for i, group in enumerate(groups):
    members[group].append(i)
  partner: list[int | None] = [None] * len(groups)
  for ids in members.values():
    if len(ids) > 1:
      cycle = np.random.default_rng(seed).permutation(ids).tolist()
      for i, j in zip(cycle, cycle[1:] + cycle[:1]):
        partner[i] = j
  return partner


def spread(count: int, limit: int | None) -> list[int]:
  """`limit` indices out of `count`, evenly apart; all of them for None."""
  if limit is None or limit >= count:
    return list(range(count))
  return [i * count // limit for i in range(limit)]


def collect(
  dataset: Any,
  to_example: Callable[[Document], Example],
  before: Callable[[int], tuple[Any, ...]] | None = None,
  end: str = '',
) -> tuple[list[Asked], list[Example], collections.Counter]:
  """All questions of a dataset, and the prompts to answer.

  A document that is the only one with its kinds of media is "shuffled" with blank
  ones; one without media is asked the same thing three times.

  Args:
    dataset: `[i] -> Document`, `len`.
    to_example: of a document with something trained.
    before: of a document's index, the spans before its questions, supports say; the
      same before the three prompts of a question.
    end: see `questions`.

  Returns:
    (questions in the order of the data, pool of prompts, documents left out by
    reason).
  """
  pool, bad = _Pool(to_example), collections.Counter()
  good = []  # (index, document, its questions, own prompts, blank prompts)
  for index in range(len(dataset)):
    try:
      document = dataset[index]
      found = questions(document, end)
      if before is not None:
        front = before(index)
        found = [dataclasses.replace(q, frame=(*front, *q.frame)) for q in found]
      pixels = [_decoded(s) for s in _media(document.spans)]
      own, blank = [], []
      for q in found:
        shown = [pixels[place] for place in q.media]
        places = tuple((index, place) for place in q.media)
        own.append(pool.add(places, lambda shown=shown: shown, q.frame))
        sizes = tuple((kind_of(s), *media.native_size(s)) for s in shown)
        grey = [_blank(s) for s in shown]
        blank.append(
          pool.add(sizes, lambda grey=grey: grey, q.frame) if shown else own[-1]
        )
      good.append((index, document, found, own, blank))
    except BadDocument as error:
      bad[error.reason] += 1

  asked = []
  groups = [frozenset(map(kind_of, _media(d.spans))) for _, d, *_ in good]
  for (index, document, found, own, blank), at in zip(good, derange(groups)):
    other = good[at][0] if at is not None else None
    donated = _media(good[at][1].spans) if at is not None else []
    for q, own_prompt, blank_prompt in zip(found, own, blank):
      shuffled = blank_prompt
      if donated and q.media:
        chosen = _swapped([_media(document.spans)[i] for i in q.media], donated)
        places = tuple((other, place) for place in chosen)
        shuffled = pool.add(
          places, lambda d=donated, c=chosen: [_decoded(d[i]) for i in c], q.frame
        )
      record = dict(index=index, document=document.id or str(index), turn=q.turn)
      record.update(type=q.type, question=q.text.strip(), answer=q.answer)
      record['shuffled_from'] = other if donated and q.media else None
      asked.append(Asked(record, own_prompt, shuffled, blank_prompt))
  return asked, pool.prompts, bad


class _Pool:
  """Prompts without doubles. Media are patchified once for each key."""

  def __init__(self, to_example):
    self.prompts: list[Example] = []
    self._to_example = to_example
    self._known: dict[Any, int] = {}  # (key, frame) -> place of the prompt
    self._media: dict[Any, tuple] = {}  # (key, frame's head) -> (media arrays, layout)
    self._layouts: dict[Any, Example] = {}  # (layout, frame) -> a prompt of that shape

  def add(
    self, key: Any, media_of: Callable[[], Sequence], frame: tuple[Any, ...]
  ) -> int:
    """The place of a prompt; `key` names its media, made only when new.

    Raises:
      BadDocument: see `to_example`.
    """
    if (key, frame) not in self._known:
      self.prompts.append(self._example(key, media_of, frame))
      self._known[key, frame] = len(self.prompts) - 1
    return self._known[key, frame]

  def _example(self, key, media_of, frame) -> Example:
    # What stands up to the last item says where the items are, what comes after not.
    items = [i for i, span in enumerate(frame) if not isinstance(span, Text)]
    head = key, frame[: items[-1] + 1 if items else 0]
    # Prompts of one frame around media of one layout differ in their pixels alone.
    if head in self._media:
      arrays, layout = self._media[head]
      if (layout, frame) in self._layouts:
        return dataclasses.replace(self._layouts[layout, frame], media=arrays)
    media = iter(media_of())
    spans = [next(media) if span is None else span for span in frame]
    # The prompt ends where the answer would begin: an answer of no words, without
    # its end token.
    whole = self._to_example(Document((*spans, Text('', trained=True))))
    fields = [f.name for f in dataclasses.fields(whole) if f.name != 'media']
    prompt = Example(**{f: getattr(whole, f)[:-1] for f in fields}, media=whole.media)
    grids = tuple((k, m.positions.tobytes()) for k, m in sorted(prompt.media.items()))
    layout = (tuple(map(kind_of, spans)), grids)
    arrays, _ = self._media.setdefault(head, (prompt.media, layout))
    self._layouts.setdefault((layout, frame), prompt)
    return dataclasses.replace(prompt, media=arrays)


def _media(spans) -> list:
  return [s for s in spans if not isinstance(s, Text)]


def _decoded(span):
  """The span on the trunk, an image as pixels."""
  if isinstance(span, Image):
    return Image(media.pixels(span))
  return dataclasses.replace(span, branch=0)


def _swapped(own: Sequence, donated: Sequence) -> list[int]:
  """For each own item the place of a donated one of its kind, around again if short."""
  places = collections.defaultdict(list)
  for place, span in enumerate(donated):
    places[kind_of(span)].append(place)
  used: collections.Counter = collections.Counter()
  out = []
  for span in own:
    kind = kind_of(span)
    out.append(places[kind][used[kind] % len(places[kind])])
    used[kind] += 1
  return out


def _blank(span):
  if isinstance(span, Image):
    return Image(np.full_like(span.content, _GREY))
  if isinstance(span, Video):
    return dataclasses.replace(span, frames=np.full_like(span.frames, _GREY))
  return dataclasses.replace(span, wave=np.zeros_like(span.wave))  # silence
