"""Tokenizers: text to ids and back, one small interface over three kinds.

  spec        what
  bytes       UTF-8 bytes and an end token: 257 ids, nothing to train or to load
  bpe:N       byte-level BPE of at most N ids, trained on the texts at hand
              (words keep the space before them; no merges across words)
  a path      a `tokenizer.json` (tokenizers), a SentencePiece `.model`, the tokenizer
              inside a `.gguf`, a WordPiece `vocab.txt`; or package:NAME/FILE

Text never turns into a special token, whatever it says: '<|end|>' in a document
is seven characters, unless `encode` is told `special=True`, as templates of chats
want. Nothing is added in front of or behind a text. `hash` tells two tokenizers
apart by content.
"""

import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from mmjax.data import vocabularies
from mmjax.files import find

END = '<|end|>'
# In this order; the first that the vocabulary has is the end token.
END_NAMES = (END, '<|im_end|>', '<|endoftext|>', '<|eot_id|>', '<eos>', '</s>', '[SEP]')
_META = 'tokenizer_meta.json'


class ByteTokenizer:
  """UTF-8 bytes; id 256 is the end token. Needs no file."""

  kind = 'bytes'
  vocab_size = 257
  end_id = 256

  @property
  def hash(self) -> str:
    return _hash(self.kind, b'', self.end_id)

  def encode(self, text: str, special: bool = False) -> list[int]:
    if special:
      return _encode_special(self, text, {END: self.end_id})
    return list(text.encode())

  def token_id(self, name: str) -> int | None:
    """The id of a special token, None if there is none of this name."""
    return self.end_id if name == END else None

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[int]) -> str:
    return bytes(i for i in ids if 0 <= i < 256).decode(errors='replace')

  def save(self, directory: str | os.PathLike):
    """Writes what `load` reads."""
    _write_meta(directory, self)


class JsonTokenizer:
  """A `tokenizer.json` of the tokenizers library, also what `bpe:N` trains."""

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
    added = self._tokenizer.get_added_tokens_decoder().items()
    self._special = {token.content: i for i, token in added if token.special}
    self._short = functools.lru_cache(2**14)(self._encode)
    self._content = content
    self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
    self.end_id = _end_id(end_id, self._tokenizer.token_to_id, self.vocab_size, where)

  @property
  def hash(self) -> str:
    return _hash(self.kind, self._content, self.end_id)

  def encode(self, text: str, special: bool = False) -> list[int]:
    if special:
      return _encode_special(self, text, self._special)
    # Questions and answers come again and again.
    return list(self._short(text) if len(text) < 128 else self._encode(text))

  def token_id(self, name: str) -> int | None:
    """The id of a special token, None if there is none of this name."""
    return self._special.get(name)

  def _encode(self, text):
    return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    done = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [one.ids for one in done]

  def decode(self, ids: Iterable[int]) -> str:
    ids = [int(i) for i in ids if 0 <= i < self.vocab_size and i != self.end_id]
    return self._tokenizer.decode(ids, skip_special_tokens=True)

  def save(self, directory: str | os.PathLike):
    """Writes what `load` reads."""
    _write(pathlib.Path(directory) / self.file, self._content)
    _write_meta(directory, self)

  def __reduce__(self):
    return JsonTokenizer, (self._content, self.end_id)


class SentencePieceTokenizer:
  """A SentencePiece model file. Its normalisation may not give each text back."""

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

  def token_id(self, name: str) -> int | None:
    """The id of a special token, None if there is none of this name."""
    found = self._find(name)
    return found if found is not None and self._processor.IsControl(found) else None

  def _find(self, piece: str) -> int | None:
    found = self._processor.PieceToId(piece)
    return found if self._processor.IdToPiece(found) == piece else None

  @property
  def hash(self) -> str:
    return _hash(self.kind, self._content, self.end_id)

  def encode(self, text: str, special: bool = False) -> list[int]:
    if special:
      p = self._processor
      control = filter(p.IsControl, range(self.vocab_size))
      return _encode_special(self, text, {p.IdToPiece(i): i for i in control})
    return self._processor.EncodeAsIds(text)

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[int]) -> str:
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


def _encode_special(tokenizer, text: str, special: Mapping[str, int]) -> list[int]:
  """Ids of a text in which names of special tokens are these tokens."""
  names = sorted(special, key=len, reverse=True)
  parts = re.split(f'({"|".join(map(re.escape, names))})', text) if names else [text]
  ids = []
  for i, part in enumerate(parts):
    ids += [special[part]] if i % 2 else tokenizer.encode(part)
  return ids


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
