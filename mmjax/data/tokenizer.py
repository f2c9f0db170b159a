"""Tokenizers: text to ids and back, one small interface over three kinds.

  spec        what
  bytes       UTF-8 bytes and an end token: 257 ids, nothing to train or to load
  bpe:N       byte-level BPE of at most N ids, trained on the texts at hand
              (words keep the space before them; no merges across words)
  a path      a `tokenizer.json` (tokenizers), a SentencePiece `.model`, the tokenizer
              inside a `.gguf`, a WordPiece `vocab.txt`; or package:NAME/FILE

Text never turns into a special token, whatever it says: '<|end|>' in a document
is seven characters, unless `encode` is told `special=True`, as templates of chats
want (`encode_parts`: a template's words and the data's, read in one go). Nothing is
added in front of or behind a text. `hash` tells two tokenizers apart by content.

All kinds have

  kind, hash, vocab_size, end_id, end_name
  special                        id by name of the special tokens
  encode(text, special, goes_on) `goes_on`: text stands before it, so that no space is
                                 put in front by those that do that at a beginning
  decode(ids, special)           special tokens left out, or by their names

and `decode(encode(text)) == text` for every text where their docstrings say so.
"""

import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mmjax.data import vocabularies
from mmjax.files import find

END = '<|end|>'
# In this order; the first that the vocabulary has is the end token.
END_NAMES = (END, '<|im_end|>', '<|endoftext|>', '<|eot_id|>', '<eos>', '</s>', '[SEP]')
# Special wherever they are tokens, also where a file counts them as plain words.
MARKUP = ('<start_of_turn>', '<end_of_turn>', '<image>', '<fake_token_around_image>',
          '|SPEAKER|', '|NEWLINE|', '<|endofchunk|>')  # fmt: skip
_META = 'tokenizer_meta.json'


class _Special:
  """What all kinds say of their special tokens, from `special` and `end_id`."""

  special: Mapping[str, int]

  @property
  def end_name(self) -> str:
    """The end token's name."""
    return next(name for name, i in self.special.items() if i == self.end_id)

  def token_id(self, name: str) -> int | None:
    """The id of a special token, None if there is none of this name."""
    return self.special.get(name)

  def _decode_special(self, ids: Iterable[int]) -> str:
    names = {i: name for name, i in self.special.items()}
    out, plain = [], []
    for i in ids:
      if i in names:
        out += [self.decode(plain), names[i]]
        plain = []
      else:
        plain.append(i)
    return ''.join([*out, self.decode(plain)])


class ByteTokenizer(_Special):
  """UTF-8 bytes; id 256 is the end token. Needs no file. Gives every text back."""

  kind = 'bytes'
  vocab_size = 257
  end_id = 256
  special = {END: 256}

  @property
  def hash(self) -> str:
    return _hash(self.kind, b'', self.end_id)

  def encode(self, text: str, special: bool = False, goes_on: bool = False) -> list[int]:
    if special:
      return encode_parts(self, [(text, True)], goes_on)
    return list(text.encode())

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[int], special: bool = False) -> str:
    if special:
      return self._decode_special(ids)
    return bytes(i for i in ids if 0 <= i < 256).decode(errors='replace')

  def save(self, directory: str | os.PathLike):
    """Writes what `load` reads."""
    _write_meta(directory, self)


