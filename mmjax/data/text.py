"""Which texts of a document are tokenised together.

  spans     special            text    special                        trained
            <|im_start|>user_  Hi      <|im_end|>_<|im_start|>bot_    Hello
  read as   --------------- one -----------------------------------   --- one --- end

A template's words and the data's between them are one text, as if the whole had been
written as one string, but for names of special tokens, which count in the template's
alone. A trained text is read alone, as it has to be made: after a prompt that ends. So
is what an empty text parts from its neighbours, and all that is beside no template's.
"""

from collections.abc import Iterator

from mmjax.data import tokenizer as tokenizer_lib
from mmjax.data.document import BadDocument, Document, Span, Text


def tokenised(
  document: Document, tokenizer: tokenizer_lib.Tokenizer
) -> Iterator[tuple[Span, list[int] | None]]:
  """(span, None) of each item, (first span, ids) of each stretch read in one go.

  A trained text's ids end in the end token.

  Raises:
    BadDocument: 'not_unicode', a text with lone surrogates.
  """
  if not any(isinstance(s, Text) and s.special for s in document.spans):
    for span in document.spans:
      text = isinstance(span, Text)
      yield span, _ids(document, tokenizer, [span]) if text else None
    return
  before, goes_on = None, False
  for stretch in _stretches(document):
    first, last = stretch[0], stretch[-1]
    if not isinstance(first, Text):
      before = None
      yield first, None
      continue
    # After a template's word, unless that ended in a token of its own.
    after = before is not None and before.special and before.branch == first.branch
    ids = _ids(document, tokenizer, stretch, after and goes_on)
    if not ids and not first.trained:
      yield first, ids
      continue
    before = last
    goes_on = ids[-1] not in tokenizer.special.values()
    yield first, ids


def _ids(document, tokenizer, stretch, goes_on=False) -> list[int]:
  first = stretch[0]
  try:
    if len(stretch) == 1 and not first.special:
      more = {'goes_on': True} if goes_on else {}
      ids = tokenizer.encode(first.text, **more)
    else:
      parts = [(span.text, span.special) for span in stretch]
      ids = tokenizer_lib.encode_parts(tokenizer, parts, goes_on)
  except UnicodeError as error:
    raise BadDocument('not_unicode', f'document {document.id!a}: {error}') from None
  if first.trained:
    ids.append(tokenizer.end_id)
  return ids


def _stretches(document: Document) -> Iterator[list[Span]]:
  stretch: list[Span] = []
  for span in document.spans:
    if stretch and not _together(stretch[-1], span):
      yield stretch
      stretch = []
    stretch.append(span)
  if stretch:
    yield stretch


def _together(one: Span, two: Span) -> bool:
  return (
    isinstance(one, Text)
    and isinstance(two, Text)
    and one.branch == two.branch
    and not (one.trained or two.trained)
    and (one.special or two.special)
    and bool(one.text and two.text)
  )
