"""Preparation in two steps, both done by several processes and both the same for any.

  pieces of the source    a b c | d e f | g h i |
                            |       |       |       PartJob: read, rules, lengths, write
  parts, kept in work/    000000  000001  000002    whole or not there
                            '---.---'       |       ShardJob: small ones copied together,
  files of the dataset    documents-00000  -00001             large ones linked

A part that is there is never made again. Images that are seen again (`unique_images`)
are found between the steps, by hashes in the order of the source, and taken out in the
second.
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mmjax.data import chat, delimiters, store, workers, writer
from mmjax.data import document as document_lib
from mmjax.data import rules as rules_lib
from mmjax.data.document import KINDS, BadDocument, Document, Image
from mmjax.data.settings import Settings
from mmjax.data.source import Source
from mmjax.data.store import Index
from mmjax.data.tokenizer import Tokenizer

MOST_PARTS = 4096  # if there are more pieces, several are one part
_COUNTS = ('words', 'characters', 'images', 'media')


@dataclasses.dataclass(frozen=True)
class PartJob:
  """Makes a part of some pieces: call it with ((number, pieces), tick).

  Returns what `read_part` does.
  """

  source: Source
  directory: pathlib.Path
  tokenizer: Tokenizer
  settings: Settings

  def __call__(self, task: tuple[int, Sequence[str]], tick: Callable[[int], None]):
    number, pieces = task
    given = self.settings
    fresh = self.directory / f'.{number:06d}.{os.getpid()}'
    part = writer.Part(fresh, self.tokenizer, given.max_pixels, given.shard_bytes)
    made = _Made(self, part)
    try:
      for piece in pieces:
        try:
          for split, document in self.source.read(piece, given.splits):
            made.take(split, document)
            tick(1)
        except OSError as error:
          raise OSError(f'piece {piece!r}: {error}') from error
      made.close(fresh)
      os.rename(fresh, self.directory / f'{number:06d}')
    except BaseException:
      part.abandon()
      shutil.rmtree(fresh, ignore_errors=True)
      raise
    return read_part(self.directory, number)


class _Made:
  """A part in the making."""

  def __init__(self, job: PartJob, part: writer.Part):
    self._job = job
    self._part = part
    self._removed = writer.Tally()
    self._records = self._bad = 0
    self._notes = collections.defaultdict(list)
    self._places = collections.Counter()

  def take(self, split: str, document: Document | BadDocument):
    self._records += 1
    name = ''
    try:
      if isinstance(document, BadDocument):
        raise document
      name = document.id
      given = self._job.settings
      document, out = given.rules.apply(document, given.scorer)
      if given.chat_template:
        document = chat.apply(document, given.chat_template)
      if given.delimiters:
        document = delimiters.apply(document, given.delimiters)
      self._part.add(split, document)
      for error in out:
        self._removed.add(error, name)
      if given.rules.unique_images:
        self._note(split, document)
    except BadDocument as error:
      self._part.drops.add(error, name)
      asked = rules_lib.REASONS | self._job.source.left_out
      self._bad += error.reason not in asked

  def _note(self, split, document):
    """What must be known to find images that were seen before."""
    notes = self._notes
    images = [span for span in document.spans if isinstance(span, Image)]
    notes['split'].append(split)
    notes['place'].append(self._places[split])
    self._places[split] += 1
    notes['shortens'].append(rules_lib.can_do_without(document))
    for name, count in rules_lib.counts_of(document).items():
      notes[name].append(count)
    notes['hashes'] += [_hash(image) for image in images]

  def close(self, directory: pathlib.Path):
    splits = self._part.close()
    if self._notes:
      with open(directory / 'notes.npz', 'wb') as file:
        np.savez(file, **{k: np.array(v, _dtype(k)) for k, v in self._notes.items()})
    with open(directory / 'part.json', 'w') as file:
      tree = {
        'splits': splits,
        'dropped': self._part.drops.tree,
        'removed': self._removed.tree,
        'records': self._records,
        'bad': self._bad,
      }
      json.dump(tree, file)
      file.flush()
      os.fsync(file.fileno())


def _hash(image: Image) -> int:
  content = image.content
  if not isinstance(content, bytes):
    content = repr(content.shape).encode() + content.tobytes()
  return int.from_bytes(hashlib.sha256(content).digest()[:8])


def _dtype(name: str):
  return {'hashes': np.uint64, 'split': None, 'shortens': bool}.get(name, np.int64)


def read_part(directory: pathlib.Path, number: int) -> dict[str, Any]:
  """Splits, records, bad ones, dropped and removed by reason, of a part."""
  return json.loads((directory / f'{number:06d}' / 'part.json').read_text())


def done(directory: pathlib.Path) -> list[int]:
  """The numbers of the parts that are there; clears what isn't whole."""
  found = []
  for path in directory.iterdir():
    if path.name.startswith('.'):
      shutil.rmtree(path, ignore_errors=True)
    elif path.name.isdecimal():
      found.append(int(path.name))
  return sorted(found)


