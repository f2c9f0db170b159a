"""Vocabularies in other forms than a tokenizer.json, made into one.

  model.gguf   byte-level BPE (Radford et al., 2019): tokens, merges, and the name of
               how text is cut into words before it
  vocab.txt    WordPiece (1609.08144) as in BERT: a token per line, longest match first,
               '##' in front of what goes on inside a word

BERT's lower case and other wishes stand in a tokenizer_config.json beside vocab.txt.
"""

import json
import os
import pathlib

from mmjax.files import gguf_value, open_gguf
from mmjax.names import closest

_CONTROL = 3  # token_type of tokens that no text makes


def _gpt2(pre):
  return pre.ByteLevel(add_prefix_space=False)


def _smollm(pre):
  return pre.Sequence([pre.Digits(individual_digits=True), _gpt2(pre)])


# How a text is cut into words, by what tokenizer.ggml.pre says.
_PRE = {'gpt-2': _gpt2, 'smollm': _smollm}


def of_gguf(path: str | os.PathLike) -> tuple[bytes, int | None]:
  """A tokenizer.json of a GGUF file's vocabulary, and the id of its end token.

  Raises:
    ValueError: no GGUF file, or a tokenizer of another kind; lists those there are.
  """
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers

  reader = open_gguf(path)

  def get(key, *default):
    found = gguf_value(reader, f'tokenizer.ggml.{key}', *default)
    if found is None and not default:
      raise ValueError(f'{path}: no tokenizer.ggml.{key} in its metadata')
    return found

  if (kind := get('model')) != 'gpt2':
    raise ValueError(
      f"{path}: its tokenizer is {kind!r}, only 'gpt2' (byte-level BPE) is supported"
    )
  pre = get('pre', 'gpt-2')
  if pre not in _PRE:
    raise ValueError(f'{path}: unknown tokenizer.ggml.pre {pre!r}{closest(pre, _PRE)}')
  tokens = get('tokens')
  merges = [tuple(merge.split(' ')) for merge in get('merges')]
  ids = {token: i for i, token in enumerate(tokens)}
  try:
    made = tokenizers.Tokenizer(models.BPE(ids, merges))
  except Exception as error:  # the library raises plain Exception
    raise ValueError(f'{path}: its tokens and merges do not fit: {error}') from None
  made.pre_tokenizer = _PRE[pre](pre_tokenizers)
  made.decoder = decoders.ByteLevel()
  types = get('token_type', [1] * len(tokens))
  made.add_special_tokens([t for t, type_ in zip(tokens, types) if type_ == _CONTROL])
  return made.to_str().encode(), get('eos_token_id', None)


def of_wordpiece(path: str | os.PathLike, content: bytes) -> bytes:
  """A tokenizer.json of a vocab.txt with this content.

  Raises:
    ValueError: it is no vocabulary of WordPiece.
  """
  import tokenizers
  from tokenizers import decoders, models, normalizers, pre_tokenizers

  tokens = content.decode(errors='replace').splitlines()
  if '[UNK]' not in tokens:
    raise ValueError(f'{path} is no vocabulary of WordPiece: no [UNK] in it')
  beside = pathlib.Path(path).with_name('tokenizer_config.json')
  try:
    said = json.loads(beside.read_text()) if beside.exists() else {}
    lowercase, accents, chinese = (
      said.get(*pair)
      for pair in (
        ('do_lower_case', True),
        ('strip_accents', None),
        ('tokenize_chinese_chars', True),
      )
    )
  except (ValueError, AttributeError) as error:
    raise ValueError(f'{beside} is no JSON object: {error}') from None
  ids = {token: i for i, token in enumerate(tokens)}
  made = tokenizers.Tokenizer(
    models.WordPiece(ids, unk_token='[UNK]', max_input_chars_per_word=100)
  )
  made.normalizer = normalizers.BertNormalizer(
    clean_text=True,
    handle_chinese_chars=chinese,
    strip_accents=accents,
    lowercase=lowercase,
  )
  made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  made.decoder = decoders.WordPiece()
  names = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
  made.add_special_tokens([name for name in names if name in ids])
  return made.to_str().encode()
