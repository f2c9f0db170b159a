"""Writes prepared datasets (see `store`), whole or not at all.

A dataset is written in `.NAME.partial/new` beside its place, synced, and renamed at
the end: half of one is never seen. A lock on `.NAME.partial` makes a second writer of
the same dataset wait; what a killed one left there goes, or is gone on with.
"""

import collections
import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import numpy as np

from mmjax import files
from mmjax.data import document as document_lib
from mmjax.data import media
from mmjax.data.document import KINDS, BadDocument, Document
from mmjax.data.store import VERSION, Index
from mmjax.data.text import tokenised

SHARD_BYTES = 2**28


def measure(document: Document, tokenizer, max_pixels: int = media.MAX_PIXELS):
  """(text tokens, targets, [(kind, native size), ...]) of a document.

  Raises:
    BadDocument: what can't be decoded, 'empty', 'nothing_trained', 'not_unicode',
      'bad_branch'.
  """
  document_lib.check_branches(document)
  text_tokens = targets = 0
  items, begun = [], set()  # begun: branches that have something
  for span, ids in tokenised(document, tokenizer):
    kind = document_lib.kind_of(span)
    first = not begun & {0, span.branch}  # nothing stands before it
    if ids is None:
      items.append((KINDS.index(kind), media.native_size(span, max_pixels)))
      begun.add(span.branch)
      continue
    n = len(ids)
    if span.trained:
      targets += n - (n > 0 and first)  # the first slot isn't trained
    if n:
      begun.add(span.branch)
    text_tokens += n
  if not text_tokens and not items:
    raise BadDocument('empty', f'document {document.id!a} holds nothing')
  if not targets:
    raise BadDocument('nothing_trained', f'document {document.id!a}')
  return text_tokens, targets, items


class InUse(ValueError):
  """There is something already where a dataset should be written."""


class Place:
  """A dataset's directory in the making; use as a context.

  Nothing is seen at `path` before `finish`. What is made stands in `self.new`, what
  shall outlive a kill beside it in `self.partial`, which leaving removes, unless
  `self.keep` is set.

  Raises:
    InUse: the directory isn't empty. If another process is just writing it,
      entering waits for that one first.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = files.on_disk(path, 'the dataset')
    self.partial = self.path.absolute().with_name(f'.{self.path.name}.partial')
    self.new = self.partial / 'new'
    self.keep = False
    self._check_free()

  def _check_free(self):
    if self.path.exists() and (self.path.is_file() or any(self.path.iterdir())):
      raise InUse(f'{self.path} is there already; remove it or choose another')

  def __enter__(self):
    self._lock = _lock(self.partial)
    try:
      self._check_free()
      self.clear('new')
      self.new.mkdir()
    except BaseException:
      self.__exit__()
      raise
    return self

  def clear(self, *names: str):
    """Removes what a killed writer left under these names."""
    for name in names:
      left = self.partial / name
      shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)

  def finish(self, meta: dict[str, Any], splits: Iterable[str]):
    """Puts `new` at its place, with its meta.json."""
    with open(self.new / 'meta.json', 'w') as file:
      json.dump({'version': VERSION, **meta}, file, indent=2)
      file.flush()
      os.fsync(file.fileno())
    for directory in (*(self.new / name for name in splits), self.new):
      _sync(directory)
    self._check_free()
    os.replace(self.new, self.path)
    _sync(self.path.parent)
    self.keep = False

  def __exit__(self, *error):
    if not self.keep:
      shutil.rmtree(self.partial, ignore_errors=True)
    os.close(self._lock)


class Part:
  """Documents written into a directory that is made for them, split by split.

  Args:
    directory: must not exist.
    tokenizer: used for the sidecar.
    max_pixels: images above it are refused.
    shard_bytes: a new file is begun after so many bytes.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    tokenizer,
    max_pixels: int = media.MAX_PIXELS,
    shard_bytes: int = SHARD_BYTES,
  ):
    directory.mkdir(exist_ok=True)
    self._directory = directory
    self._tokenizer = tokenizer
    self._max_pixels = max_pixels
    self._shard_bytes = shard_bytes
    self._splits = {}
    self.drops = Tally()

  def add(self, split: str, document: Document):
    """Adds a document.

    Raises:
      BadDocument: it can't be used; nothing was written.
      ValueError: the split's name is no plain file name.
    """
    lengths = measure(document, self._tokenizer, self._max_pixels)
    record = document_lib.encode(document)
    if split not in self._splits:
      if split in ('', '.', '..') or pathlib.PurePath(split).name != split:
        raise ValueError(f'split {split!r} is no plain name')
      directory = self._directory / split
      self._splits[split] = SplitWriter(directory, self._shard_bytes)
    self._splits[split].add(record, len(document.spans), lengths)

  def close(self) -> dict[str, dict[str, Any]]:
    """By split: documents, spans, items of each kind, tokens, targets, shards."""
    done = {}
    for name, split in self._splits.items():
      shards = split.close()
      save_index(self._directory / name, split.index())
      done[name] = {**split.counts, 'shards': shards}
    return done

  def abandon(self):
    """Closes what an error left open."""
    for split in self._splits.values():
      split.abandon()