class JsonTokenizer(_Special):
  """A `tokenizer.json` of the tokenizers library, also what `bpe:N` trains.

  Byte-level BPE (that of `bpe:N`, of GGUF files, of GPT-2, Llama 3, Qwen2) gives every
  text back. Others give back what their normalizers left of it; WordPiece a text in
  lower case, without accents, and with spaces of its own.
  """

  kind = 'json'
  file = 'tokenizer.json'

  def __init__(self, content: bytes, end_id: int | None = None, where: str = ''):
    """From the file's content.

    Raises:
      ValueError: content that isn't a tokenizer, or no end token.
    """
    import tokenizers

    where = where or self.file
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises plain Exception
      raise ValueError(f'{where} is no tokenizer.json: {error}') from None
    self._tokenizer.encode_special_tokens = True  # text is text
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    added = self._tokenizer.get_added_tokens_decoder()
    plain = [t for t in added.values() if not t.special and t.content in MARKUP]
    for token in plain:
      token.special = True
    self._tokenizer.add_special_tokens(plain)
    self._short = functools.lru_cache(2**14)(self._encode)
    self._content = content
    self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
    self.end_id = _end_id(end_id, self._tokenizer.token_to_id, self.vocab_size, where)
    self.special = {t.content: i for i, t in added.items() if t.special}
    self.special.setdefault(self._tokenizer.id_to_token(self.end_id), self.end_id)

  @property
  def hash(self) -> str:
    return _hash(self.kind, self._content, self.end_id)

  def encode(self, text: str, special: bool = False, goes_on: bool = False) -> list[int]:
    if special:
      return encode_parts(self, [(text, True)], goes_on)
    if goes_on and self._going is not None:
      return self._going.encode(text)
    # Questions and answers come again and again.
    return list(self._short(text) if len(text) < 128 else self._encode(text))

  def _encode(self, text):
    return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

  @functools.cached_property
  def _going(self) -> 'JsonTokenizer | None':
    """The same without a space in front; None where none is put."""
    tree = json.loads(self._content)
    if not _unprefixed(tree.get('normalizer')) | _unprefixed(tree.get('pre_tokenizer')):
      return None
    return JsonTokenizer(json.dumps(tree).encode(), self.end_id)

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    done = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [one.ids for one in done]

  def decode(self, ids: Iterable[int], special: bool = False) -> str:
    if special:
      return self._decode_special(ids)
    ids = [int(i) for i in ids if 0 <= i < self.vocab_size and i != self.end_id]
    return self._tokenizer.decode(ids, skip_special_tokens=True)

  def save(self, directory: str | os.PathLike):
    """Writes what `load` reads."""
    _write(pathlib.Path(directory) / self.file, self._content)
    _write_meta(directory, self)

  def __reduce__(self):
    return JsonTokenizer, (self._content, self.end_id)


