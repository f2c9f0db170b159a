"""What stands at a document's beginning and around its images, by model.

  document        [image] [image] what is it?  a cat
  as idefics has  <s><fake_token_around_image>[image]<fake_token_around_image>[image]
                  <fake_token_around_image>what is it?  a cat</s>
  as paligemma    [image] [image]<bos>what is it?_ a cat<eos>

An image's own slots are the model's, not text: what Hugging Face's processors write as
'<image>' or '|SPEAKER|' at them is no delimiter. Words put here are `special`, and
never trained, so a document with them is prepared, packed and stored as any other.
Dialogues have what stands around turns from `data.chat`.
"""

import dataclasses
from typing import Any

from mmjax.data.document import Document, Span, Text
from mmjax.names import pick


@dataclasses.dataclass(frozen=True)
class Delimiters:
  """Words of one model.

  begin: at the document's beginning; unless that has it there already.
  end: the end token, which the tokenizer must have as its own.
  before, after: around each image, sound and video.
  between: instead of both, where one follows right on another.
  answer: between a prompt and its answer.
  media_first: what the document begins with that isn't text stands before `begin`.
  names: the special tokens that the tokenizer must have, beside `end`.
  """

  begin: str = ''
  end: str | None = None
  before: str = ''
  after: str = ''
  between: str | None = None
  answer: str = ''
  media_first: bool = False
  names: tuple[str, ...] = ()


_FAKE = '<fake_token_around_image>'
DELIMITERS = {
  'llama': Delimiters('<s>', '</s>', names=('<s>',)),  # also LLaVA 1.5
  'gemma': Delimiters('<bos>', '<eos>', names=('<bos>',)),
  'paligemma': Delimiters(
    '<bos>', '<eos>', answer='\n', media_first=True, names=('<bos>',)
  ),
  # Without the newline that Fuyu has after each row of an image's slots.
  'fuyu': Delimiters('<s>', '|ENDOFTEXT|', media_first=True, names=('<s>',)),
  'idefics': Delimiters(
    '<s>', '</s>', before=_FAKE, after=_FAKE, between=_FAKE, names=('<s>', _FAKE)
  ),
  # The marker of an image is a slot; a chunk of text ends in the end token.
  'open_flamingo': Delimiters(end='<|endofchunk|>'),
  'qwen2_vl': Delimiters(
    end='<|im_end|>',
    before='<|vision_start|>',
    after='<|vision_end|>',
    names=('<|vision_start|>', '<|vision_end|>'),
  ),
}


def check(name: str, tokenizer: Any) -> None:
  """Sees to it that a tokenizer has what the delimiters need.

  Raises:
    ValueError: unknown delimiters, no such special token, or another end token.
  """
  need(f'delimiters {name!r}', pick('delimiters', name, DELIMITERS), tokenizer)


def need(whose: str, words: Any, tokenizer: Any) -> None:
  """Refuses a tokenizer without the special tokens `words.names`, or another `end`."""
  for token in words.names:
    if tokenizer.token_id(token) is None:
      raise ValueError(f'{whose}: the tokenizer has no special token {token!r}')
  if words.end not in (None, tokenizer.end_name):
    raise ValueError(
      f"{whose} end an answer with {words.end!r}, the tokenizer's end token is"
      f' {tokenizer.end_name!r}; prepare with --end={words.end!r}'
    )


def apply(document: Document, words: str | Delimiters) -> Document:
  """The document with its delimiters; each stands in the branch of what it's for.

  Raises:
    ValueError: unknown delimiters.
  """
  if isinstance(words, str):
    words = pick('delimiters', words, DELIMITERS)
  spans: list[Span] = []
  begun = _begins(document, words.begin)
  for i, span in enumerate(document.spans):
    before = document.spans[i - 1] if i else None
    if isinstance(span, Text):
      if not begun:
        spans.append(mark(words.begin))
        begun = True
      asked = isinstance(before, Text) and not before.trained
      if span.trained and asked and before.branch in (0, span.branch):
        spans.append(mark(words.answer, span.branch))
      spans.append(span)
      continue
    if not begun and (not words.media_first or span.branch):
      spans.append(mark(words.begin))
      begun = True
    follows = before is not None and not isinstance(before, Text)
    if follows and before.branch == span.branch and words.between is not None:
      spans.pop()  # what stood after the one before
      spans.append(mark(words.between, span.branch))
    else:
      spans.append(mark(words.before, span.branch))
    spans += [span, mark(words.after, span.branch)]
  if not begun:
    spans.append(mark(words.begin))
  kept = [s for s in spans if not isinstance(s, Text) or s.text or not s.special]
  return dataclasses.replace(document, spans=tuple(kept))


def _begins(document: Document, begin: str) -> bool:
  """Whether the first text is a template's that begins so."""
  texts = [span for span in document.spans if isinstance(span, Text)]
  return bool(texts) and texts[0].special and texts[0].text.startswith(begin)


def mark(text: str, branch: int = 0) -> Text:
  """Words that aren't the data's: names of special tokens in them are these tokens."""
  return Text(text, branch=branch, special=True)
