"""Spans out of what records hold: captions, questions, dialogues, texts between images.

branches([image], [('', 'a cat'), ('', 'Tom')])   two captions that don't see each other
dialogue([{'from': 'human', 'value': '<image>\\nWho is it?'},
          {'from': 'gpt', 'value': 'Tom'}], [image])
                   image, '\\nWho is it?', ' Tom' (trained)
interleaved(['A cat.', image, 'It', 'sleeps.'])   'A cat.', image, 'It\\nsleeps.'
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mmjax.data.document import BadDocument, Image, Span, Text

MARK = '<image>'
_ROLES = {
  'human': 'user',
  'user': 'user',
  'gpt': 'assistant',
  'assistant': 'assistant',
  'model': 'assistant',
  'chatgpt': 'assistant',
  'bot': 'assistant',
  'system': 'system',
}
_OTHER_MARKS = re.compile('<(video|audio)>')


def branches(media: Sequence[Span], pairs: Sequence[tuple[str, str]]) -> list[Span]:
  """Media, then (prompt, trained text) pairs, a branch each if there are several.

  A caption has the prompt ''. After a prompt stands a space.
  """
  spans = list(media)
  for i, (prompt, text) in enumerate(pairs):
    branch = i + 1 if media and len(pairs) > 1 else 0
    if prompt:
      spans += [Text(prompt, False, branch), Text(f' {text}', True, branch)]
    else:
      spans.append(Text(text, True, branch))
  return spans


def dialogue(
  turns: Sequence[Any], images: Sequence[Any], load: Callable[[Any], bytes]
) -> tuple[list[Span], list[str]]:
  """A dialogue as spans, what the assistant says trained, and the role of each span.

  Args:
    turns: each {'from', 'value'}, {'role', 'content'} or {'user', 'assistant'}. A text
      shows an image by `<image>`; a content in parts, [{'type': 'image'}, {'type':
      'text', 'text': ...}], by a part, which may name its own. Turns of {'user',
      'assistant'} have no marks: their images come first.
    images: what stands for the images, in order.
    load: of one of those, the file's bytes; called only if the marks are right.

  Returns:
    (spans, roles: 'system', 'user' or 'assistant').

  Raises:
    BadDocument: 'image_marks' (more or fewer than images), 'unknown_role', 'bad_turn',
      'empty_text' (an answer that is), 'unsupported_video', 'unsupported_audio'; what
      `load` raises.
  """
  parts = _Parts(list(images))
  if turns and all(isinstance(t, Mapping) and 'user' in t for t in turns):
    for _ in images:
      parts.image('user')
    turns = [
      {'role': role, 'content': turn.get(role)}
      for turn in turns
      for role in ('user', 'assistant')
    ]
  for turn in turns:
    role, content = _turn(turn)
    before = len(parts.found)
    if isinstance(content, str):
      for i, text in enumerate(content.split(MARK)):
        if i:
          parts.image(role)
        parts.text(role, text)
    else:
      for part in content:
        parts.part(role, part)
    said = ''.join(v for _, kind, v in parts.found[before:] if kind == 'text')
    if role == 'assistant' and not said.strip():
      raise BadDocument('empty_text', 'an answer without text')
  parts.check()
  spans = []
  for role, kind, value in parts.found:
    if kind == 'image':
      spans.append(Image(load(value)))
      continue
    last = spans[-1] if spans else None
    trained = role == 'assistant'
    after_prompt = isinstance(last, Text) and not last.trained
    if trained and after_prompt and not value[0].isspace():
      value = f' {value}'
    spans.append(Text(value, trained))
  return spans, [role for role, _, _ in parts.found]


def _turn(turn: Any) -> tuple[str, Any]:
  if not isinstance(turn, Mapping):
    raise BadDocument('bad_turn', f'{str(turn)[:60]!a} is no turn')
  name = turn.get('from', turn.get('role'))
  if name not in _ROLES:
    raise BadDocument('unknown_role', f'{name!a}; known: {", ".join(_ROLES)}')
  content = turn.get('value', turn.get('content'))
  if not isinstance(content, (str, list)):
    raise BadDocument('bad_turn', f'a turn of {name} has no text')
  return _ROLES[name], content


class _Parts:
  """(role, 'text' or 'image', value) one after the other; images are taken in turn."""

  def __init__(self, images):
    self.found = []
    self._images = images
    self._shown = 0  # of the images that have no name of their own
    self._marks = 0

  def text(self, role, text):
    if other := _OTHER_MARKS.search(text):
      raise BadDocument(f'unsupported_{other[1]}', f'a mark {other[0]}')
    if text:
      self.found.append((role, 'text', text))

  def image(self, role, index=None):
    place = self._marks if index is None else index
    self._marks += 1
    if place < len(self._images):
      self.found.append((role, 'image', self._images[place]))
      self._shown += 1

  def part(self, role, part):
    kind = part.get('type') if isinstance(part, Mapping) else None
    if kind == 'text' and isinstance(part.get('text'), str):
      self.text(role, part['text'])
    elif kind == 'image_url' and isinstance(part.get('image_url'), Mapping):
      self.found.append((role, 'image', part['image_url'].get('url')))
    elif kind == 'image':
      named = next((part[k] for k in ('image', 'path', 'url') if part.get(k)), None)
      if named is not None:
        self.found.append((role, 'image', named))
      else:
        index = part.get('index')
        self.image(role, index if type(index) is int and index >= 0 else None)
    elif kind in ('video', 'audio'):
      raise BadDocument(f'unsupported_{kind}', f'a part of type {kind}')
    else:
      raise BadDocument('bad_turn', f'{str(part)[:60]!a} is no text and no image')

  def check(self):
    if self._marks != len(self._images) or self._shown != self._marks:
      raise BadDocument(
        'image_marks', f'{self._marks} marks for {len(self._images)} images'
      )


def interleaved(parts: Iterable[str | Image], join: str = '\n') -> list[Span]:
  """Texts, all trained, and images in order; texts without an image between are one."""
  spans, lines = [], []
  for part in [*parts, None]:
    if isinstance(part, str):
      if part.strip():
        lines.append(part.strip())
      continue
    if lines:
      spans.append(Text(join.join(lines), True))
      lines = []
    if part is not None:
      spans.append(part)
  return spans
