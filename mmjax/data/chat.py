"""Dialogues: turns of roles become a document, by the template a model was trained on.

  Turn('user', ('what is it?', Image(png)))
  Turn('assistant', 'a cat')

  chatml   <|im_start|>user_what is it?[image]<|im_end|>_
           <|im_start|>assistant_a cat<|im_end|>_
                                 ---------------  trained

Trained is what the assistant says and the token that ends its turn: the tokenizer's
end token, where generation stops. All else is not, and of all else a template's own
words alone are `special`: a user who writes '<|im_end|>' has written ten letters.

The ids are those of the whole written as one string, but for an answer that begins with
white space: an answer is tokenised apart, as it will be generated.

Templates are data, in TEMPLATES by the name under which their models are known.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from mmjax.data.delimiters import mark, need
from mmjax.data.document import Audio, BadDocument, Document, Image, Span, Text, Video
from mmjax.names import pick

ROLES = ('system', 'user', 'assistant')
# What other formats call them.
_ALIASES = {'human': 'user', 'gpt': 'assistant', 'model': 'assistant'}


@dataclasses.dataclass(frozen=True)
class Turn:
  """What one role says.

  role: 'system', 'user' or 'assistant' ('human', 'gpt' and 'model' are understood).
  parts: strings and media in their order; or one string.
  trained: of an assistant's turn, whether the loss counts it.
  """

  role: str
  parts: tuple[str | Image | Audio | Video, ...] | str
  trained: bool = True


@dataclasses.dataclass(frozen=True)
class Template:
  """How turns are written.

  system, user, assistant: what stands before and after the turn; None: there is no
    such turn. The assistant's `after` comes behind the end token.
  end: the end token, which the tokenizer must have as its own.
  begin: what stands before all.
  default: the system's turn where none is given.
  answer: how an answer is written.
  inside: the system's turn stands inside the first user's.
  strip: white space around what is said is taken off.
  media_first: media stand before all, `begin` too.
  names: the special tokens that the tokenizer must have, beside `end`.
  """

  user: tuple[str, str]
  assistant: tuple[str, str]
  system: tuple[str, str] | None = None
  end: str | None = None
  begin: str = ''
  default: str | None = None
  answer: str = '{}'
  inside: bool = False
  strip: bool = False
  media_first: bool = False
  names: tuple[str, ...] = ()


_CHATML = Template(
  system=('<|im_start|>system\n', '<|im_end|>\n'),
  user=('<|im_start|>user\n', '<|im_end|>\n'),
  assistant=('<|im_start|>assistant\n', '\n'),
  end='<|im_end|>',
  names=('<|im_start|>',),
)
_LLAMA3 = '<|start_header_id|>{}<|end_header_id|>\n\n'
_VICUNA = (
  'A chat between a curious user and an artificial intelligence assistant. The assistant'
  " gives helpful, detailed, and polite answers to the user's questions."
)

TEMPLATES = {
  # Nothing around anything: LLaVA's first stage, captions, questions and answers.
  'plain': Template(system=('', '\n'), user=('', ''), assistant=('', '')),
  'chatml': _CHATML,
  'qwen2': dataclasses.replace(_CHATML, default='You are a helpful assistant.'),
  'smollm2': dataclasses.replace(
    _CHATML,
    default='You are a helpful AI assistant named SmolLM, trained by Hugging Face',
  ),
  # Vicuna 1.1 and LLaVA 1.5 (2310.03744)
  'vicuna': Template(
    begin='<s>',
    default=_VICUNA,
    system=('', ' '),
    user=('USER: ', ' '),
    assistant=('ASSISTANT:', ''),
    answer=' {}',
    end='</s>',
    names=('<s>',),
  ),
  # 2307.09288
  'llama2': Template(
    system=('<<SYS>>\n', '\n<</SYS>>\n\n'),
    inside=True,
    user=('<s>[INST] ', ' [/INST]'),
    assistant=('', ''),
    answer=' {} ',
    strip=True,
    end='</s>',
    names=('<s>',),
  ),
  # 2407.21783, as its first models have it
  'llama3': Template(
    begin='<|begin_of_text|>',
    system=(_LLAMA3.format('system'), '<|eot_id|>'),
    user=(_LLAMA3.format('user'), '<|eot_id|>'),
    assistant=(_LLAMA3.format('assistant'), ''),
    strip=True,
    end='<|eot_id|>',
    names=('<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>'),
  ),
  # 2403.08295; knows no system
  'gemma': Template(
    begin='<bos>',
    user=('<start_of_turn>user\n', '<end_of_turn>\n'),
    assistant=('<start_of_turn>model\n', '\n'),
    strip=True,
    end='<end_of_turn>',
    names=('<bos>', '<start_of_turn>'),
  ),
  # 2407.07726: images, <bos>, a prompt and a line's end, what is said
  'paligemma': Template(
    begin='<bos>',
    user=('', '\n'),
    assistant=('', ''),
    end='<eos>',
    media_first=True,
    names=('<bos>',),
  ),
}


def check(name: str, tokenizer: Any) -> None:
  """Sees to it that a tokenizer has what a template needs.

  Raises:
    ValueError: an unknown template, no such special token, or another end token.
  """
  need(f'chat template {name!r}', pick('chat template', name, TEMPLATES), tokenizer)


def document(
  turns: Iterable[Turn],
  template: str | Template,
  id: str = '',
  meta: Mapping[str, Any] | None = None,
  *,
  prompt: bool = False,
) -> Document:
  """A dialogue as a document.

  Args:
    turns: what was said, in order; a system's turn comes first if there is one.
    template: its name, or one of your own.
    id, meta: of the document.
    prompt: the assistant is to speak next: the document ends where its answer begins,
      with a trained text of no words (which is the end token alone).

  Raises:
    BadDocument: 'unknown_role'; 'bad_turns': none, a system's that isn't the first or
      that the template doesn't know, a prompt after the assistant; 'bad_part'.
    ValueError: an unknown template.
  """
  if isinstance(template, str):
    template = pick('chat template', template, TEMPLATES)
  turns = _checked(turns, template, id, prompt)
  if template.default is not None and turns[0].role != 'system':
    turns.insert(0, Turn('system', template.default))
  spans = [mark(template.begin)]
  inside: list[Span] = []  # a system's turn that waits for the user's
  for turn in turns:
    said = _said(turn, template, id)
    if turn.role == 'assistant':
      spans += _answer(said, turn.trained, template)
      continue
    before, after = getattr(template, turn.role)
    if turn.role == 'system' and template.inside:
      inside = [mark(before), *said, mark(after)]
    else:
      spans += [mark(before), *inside, *said, mark(after)]
      inside = []
  if prompt:
    spans += [mark(template.assistant[0]), Text('', trained=True)]
  if template.media_first:
    spans.sort(key=lambda span: isinstance(span, Text))  # stable
  kept = [s for s in spans if not isinstance(s, Text) or s.text or s.trained]
  return Document(tuple(kept), id, dict(meta or {}))


def apply(document_: Document, template: str | Template) -> Document:
  """A document of a source, written by a template.

  Roles of spans are those of `meta['roles']`, where it has one for each; else what is
  trained is said by the assistant, and all else by the user. A space before an answer,
  which parts it from a prompt without a template, is taken off. Of a document with
  branches each is a dialogue of its own about the media of the trunk.

  Raises:
    BadDocument: as for `document`; 'bad_turns' also for branches beside texts that
      they share.
    ValueError: an unknown template.
  """
  spans, meta = document_.spans, dict(document_.meta)
  roles = meta.pop('roles', None)
  if not isinstance(roles, list) or len(roles) != len(spans):
    roles = ['assistant' if getattr(s, 'trained', False) else 'user' for s in spans]
  pairs = list(zip(roles, spans))
  branches = sorted({s.branch for s in spans} - {0})
  if not branches:
    return document(_turns(pairs), template, document_.id, meta)
  trunk = [(role, s) for role, s in pairs if not s.branch]
  if any(isinstance(s, Text) for _, s in trunk):
    raise BadDocument('bad_turns', f'document {document_.id!a}: branches share a text')
  made: list[Span] = []
  for branch in branches:
    own = [(role, s) for role, s in pairs if s.branch == branch]
    whole = document(_turns([*trunk, *own]), template, document_.id).spans
    media = [i for i, s in enumerate(whole) if not isinstance(s, Text)][: len(trunk)]
    shared = media[-1] + 1 if media else 0
    made += whole[:shared] if not made else ()
    made += [dataclasses.replace(s, branch=branch) for s in whole[shared:]]
  return Document(tuple(made), document_.id, meta)


def _turns(pairs: Iterable[tuple[str, Span]]) -> list[Turn]:
  turns: list[Turn] = []
  for role, span in pairs:
    part = span.text if isinstance(span, Text) else span
    trained = not isinstance(span, Text) or span.trained or role != 'assistant'
    if turns and turns[-1].role == role:
      turns[-1] = Turn(role, (*turns[-1].parts, part), turns[-1].trained and trained)
      continue
    if role == 'assistant' and isinstance(part, str):
      part = part.removeprefix(' ')
    turns.append(Turn(role, (part,), trained))
  return turns


def _answer(said: list[Span], trained: bool, template: Template) -> list[Span]:
  before, after = template.assistant
  if not any(isinstance(span, Text) for span in said):
    said = [*said, Text('')]
  texts = [i for i, span in enumerate(said) if isinstance(span, Text)]
  for i in texts:
    left, right = template.answer.split('{}')
    text = (left if i == texts[0] else '') + said[i].text
    said[i] = Text(text + (right if i == texts[-1] else ''), trained)
  # Trained text is closed by the end token by itself.
  close = [] if trained else [mark(template.end or '')]
  return [mark(before), *said, *close, mark(after)]


def _checked(turns, template, id, prompt) -> list[Turn]:
  turns = [
    dataclasses.replace(turn, role=_ALIASES.get(turn.role, turn.role)) for turn in turns
  ]
  if not turns:
    raise BadDocument('bad_turns', f'document {id!a}: no turns')
  for i, turn in enumerate(turns):
    if turn.role not in ROLES:
      known = ', '.join((*ROLES, *_ALIASES))
      raise BadDocument('unknown_role', f'document {id!a}: {turn.role!a}; known: {known}')
    if turn.role == 'system' and (i or template.system is None):
      why = 'is not the first' if i else 'is none of this template'
      raise BadDocument('bad_turns', f"document {id!a}: the system's turn {why}")
  if prompt and turns[-1].role == 'assistant':
    raise BadDocument('bad_turns', f"document {id!a}: a prompt ends in the user's turn")
  return turns


def _said(turn: Turn, template: Template, id: str) -> list[Span]:
  """The parts as spans of the trunk; neighbouring strings are one."""
  spans: list[Span] = []
  for part in (turn.parts,) if isinstance(turn.parts, str) else turn.parts:
    if isinstance(part, str) and spans and isinstance(spans[-1], Text):
      spans[-1] = Text(spans[-1].text + part)
    elif isinstance(part, str):
      spans.append(Text(part))
    elif isinstance(part, (Image, Audio, Video)):
      spans.append(dataclasses.replace(part, branch=0) if part.branch else part)
    else:
      raise BadDocument('bad_part', f'document {id!a}: {type(part).__name__} in a turn')
  if template.strip:
    for place, strip in ((0, str.lstrip), (-1, str.rstrip)):
      if spans and isinstance(spans[place], Text):
        spans[place] = Text(strip(spans[place].text))
  return spans
