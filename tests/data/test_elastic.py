"""Hosts come and go: the same global rows, bit for bit, over real processes."""

import collections
import hashlib
import json
import multiprocessing
import os
import signal

import jax
import numpy as np
import pytest

from mmjax.batch import BankBudget, Budget
from mmjax.data.document import Document, Image, Text
from mmjax.data.media import ImageRule
from mmjax.data.mixture import Mixture
from mmjax.data.pipeline import Pipeline
from mmjax.data.store import Dataset
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.data.writer import Writer

BUDGET = Budget(64, 40, {'image': BankBudget(24, 4, 12)})
ROWS = 12  # divides over 1, 2, 3 and 4
SIZES = {'pairs': 90, 'notes': 61}
# Processes of their own, forked from one that has imported everything.
FRESH = multiprocessing.get_context('forkserver')
FRESH.set_forkserver_preload([__name__, 'grain'])


def slots(item):
  return item.grid


def document(name, i):
  rng = np.random.default_rng([i, len(name)])
  text = (Text(f'{name[0]}{i:03}', True), Text('.' * int(rng.integers(0, 20))))
  if name == 'notes':
    return Document(text)
  pixels = rng.integers(0, 256, (*rng.integers(1, 7, 2), 3), np.uint8)
  return Document((Image(pixels), *text))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('elastic')
  for name, size in SIZES.items():
    with Writer(folder / name, ByteTokenizer(), {}) as writer:
      for i in range(size):
        writer.add('train', document(name, i))
  return folder


def pipeline(folder, workers=0, only=None):
  datasets = {name: Dataset(folder / name, 'train') for name in SIZES}
  # The weights change on the way, in the middle of an epoch of both.
  weights = {'pairs': 1.0, 'notes': ((0, 1.0), (7, 0.5))}
  data = datasets[only] if only else Mixture(datasets, weights)
  rules = {'image': ImageRule(2, 'native', max_patches=9)}
  return Pipeline(
    data, budget=BUDGET, rows=ROWS, rules=rules, slots=slots, seed=3, workers=workers
  )


def rows_of(batch):
  """Of each row, the hash of all its arrays and the documents in it."""
  out = []
  for b in range(len(batch.stream.tokens)):
    sha, names = hashlib.sha256(), []
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
      sha.update(f'{path} {leaf.dtype} {leaf.shape[1:]}'.encode())
      sha.update(np.ascontiguousarray(leaf[b]).tobytes())
    tokens, segments = batch.stream.tokens[b], batch.stream.segment_ids[b]
    for segment in range(1, segments.max() + 1):
      here = tokens[(segments == segment) & (tokens >= 0)][:4]
      names.append(bytes(here.astype(np.uint8)).decode())
    out.append([sha.hexdigest(), names])
  return out


def load(folder, out, start, stop, index, count, workers, killed):
  """One host: a line per step, each written before the next is loaded."""
  it = pipeline(folder, workers).iterate(start, index, count)
  with open(out, 'w') as file:
    for step in range(start, stop):
      print(json.dumps(rows_of(next(it).batch)), file=file, flush=True)
      if step == killed:
        os.kill(os.getpid(), signal.SIGKILL)
  it.close()


def hosts(folder, outs, count, start, stop, workers=0, killed=None):
  """The global rows of steps that `count` hosts load at once; the last may be killed."""
  running = []
  for index in range(count):
    last = index == count - 1
    out = outs / f'{start}-{index}'
    of = (
      folder,
      out,
      start,
      stop,
      index,
      count,
      *((workers, killed) if last else (0, None)),
    )
    running.append((FRESH.Process(target=load, args=of), out))
    running[-1][0].start()
  parts = []
  for process, out in running:
    process.join(300)
    assert process.exitcode == (0 if killed is None or out != running[-1][1] else -9)
    parts.append([json.loads(line) for line in out.read_text().splitlines()])
  return [[row for part in step for row in part] for step in zip(*parts)]


def test_one_two_four_three_hosts_with_restarts_and_a_kill(folder, tmp_path):
  steps = 16
  it = pipeline(folder).iterate()
  want = [rows_of(next(it).batch) for _ in range(steps)]
  it.close()
  got = hosts(folder, tmp_path, 1, 0, 2)
  got += hosts(folder, tmp_path, 2, 2, 6, workers=1)
  # One of four is killed after step 8, so all begin behind it, as three.
  got += hosts(folder, tmp_path, 4, 6, 13, killed=8)
  assert len(got) == 9
  got += hosts(folder, tmp_path, 3, 9, steps)
  assert got == want
  # Each document in its turn, over all hosts, restarts, and a change of the weights.
  times = collections.Counter(name for step in got for row in step for name in row[1])
  for name, size in SIZES.items():
    counts = [times[f'{name[0]}{i:03}'] for i in range(size)]
    # An interval under 1 for either weight, and the part of a window they meet in.
    assert min(counts) >= 2 and max(counts) - min(counts) <= 3
  counted = pipeline(folder).plan.before(steps * ROWS)
  assert sum(counted.values()) == times.total()


def test_every_document_once_an_epoch_over_all_hosts(folder):
  """Epochs end in the middle of a step, and of a host's rows."""
  made = pipeline(folder, only='pairs')
  rows, epochs = made.plan.num_rows, 3
  assert rows % (ROWS // 2)
  running = [made.iterate(0, index, 2) for index in range(2)]
  names = []
  for _ in range(-(-epochs * rows // ROWS)):
    names += [row[1] for it in running for row in rows_of(next(it).batch)]
  for it in running:
    it.close()
  for epoch in range(epochs):
    here = [name for row in names[epoch * rows : (epoch + 1) * rows] for name in row]
    assert sorted(here) == [f'p{i:03}' for i in range(SIZES['pairs'])]


def test_documents_are_found_again_in_their_batches(folder):
  """Document -> batch -> document: its tokens and its patches, at its segment."""
  made = pipeline(folder)
  tokenizer, rule = ByteTokenizer(), ImageRule(2, 'native', max_patches=9)
  it, seen = made.iterate(), set()
  for step in range(8):
    batch = next(it).batch
    for b in range(ROWS):
      stream, bank = batch.stream, batch.bank['image']
      for segment, n in enumerate(made.plan.row(step * ROWS + b), 1):
        source = int(n >= SIZES['pairs'])
        name, i = list(SIZES)[source], n - source * SIZES['pairs']
        *image, trained, text = document(name, i).spans
        here = np.flatnonzero(stream.segment_ids[b] == segment)
        assert (np.diff(here) == 1).all()
        want = [*tokenizer.encode(trained.text), tokenizer.end_id]
        want += tokenizer.encode(text.text)
        tokens = stream.tokens[b][here]
        assert tokens[tokens >= 0].tolist() == want
        items = np.flatnonzero(bank.item_segments[b] == segment) + 1
        assert len(items) == len(image)
        for span in image:
          patches = rule.patches(span.content)
          mine = np.flatnonzero(bank.items[b] == items[0])
          np.testing.assert_array_equal(bank.values[b][mine], patches)
          # Slots of media point at the patches of their own document, in order.
          assert stream.source[b][here[: len(mine)]].tolist() == list(
            range(*stream.source[b][here[[0, len(mine) - 1]]] + [0, 1])
          )
        seen.add(n)
  it.close()
  assert len(seen) > 100