def group(pieces: Sequence[str]) -> list[tuple[int, list[str]]]:
  """(number, pieces) of each part."""
  size = -(-len(pieces) // MOST_PARTS) or 1
  return [(i // size, list(pieces[i : i + size])) for i in range(0, len(pieces), size)]


@dataclasses.dataclass(frozen=True)
class _Input:
  """A file of a part: documents [first, first + documents) of its split.

  repeated: by document of the file, which of its images were seen before.
  """

  directory: pathlib.Path
  file: str
  first: int
  documents: int
  bytes: int
  repeated: dict[int, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class ShardJob:
  """Makes a file of the dataset: call it with ((split, number, inputs), tick).

  Returns ({file, documents, bytes}, Index, spans taken out, dropped, removed).
  """

  new: pathlib.Path
  tokenizer: Tokenizer
  max_pixels: int
  rules: rules_lib.Rules

  def __call__(self, task: tuple[str, int, Sequence[_Input]], tick):
    split, number, inputs = task
    name = f'documents-{number:05d}.array_record'
    if len(inputs) == 1 and not inputs[0].repeated:
      (only,) = inputs
      _link(only.directory / only.file, self.new / split / name)
      shard = {'file': name, 'documents': only.documents, 'bytes': only.bytes}
      return shard, _index_of(only), 0, {}, {}
    made = writer.SplitWriter(self.new / split, 2**62, number)
    dropped, removed, gone = writer.Tally(), writer.Tally(), 0
    try:
      for one in inputs:
        for i, (record, lengths) in enumerate(_records(one)):
          if i not in one.repeated:
            made.add(record, 0, lengths)
            continue
          document = document_lib.decode(record)
          gone += len(document.spans)
          try:
            document, out = self._shorten(document, one.repeated[i])
            lengths = writer.measure(document, self.tokenizer, self.max_pixels)
          except BadDocument as error:
            dropped.add(error, document.id)
            continue
          for error in out:
            removed.add(error, document.id)
          gone -= len(document.spans)
          made.add(document_lib.encode(document), 0, lengths)
      shards = made.close()
    except BaseException:
      made.abandon()
      raise
    shard = shards[0] if shards else None
    return shard, made.index(), gone, dropped.tree, removed.tree

  def _shorten(self, document, repeated):
    images = [i for i, s in enumerate(document.spans) if isinstance(s, Image)]
    why = ('image_repeated', 'seen before in the source')
    document, out = self.rules.take_out(document, {images[k]: why for k in repeated})
    self.rules.check(document, True)
    return document, out


def _link(old: pathlib.Path, new: pathlib.Path):
  try:
    os.link(old, new)
  except OSError:  # a file system without links
    shutil.copyfile(old, new)
    with open(new, 'rb') as file:
      os.fsync(file.fileno())


def _index_of(one: _Input) -> Index:
  index = store.read_index(one.directory / 'index.npz')
  rows = slice(one.first, one.first + one.documents)
  offsets = index.item_offsets[one.first : one.first + one.documents + 1]
  items = slice(offsets[0], offsets[-1])
  return Index(
    index.text_tokens[rows],
    index.targets[rows],
    offsets - offsets[0],
    index.item_kind[items],
    index.item_size[items],
  )


def _records(one: _Input) -> Iterator[tuple[bytes, tuple]]:
  from array_record.python import array_record_module

  index = _index_of(one)
  reader = array_record_module.ArrayRecordReader(str(one.directory / one.file))
  try:
    for i in range(one.documents):
      items = slice(index.item_offsets[i], index.item_offsets[i + 1])
      pairs = zip(index.item_kind[items].tolist(), index.item_size[items].tolist())
      lengths = int(index.text_tokens[i]), int(index.targets[i]), list(pairs)
      yield reader.read([i])[0], lengths
  finally:
    reader.close()


def assemble(
  directory: pathlib.Path,
  job: ShardJob,
  shard_bytes: int,
  processes: int,
) -> tuple[dict[str, dict], dict[str, Index], writer.Tally, writer.Tally]:
  """Makes the dataset of all parts: (splits, indexes, dropped, removed)."""
  parts = {number: read_part(directory, number) for number in done(directory)}
  dropped, removed = writer.Tally(), writer.Tally()
  for part in parts.values():
    dropped.merge(part['dropped'])
    removed.merge(part['removed'])
  repeated = _repeated(directory, parts, job.rules) if job.rules.unique_images else {}
  tasks = []
  for split in dict.fromkeys(name for part in parts.values() for name in part['splits']):
    (job.new / split).mkdir(exist_ok=True)
    groups = _shards(list(_inputs(directory, parts, split, repeated)), shard_bytes)
    tasks += [(split, number, inputs) for number, inputs in enumerate(groups)]
  results = {}
  workers.run(
    job, tasks, processes, lambda task, result: results.update({task[:2]: result})
  )

  made, indexes = {}, {}
  for split in dict.fromkeys(task[0] for task in tasks):
    shards, kept, gone, *tallies = zip(*(results[t[:2]] for t in tasks if t[0] == split))
    for drops, takes in zip(*tallies):
      dropped.merge(drops)
      removed.merge(takes)
    index = indexes[split] = concatenate(kept)
    if not len(index):
      del indexes[split]
      shutil.rmtree(job.new / split)
      continue
    writer.save_index(job.new / split, index)
    spans = sum(
      p['splits'][split]['spans'] for p in parts.values() if split in p['splits']
    )
    kinds = np.bincount(index.item_kind, minlength=len(KINDS)).tolist()
    made[split] = {
      'documents': len(index),
      'spans': spans - sum(gone),
      'text_tokens': int(index.text_tokens.sum(dtype=np.int64)),
      'targets': int(index.targets.sum(dtype=np.int64)),
      **{kind: n for kind, n in zip(KINDS, kinds) if n},
      'shards': [shard for shard in shards if shard],
    }
  return made, indexes, dropped, removed


def concatenate(indexes: Sequence[Index]) -> Index:
  """The index of documents that stand one after the other."""
  counts = np.concatenate([np.diff(index.item_offsets) for index in indexes])
  together = {
    field.name: np.concatenate([getattr(index, field.name) for index in indexes])
    for field in dataclasses.fields(Index)
  }
  together['item_offsets'] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
  return Index(**together)


def _inputs(directory, parts, split, repeated) -> Iterable[_Input]:
  for number, part in parts.items():
    first = 0
    again = repeated.get((number, split), {})
    for shard in part['splits'].get(split, {'shards': ()})['shards']:
      end = first + shard['documents']
      here = {i - first: ks for i, ks in again.items() if first <= i < end}
      path = directory / f'{number:06d}' / split
      yield _Input(path, shard['file'], first, shard['documents'], shard['bytes'], here)
      first = end


def _shards(inputs: list[_Input], shard_bytes: int) -> list[list[_Input]]:
  """Files that stand side by side, together up to about `shard_bytes`."""
  groups, size = [], 0
  for one in inputs:
    if not groups or size + one.bytes > shard_bytes:
      groups.append([])
      size = 0
    groups[-1].append(one)
    size += one.bytes
  return groups


def _repeated(directory, parts, rules) -> dict[tuple[int, str], dict[int, tuple]]:
  """By part and split, and by document: its images that a kept one has had before."""
  seen, found = set(), collections.defaultdict(dict)
  for number in parts:
    file = directory / f'{number:06d}' / 'notes.npz'
    if not file.exists():
      continue
    with np.load(file, allow_pickle=False) as arrays:
      notes = {name: array.tolist() for name, array in arrays.items()}
    hashes = iter(notes['hashes'])
    for i, split in enumerate(notes['split']):
      counts = {name: notes[name][i] for name in _COUNTS}
      fresh, again = set(), []
      for k in range(counts['images']):
        key = next(hashes)
        if key in seen or key in fresh:
          again.append(k)
        fresh.add(key)
      if again:
        found[number, split][notes['place'][i]] = tuple(again)
        counts['images'] -= len(again)
        counts['media'] -= len(again)
        if not notes['shortens'][i]:
          continue
        try:
          rules.check_counts(counts, True)
        except BadDocument:
          continue
      seen |= fresh
  return found
