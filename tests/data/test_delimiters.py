"""Delimiters by model: where they stand, and that they are what processors write."""

import json

import pytest
import tokenizers

from mmjax.data import chat, delimiters
from mmjax.data import tokenizer as tokenizer_lib
from mmjax.data.delimiters import Delimiters, apply
from mmjax.data.document import Document, Image, Text

ONE, TWO = Image(b'1'), Image(b'2')
FAKE = '<fake_token_around_image>'


def shown(document):
  return [s if isinstance(s, Image) else s.text for s in document.spans]


@pytest.mark.parametrize(
  ('name', 'want'),
  [
    ('llama', ['<s>', ONE, TWO, 'what?', ' cat', ONE, ' dog']),
    ('paligemma', [ONE, TWO, '<bos>', 'what?', '\n', ' cat', ONE, ' dog']),
    ('fuyu', [ONE, TWO, '<s>', 'what?', ' cat', ONE, ' dog']),
    (
      'idefics',
      ['<s>', FAKE, ONE, FAKE, TWO, FAKE, 'what?', ' cat', FAKE, ONE, FAKE, ' dog'],
    ),
    ('open_flamingo', [ONE, TWO, 'what?', ' cat', ONE, ' dog']),
    (
      'qwen2_vl',
      ['<|vision_start|>', ONE, '<|vision_end|>', '<|vision_start|>', TWO,
       '<|vision_end|>', 'what?', ' cat', '<|vision_start|>', ONE, '<|vision_end|>',
       ' dog'],
    ),
  ],
)  # fmt: skip
def test_where_they_stand(name, want):
  spans = (ONE, TWO, Text('what?'), Text(' cat', True), ONE, Text(' dog', True))
  made = apply(Document(spans, 'a', {'types': ['x', 'y']}), name)
  assert shown(made) == want
  assert (made.id, made.meta) == ('a', {'types': ['x', 'y']})
  new = [s for s in made.spans if s not in spans]
  assert all(s.special and not s.trained for s in new)
  assert apply(made, Delimiters(delimiters.DELIMITERS[name].begin)) == made  # once


def test_each_stands_in_its_branch():
  spans = (
    Text('q', branch=1), Text('a', True, 1), TWO, Image(b'3', 2), Text('b', True, 2)
  )  # fmt: skip
  words = Delimiters('B', before='(', after=')', between='|', answer=':')
  made = apply(Document(spans), words)
  assert [(getattr(s, 'text', 'i'), s.branch) for s in made.spans] == [
    ('B', 0), ('q', 1), (':', 1), ('a', 1), ('(', 0), ('i', 0), (')', 0), ('(', 2),
    ('i', 2), (')', 2), ('b', 2),
  ]  # fmt: skip
  assert shown(apply(Document((ONE,)), 'paligemma')) == [ONE, '<bos>']


def test_a_dialogue_has_its_beginning_from_its_template():
  turns = [chat.Turn('user', (ONE, 'what?')), chat.Turn('assistant', 'a')]
  made = apply(chat.document(turns, 'llama2'), 'idefics')
  assert shown(made)[:4] == ['<s>[INST] ', FAKE, ONE, FAKE]


def test_plain_words_of_a_file_are_special_where_they_are_delimiters():
  made = tokenizer_lib.train_bpe(['what is it?'], 280)
  tree = json.loads(made._content)
  at = len(tree['model']['vocab'])
  for name in (FAKE, '<s>', '</s>'):
    tree['added_tokens'].append(
      dict(id=at, content=name, single_word=False, lstrip=False, rstrip=False,
           normalized=False, special=name != FAKE)
    )  # fmt: skip
    at += 1
  content = tokenizers.Tokenizer.from_str(json.dumps(tree)).to_str().encode()
  library = tokenizers.Tokenizer.from_str(content.decode())
  tokenizer = tokenizer_lib.JsonTokenizer(content, library.token_to_id('</s>'))
  delimiters.check('idefics', tokenizer)
  fake = library.token_to_id(FAKE)
  assert tokenizer.encode(FAKE, special=True) == [fake]
  assert fake not in tokenizer.encode(f'what is {FAKE}?')
  assert tokenizer.decode(tokenizer.encode(f'is {FAKE}')) == f'is {FAKE}'


def test_wrong_names_and_tokenizers():
  with pytest.raises(ValueError, match="unknown delimiters 'idefix'; did you mean"):
    apply(Document((ONE,)), 'idefix')
  bytes_ = tokenizer_lib.ByteTokenizer()
  with pytest.raises(
    ValueError, match="'llama': the tokenizer has no special token '<s>'"
  ):
    delimiters.check('llama', bytes_)
  with pytest.raises(ValueError, match=r"'open_flamingo' end an answer with .*--end="):
    delimiters.check('open_flamingo', bytes_)