class Tally:
  """How many there are by reason, and the first message of each."""

  def __init__(self, tree: dict[str, list] | None = None):
    self.tree = {reason: list(entry) for reason, entry in (tree or {}).items()}

  def add(self, error: BadDocument, name: str = ''):
    message = f'{name}: {error.message}' if name else error.message
    self.tree.setdefault(error.reason, [0, message])[0] += 1

  def merge(self, tree: dict[str, list]):
    """Adds those of another, which come after these."""
    for reason, (n, message) in tree.items():
      self.tree.setdefault(reason, [0, message])[0] += n

  @property
  def counts(self) -> dict[str, int]:
    return {reason: n for reason, (n, _) in sorted(self.tree.items())}

  @property
  def first(self) -> dict[str, str]:
    return {reason: message for reason, (_, message) in sorted(self.tree.items())}


class Writer:
  """Writes a dataset; use as a context. Nothing is seen at `path` before its end.

  with Writer(path, tokenizer, {'source': 'jsonl:a.jsonl'}) as writer:
    writer.add('train', document)

  Args:
    path: the dataset's directory; must not exist or be empty.
    tokenizer: saved with the data and used for the sidecar.
    info: plain data that goes into meta.json.
    max_pixels: images above it are refused.
    shard_bytes: a new file is begun after so many bytes.

  Raises:
    InUse: see `Place`.
    OSError: the disk is full; nothing is left behind.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    tokenizer,
    info: dict[str, Any] | None = None,
    *,
    max_pixels: int = media.MAX_PIXELS,
    shard_bytes: int = SHARD_BYTES,
  ):
    self._place = Place(path)
    self._tokenizer = tokenizer
    self._info = dict(info or {})
    self._limits = (max_pixels, shard_bytes)

  def __enter__(self):
    self._place.__enter__()
    self._place.clear(*(p.name for p in self._place.partial.iterdir() if p.name != 'new'))
    self._part = Part(self._place.new, self._tokenizer, *self._limits)
    return self

  def add(self, split: str, document: Document):
    """Adds a document; raises as `Part.add` does."""
    self._part.add(split, document)

  def drop(self, error: BadDocument, name: str = ''):
    """Counts a document that was left out; keeps the first message per reason."""
    self._part.drops.add(error, name)

  def __exit__(self, kind, error, traceback):
    try:
      if kind is None:
        finish(self._place, self._tokenizer, self._info, self._part.close(),
               self._part.drops)  # fmt: skip
    finally:
      self._part.abandon()
      self._place.__exit__()


def finish(
  place: Place,
  tokenizer,
  info: dict[str, Any],
  splits: dict[str, dict[str, Any]],
  drops: Tally,
):
  """Completes the dataset in `place.new` and puts it where it belongs."""
  tokenizer.save(place.new)
  meta = {
    **info,
    'tokenizer_hash': tokenizer.hash,
    'splits': splits,
    'dropped': drops.counts,
    'dropped_first': drops.first,
  }
  place.finish(meta, splits)


class SplitWriter:
  """Records and their lengths, in files of a directory that is made for them."""

  def __init__(self, directory: pathlib.Path, shard_bytes: int, number: int = 0):
    directory.mkdir(exist_ok=True)
    self._number = number  # of the first file
    self._directory = directory
    self._shard_bytes = shard_bytes
    self._writer = None
    self._shards = []  # {file, documents, bytes}
    self._text_tokens, self._targets, self._offsets = [], [], [0]
    self._kinds, self._sizes = [], []
    self.counts = collections.Counter()

  def add(self, record: bytes, spans: int, lengths):
    """Adds a record of so many spans and of lengths as by `measure`."""
    from array_record.python import array_record_module

    text_tokens, targets, items = lengths
    if self._writer is None:
      name = f'documents-{self._number + len(self._shards):05d}.array_record'
      path = str(self._directory / name)
      # One record per chunk: random access reads no more than it needs.
      self._writer = array_record_module.ArrayRecordWriter(path, 'group_size:1')
      self._shards.append({'file': name, 'documents': 0, 'bytes': 0})
    with _file_errors():
      self._writer.write(record)
    shard = self._shards[-1]
    shard['documents'] += 1
    shard['bytes'] += len(record)
    self._text_tokens.append(text_tokens)
    self._targets.append(targets)
    self._offsets.append(self._offsets[-1] + len(items))
    self._kinds += [kind for kind, _ in items]
    self._sizes += [size for _, size in items]
    self.counts['documents'] += 1
    self.counts['spans'] += spans
    self.counts['text_tokens'] += text_tokens
    self.counts['targets'] += targets
    for kind, _ in items:
      self.counts[KINDS[kind]] += 1
    if shard['bytes'] >= self._shard_bytes:
      self._close_shard()

  def _close_shard(self):
    with _file_errors():
      self._writer.close()
    self._writer = None
    shard = self._shards[-1]
    path = self._directory / shard['file']
    shard['bytes'] = path.stat().st_size
    with open(path, 'rb') as file:
      os.fsync(file.fileno())

  def abandon(self):
    """Closes what an error left open."""
    if self._writer is not None:
      with contextlib.suppress(Exception):
        self._writer.close()

  def close(self) -> list[dict[str, Any]]:
    """[{file, documents, bytes}, ...], all synced."""
    if self._writer is not None:
      self._close_shard()
    return self._shards

  def index(self) -> Index:
    """The lengths of all that was added."""
    return Index(
      text_tokens=np.array(self._text_tokens, np.int32),
      targets=np.array(self._targets, np.int32),
      item_offsets=np.array(self._offsets, np.int64),
      item_kind=np.array(self._kinds, np.uint8),
      item_size=np.array(self._sizes, np.int32).reshape(-1, 3),
    )


def save_index(directory: pathlib.Path, index: Index):
  """Writes what `store.Dataset` reads."""
  with open(directory / 'index.npz', 'wb') as file:
    np.savez(file, **{f.name: getattr(index, f.name) for f in dataclasses.fields(Index)})
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _file_errors():
  """ArrayRecord tells of a full disk by RuntimeError."""
  try:
    yield
  except RuntimeError as error:
    raise OSError(str(error)) from None


def _lock(directory: pathlib.Path) -> int:
  """Makes a directory and waits until no other process holds it; a file handle."""
  while True:
    directory.mkdir(parents=True, exist_ok=True)
    try:
      handle = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
      continue  # its writer has just finished
    with contextlib.suppress(OSError):  # a file system without locks
      fcntl.flock(handle, fcntl.LOCK_EX)
    with contextlib.suppress(FileNotFoundError):
      if os.stat(directory).st_ino == os.fstat(handle).st_ino:
        return handle
    os.close(handle)


def _sync(directory: pathlib.Path):
  handle = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
