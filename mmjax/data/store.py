"""A prepared dataset on disk: records, a sidecar of lengths, a tokenizer, counts.

  data/easy_vqa/
    meta.json                            last written: with it, it is whole
    tokenizer.json, tokenizer_meta.json
    train/documents-00000.array_record   one msgpack document per record
    train/index.npz                      lengths of every document
    test/...

The sidecar says all that packing needs, so plans are made without reading
documents. `writer` makes datasets, `Dataset` reads them.
"""

import dataclasses
import json
import os
import pathlib
import threading
from typing import Any

import numpy as np

from mmjax import files
from mmjax.data import document as document_lib
from mmjax.data import tokenizer as tokenizer_lib
from mmjax.data.document import BadDocument, Document

VERSION = 2


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
  """Lengths of N documents with M media items in all.

  text_tokens:  i32[N] text tokens, end tokens included
  targets:      i32[N] those that are trained (a trained first slot doesn't count)
  item_offsets: i64[N+1] document n holds items [item_offsets[n], item_offsets[n+1])
  item_kind:    u8[M] place in `document.KINDS`: 0 image, 1 audio, 2 video
  item_size:    i32[M, 3] sizes as they come, of each kind its own (`media.native_size`)
  """

  text_tokens: np.ndarray
  targets: np.ndarray
  item_offsets: np.ndarray
  item_kind: np.ndarray
  item_size: np.ndarray

  def __len__(self):
    return len(self.text_tokens)


def read_meta(path: str | os.PathLike) -> dict[str, Any]:
  """The meta.json of a dataset.

  Raises:
    ValueError: no dataset there, or one of another version.
  """
  file = files.on_disk(path, 'the dataset') / 'meta.json'
  try:
    meta = json.loads(file.read_text())
  except OSError as error:
    raise ValueError(f'no dataset at {path}: {file}: {error.strerror}') from None
  except ValueError as error:
    raise ValueError(f'{file} is damaged: {error}') from None
  if not isinstance(meta, dict) or meta.get('version') != VERSION:
    found = meta.get('version') if isinstance(meta, dict) else meta
    raise ValueError(f'{file}: version {found!r}; this code reads {VERSION}')
  return meta


class Dataset:
  """A split of a prepared dataset: `len(d)`, `d[i] -> Document`, `d.index`.

  Files are opened when first read, so it pickles and goes to worker processes.

  Args:
    path: the dataset's directory.
    split: one of its splits.
    tokenizer_hash: where given, the hash that the dataset's tokenizer must have
      (of the run that is being resumed, say).

  Raises:
    ValueError: no dataset, no such split, a missing or cut file, a tokenizer
      other than the one the data was prepared with.
  """

  def __init__(
    self, path: str | os.PathLike, split: str, tokenizer_hash: str | None = None
  ):
    self.path = pathlib.Path(path)
    self.split = split
    self.meta = read_meta(path)
    if split not in self.meta['splits']:
      have = ', '.join(self.meta['splits'])
      raise ValueError(f'{self.path} has no split {split!r}; there are: {have}')
    self._files = []
    for shard in self.meta['splits'][split]['shards']:
      file = self.path / split / shard['file']
      if not file.is_file():
        raise ValueError(f'{file} is missing')
      if file.stat().st_size != shard['bytes']:
        raise ValueError(f'{file} has {file.stat().st_size} bytes, not {shard["bytes"]}')
      self._files.append(f'{file}[0:{shard["documents"]}]')
    self.index = read_index(self.path / split / 'index.npz')
    if len(self.index) != self.meta['splits'][split]['documents']:
      raise ValueError(f'{self.path / split / "index.npz"} is of other documents')
    self.tokenizer = tokenizer_lib.load(self.path)
    for want, whose in (
      (self.meta['tokenizer_hash'], 'its meta.json names'),
      (tokenizer_hash, 'this run was begun with'),
    ):
      if want is not None and self.tokenizer.hash != want:
        raise ValueError(
          f'{self.path}: tokenizer {self.tokenizer.hash[:12]}, but {whose} {want[:12]}'
        )
    self._source = None
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self.index)

  def __getitem__(self, i: int) -> Document:
    """Document i.

    Raises:
      IndexError: no such document.
      BadDocument: its record can't be read.
    """
    i = int(i)
    if not 0 <= i < len(self):
      raise IndexError(f'document {i} of {len(self)}')
    with self._lock:
      if self._source is None:
        self._source = _open(self._files)
    try:
      return document_lib.decode(self._record(i))
    except BadDocument as error:
      where = f'{self.path / self.split}, document {i}'
      raise BadDocument(error.reason, f'{where}: {error.message}') from None

  def _record(self, i: int) -> bytes:
    try:
      return self._source[i]
    except Exception as error:  # whatever the reader finds wrong with the file
      raise BadDocument('unreadable_record', str(error)) from None

  def __getstate__(self):
    return {**self.__dict__, '_source': None, '_lock': None}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._lock = threading.Lock()


def _open(files):
  from array_record.python import array_record_data_source

  return array_record_data_source.ArrayRecordDataSource(files)


def read_index(path: pathlib.Path) -> Index:
  """The sidecar of a split.

  Raises:
    ValueError: it is missing or damaged.
  """
  try:
    with np.load(path, allow_pickle=False) as arrays:
      return Index(**{f.name: arrays[f.name] for f in dataclasses.fields(Index)})
  except OSError as error:
    raise ValueError(f'{path} is missing or damaged: {error}') from None
  except Exception as error:  # zip and npy readers raise all sorts on garbage
    raise ValueError(f'{path} is damaged: {error}') from None
