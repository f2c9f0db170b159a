"""Hosts come and go: the same global rows, bit for bit, over real processes."""

import collections
import hashlib
import json
import os
import pathlib
import subprocess
import sys

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
SCRIPT = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_elastic as t

if __name__ == '__main__':
  folder, job = sys.argv[2], json.loads(sys.argv[3])
  made = t.pipeline(folder, job['workers'])
  it = made.iterate(job['start'], job['index'], job['count'])
  for step in range(job['start'], job['stop']):
    print(json.dumps(t.rows_of(next(it).batch)), flush=True)
    if step == job['killed']:
      os.kill(os.getpid(), signal.SIGKILL)
  it.close()
"""


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


def pipeline(folder, workers=0):
  datasets = {name: Dataset(pathlib.Path(folder) / name, 'train') for name in SIZES}
  # The weights change on the way, in the middle of an epoch of both.
  data = Mixture(datasets, {'pairs': 1.0, 'notes': ((0, 1.0), (9, 0.5))})
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


def loaders(folder, script, count, start, stop, workers=0, killed=None):
  """The global rows of steps that `count` processes load at once."""
  running = []
  for index in range(count):
    job = dict(start=start, stop=stop, index=index, count=count, workers=workers)
    job['killed'] = killed if index == count - 1 else None
    here = str(pathlib.Path(__file__).parent)
    command = [sys.executable, str(script), here, str(folder), json.dumps(job)]
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    running.append(
      subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
      )
    )
  parts = []
  for process in running:
    out, errors = process.communicate(timeout=300)
    wanted = (0,) if killed is None else (0, -9)
    assert process.returncode in wanted, errors
    parts.append([json.loads(line) for line in out.splitlines()])
  return [[row for part in step for row in part] for step in zip(*parts)]


@pytest.mark.slow
def test_one_two_four_three_hosts_with_restarts_and_a_kill(folder, tmp_path):
  script = tmp_path / 'loader.py'
  script.write_text(SCRIPT)
  steps = 24
  it = pipeline(folder).iterate()
  want = [rows_of(next(it).batch) for _ in range(steps)]
  it.close()
  got = loaders(folder, script, 1, 0, 3)
  got += loaders(folder, script, 2, 3, 8, workers=1)
  # One of four is killed at step 10, so all begin there again, as three.
  got += loaders(folder, script, 4, 8, 16, killed=10)
  assert len(got) == 11
  got += loaders(folder, script, 3, 11, steps)
  assert json.loads(json.dumps(want)) == got
  # Every document of each source once in each of its epochs, over all hosts.
  times = collections.Counter(name for step in got for row in step for name in row[1])
  for name, size in SIZES.items():
    counts = [times[f'{name[0]}{i:03}'] for i in range(size)]
    assert min(counts) >= 2 and max(counts) - min(counts) <= 2
  counted = pipeline(folder).plan.before(steps * ROWS)
  assert sum(counted.values()) == times.total()


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
