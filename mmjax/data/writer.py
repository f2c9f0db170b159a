"""Writes prepared datasets (see `store`), whole or not at all.

A dataset is written in `.NAME.partial` beside its place, synced, and renamed at
the end: half of one is never seen. A lock on that directory makes a second
writer of the same dataset wait, and tells what a killed one left behind.
"""

import collections
import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np

from mmjax.data import document as document_lib
from mmjax.data import media
from mmjax.data.document import KINDS, BadDocument, Document
from mmjax.data.store import VERSION


def measure(document: Document, tokenizer, max_pixels: int = media.MAX_PIXELS):
  """(text tokens, targets, [(kind, native size), ...]) of a document.

  Raises:
    BadDocument: what can't be decoded, 'empty', 'nothing_trained', 'not_unicode',
      'bad_branch'.
  """
  document_lib.check_branches(document)
  text_tokens = targets = 0
  items, begun = [], set()  # begun: branches that have something
  for i, span in enumerate(document.spans):
    kind = document_lib.kind_of(span)
    first = not begun & {0, span.branch}  # nothing stands before it
    if kind != 'text':
      items.append((KINDS.index(kind), media.native_size(span, max_pixels)))
      begun.add(span.branch)
      continue
    try:
      n = len(tokenizer.encode(span.text)) + bool(span.trained)
    except UnicodeError as error:
      raise BadDocument('not_unicode', f'span {i}: {error}') from None
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
    InUse: the directory isn't empty. If another process is just writing it,
      entering waits for that one first.
    OSError: the disk is full; nothing is left behind.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    tokenizer,
    info: dict[str, Any] | None = None,
    *,
    max_pixels: int = media.MAX_PIXELS,
    shard_bytes: int = 2**28,
  ):
    self.path = pathlib.Path(path)
    self._check_free()
    self._tokenizer = tokenizer
    self._info = dict(info or {})
    self._max_pixels = max_pixels
    self._shard_bytes = shard_bytes
    self._splits = {}
    self._dropped = {}  # reason: [count, first message]

  def _check_free(self):
    if self.path.exists() and (self.path.is_file() or any(self.path.iterdir())):
      raise InUse(f'{self.path} is there already; remove it or choose another')

  def __enter__(self):
    self._partial = self.path.absolute().with_name(f'.{self.path.name}.partial')
    self._lock = _lock(self._partial)
    try:
      self._check_free()
      for left in self._partial.iterdir():  # by a writer that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    except BaseException:
      self._leave()
      raise
    return self

  def _leave(self):
    shutil.rmtree(self._partial, ignore_errors=True)
    os.close(self._lock)

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
      self._splits[split] = _SplitWriter(self._partial / split, self._shard_bytes)
    self._splits[split].add(record, document, lengths)

  def drop(self, error: BadDocument, name: str = ''):
    """Counts a document that was left out; keeps the first message per reason."""
    message = f'{name}: {error.message}' if name else error.message
    self._dropped.setdefault(error.reason, [0, message])[0] += 1

  @property
  def dropped(self) -> dict[str, int]:
    """How many documents were left out, by reason."""
    return {reason: n for reason, (n, _) in sorted(self._dropped.items())}

  @property
  def counts(self) -> dict[str, dict[str, int]]:
    """By split: documents, spans, items of each kind, tokens, targets."""
    return {name: dict(split.counts) for name, split in self._splits.items()}

  def __exit__(self, kind, error, traceback):
    try:
      if kind is None:
        self._finish({name: split.close() for name, split in self._splits.items()})
    finally:
      for split in self._splits.values():
        split.abandon()
      self._leave()

  def _finish(self, splits):
    self._tokenizer.save(self._partial)
    meta = {
      'version': VERSION,
      **self._info,
      'tokenizer_hash': self._tokenizer.hash,
      'splits': splits,
      'dropped': self.dropped,
      'dropped_first': {reason: first for reason, (_, first) in self._dropped.items()},
    }
    with open(self._partial / 'meta.json', 'w') as file:
      json.dump(meta, file, indent=2)
      file.flush()
      os.fsync(file.fileno())
    for directory in (*(self._partial / name for name in splits), self._partial):
      _sync(directory)
    self._check_free()
    os.replace(self._partial, self.path)
    _sync(self.path.parent)


class _SplitWriter:
  def __init__(self, directory: pathlib.Path, shard_bytes: int):
    directory.mkdir()
    self._directory = directory
    self._shard_bytes = shard_bytes
    self._writer = None
    self._shards = []  # {file, documents, bytes}
    self._text_tokens, self._targets, self._offsets = [], [], [0]
    self._kinds, self._sizes = [], []
    self.counts = collections.Counter()

  def add(self, record, document, lengths):
    from array_record.python import array_record_module

    text_tokens, targets, items = lengths
    if self._writer is None:
      name = f'documents-{len(self._shards):05d}.array_record'
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
    self.counts['spans'] += len(document.spans)
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

  def close(self) -> dict[str, Any]:
    if self._writer is not None:
      self._close_shard()
    with open(self._directory / 'index.npz', 'wb') as file:
      np.savez(
        file,
        text_tokens=np.array(self._text_tokens, np.int32),
        targets=np.array(self._targets, np.int32),
        item_offsets=np.array(self._offsets, np.int64),
        item_kind=np.array(self._kinds, np.uint8),
        item_size=np.array(self._sizes, np.int32).reshape(-1, 3),
      )
      file.flush()
      os.fsync(file.fileno())
    return {**self.counts, 'shards': self._shards}


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