class SentencePieceTokenizer(_Special):
  """A SentencePiece model file.

  Gives back what its normalizer leaves of a text, where each byte has a piece (Llama's
  do nothing but to take characters that it lacks as bytes; a model trained with
  defaults applies NFKC, joins spaces and loses what it hasn't seen). U+2581, which
  stands for a space inside, comes back as a space.
  """

  kind = 'sentencepiece'
  file = 'tokenizer.model'

  def __init__(self, content: bytes, end_id: int | None = None, where: str = ''):
    """From the file's content.

    Raises:
      ValueError: content that isn't a model, or no end token.
    """
    import sentencepiece

    where = where or self.file
    self._processor = sentencepiece.SentencePieceProcessor()
    try:
      self._processor.LoadFromSerializedProto(content)
    except RuntimeError:
      raise ValueError(f'{where} is no SentencePiece model') from None
    self._content = content
    self.vocab_size = self._processor.GetPieceSize()
    if end_id is None and self._processor.eos_id() >= 0:
      end_id = self._processor.eos_id()
    self.end_id = _end_id(end_id, self._find, self.vocab_size, where)
    p = self._processor
    marks = {name: i for name in MARKUP if (i := self._find(name)) is not None}
    control = [i for i in range(self.vocab_size) if p.IsControl(i)]
    self.special = {p.IdToPiece(i): i for i in (*control, self.end_id)} | marks
    # Those that are pieces like others would be found in any text.
    self._found = {n: i for n, i in self.special.items() if not p.IsControl(i)}

  def _find(self, piece: str) -> int | None:
    found = self._processor.PieceToId(piece)
    return found if self._processor.IdToPiece(found) == piece else None

  @property
  def hash(self) -> str:
    return _hash(self.kind, self._content, self.end_id)

  def encode(self, text: str, special: bool = False, goes_on: bool = False) -> list[int]:
    if special:
      return encode_parts(self, [(text, True)], goes_on)
    if any(name in text for name in self._found):
      ids = []
      for part in _split(text, self._found):
        # A name's first letter for itself, so that it isn't found.
        for piece in (part[:1], part[1:]) if part in self._found else (part,):
          if piece:
            ids += self.encode(piece, goes_on=goes_on or bool(ids))
      return ids
    return (self._going if goes_on else self._processor).EncodeAsIds(text)

  @functools.cached_property
  def _going(self):
    """The same without a space in front."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(self._content)
    model.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[int], special: bool = False) -> str:
    if special:
      return self._decode_special(ids)
    ids = [int(i) for i in ids if 0 <= i < self.vocab_size and i != self.end_id]
    return self._processor.DecodeIds(ids)

  def save(self, directory: str | os.PathLike):
    """Writes what `load` reads."""
    _write(pathlib.Path(directory) / self.file, self._content)
    _write_meta(directory, self)

  def __reduce__(self):
    return SentencePieceTokenizer, (self._content, self.end_id)


Tokenizer = ByteTokenizer | JsonTokenizer | SentencePieceTokenizer


def load(directory: str | os.PathLike) -> Tokenizer:
  """The tokenizer that `save` wrote.

  Raises:
    ValueError: no tokenizer there, an unknown kind, or a file that was changed.
  """
  directory = pathlib.Path(directory)
  try:
    meta = json.loads((directory / _META).read_text())
    kind, end_id, want = meta['kind'], meta['end_id'], meta['hash']
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(f'no tokenizer at {directory / _META}: {error!r}') from None
  if kind == 'bytes':
    tokenizer = ByteTokenizer()
  elif kind in _FILES:
    path = directory / _FILES[kind].file
    tokenizer = _FILES[kind](_read(path), end_id, str(path))
  else:
    raise ValueError(
      f'{directory / _META}: kind {kind!r}; known: bytes, {", ".join(_FILES)}'
    )
  if tokenizer.hash != want:
    raise ValueError(
      f'the tokenizer in {directory} was changed: its hash is {tokenizer.hash[:12]}, '
      f'{_META} says {want[:12]}'
    )
  return tokenizer


def from_spec(
  spec: str,
  texts: Callable[[], Iterable[str]] | None = None,
  end: str | None = None,
) -> Tokenizer:
  """A tokenizer by its spec: 'bytes', 'bpe:N' or a path.

  Args:
    spec: see the top of this file.
    texts: gives the texts to train 'bpe:N' on.
    end: the end token's name, where it isn't one of the usual ones.

  Raises:
    ValueError: an unknown spec, a missing or broken file, no end token.
  """
  if spec == 'bytes':
    return ByteTokenizer()
  if spec.startswith('bpe:'):
    number = spec.removeprefix('bpe:')
    if not number.isdecimal() or int(number) < 257:
      raise ValueError(f"tokenizer {spec!r}: N of 'bpe:N' must be a number >= 257")
    if texts is None:
      raise ValueError(f'tokenizer {spec!r} needs texts to be trained on')
    return train_bpe(texts(), int(number))
  path = find(spec)
  if path.suffix not in _READERS:
    raise ValueError(
      f"tokenizer {spec!r}; choose 'bytes', 'bpe:N', or a path to a tokenizer.json, "
      'a SentencePiece .model, a .gguf or a WordPiece vocab.txt'
    )
  cls = SentencePieceTokenizer if path.suffix == '.model' else JsonTokenizer
  content, end_id = _READERS[path.suffix](path)
  if end is None:
    return cls(content, end_id, spec)
  probe = cls(content, end_id=0, where=spec)
  find_id = probe._tokenizer.token_to_id if cls is JsonTokenizer else probe._find
  if find_id(end) is None:
    raise ValueError(f'{spec} has no token {end!r} to end texts with')
  return cls(content, find_id(end), spec)


def train_bpe(texts: Iterable[str], size: int) -> JsonTokenizer:
  """Trains byte-level BPE of at most `size` ids (1508.07909) on texts.

  Id 0 is the end token, the next 256 are the bytes; frequent words get ids of
  their own. The same texts give the same tokenizer.
  """
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=[END],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return JsonTokenizer(tokenizer.to_str().encode())


def _end_id(end_id, find, vocab_size: int, where: str) -> int:
  if end_id is None:
    found = (find(name) for name in END_NAMES)
    end_id = next((i for i in found if i is not None), None)
  if end_id is None or not 0 <= end_id < vocab_size:
    raise ValueError(
      f'{where} has no end token: looked for {" ".join(END_NAMES)}; name it with end='
    )
  return end_id


def encode_parts(
  tokenizer: Tokenizer, parts: Iterable[tuple[str, bool]], goes_on: bool = False
) -> list[int]:
  """Ids of a text in parts, read in one go.

  Args:
    tokenizer: one of those above.
    parts: (text, special): in a special one, names of special tokens are these tokens.
    goes_on: text stands before it.
  """
  pieces: list[str | int] = ['']
  for text, special in parts:
    for i, part in enumerate(_split(text, tokenizer.special) if special else [text]):
      if i % 2:
        pieces += [tokenizer.special[part], '']
      else:
        pieces[-1] += part
  ids = []
  for i, piece in enumerate(pieces):
    if isinstance(piece, int):
      ids.append(piece)
    elif piece:
      ids += tokenizer.encode(piece, goes_on=goes_on and not i)
  return ids


def _split(text: str, names: Iterable[str]) -> list[str]:
  """[text, name, text, ..., text]; the longest name counts."""
  pattern = _pattern(tuple(names))
  return pattern.split(text) if pattern else [text]


@functools.lru_cache(16)
def _pattern(names: tuple[str, ...]) -> re.Pattern | None:
  longest = sorted(names, key=len, reverse=True)
  return re.compile(f'({"|".join(map(re.escape, longest))})') if longest else None


def _unprefixed(part: dict[str, Any] | None) -> bool:
  """Takes from a part of a tokenizer.json what puts a space in front; if there was."""
  if not part:
    return False
  inside = [*part.get('normalizers', ()), *part.get('pretokenizers', ())]
  changed = any([_unprefixed(one) for one in inside])
  if part['type'] == 'Prepend':
    changed, part['prepend'] = True, ''
  if part['type'] == 'Metaspace':
    changed, part['prepend_scheme'] = True, 'never'
  if part['type'] == 'ByteLevel' and part.get('add_prefix_space'):
    changed, part['add_prefix_space'] = True, False
  return changed


def _hash(kind: str, content: bytes, end_id: int) -> str:
  return hashlib.sha256(f'{kind} {end_id}\n'.encode() + content).hexdigest()


def _read(path: pathlib.Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise ValueError(f'no tokenizer file {path}: {error.strerror}') from None


def _write(path: pathlib.Path, content: bytes):
  with open(path, 'wb') as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def _write_meta(directory, tokenizer: Tokenizer):
  meta = {
    'kind': tokenizer.kind,
    'hash': tokenizer.hash,
    'end_id': tokenizer.end_id,
    'vocab_size': tokenizer.vocab_size,
  }
  content = json.dumps(meta, indent=2).encode()
  _write(pathlib.Path(directory) / _META, content)


# What a file's content means: a model or tokenizer.json, and its end token if it says.
_READERS = {
  '.json': lambda path: (_read(path), None),
  '.model': lambda path: (_read(path), None),
  '.gguf': vocabularies.of_gguf,
  '.txt': lambda path: (vocabularies.of_wordpiece(path, _read(path)), None),
}
_FILES = {cls.kind: cls for cls in (JsonTokenizer, SentencePieceTokenizer)}
