"""The pipeline: the same batches however they are loaded, bad documents counted."""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mmjax.batch import BankBudget, Budget
from mmjax.data.document import BadDocument, Document, Image, Text
from mmjax.data.media import ImageRule
from mmjax.data.pipeline import Pipeline, TooManyBadDocuments
from mmjax.data.store import Dataset
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.data.writer import Writer

BUDGET = Budget(64, 24, {'image': BankBudget(24, 4, 12)})
N = 50
ROWS = 4


def slots(item):
  return item.grid


def document(i):
  """Image first, then prompt and answer; each document has its own words and sizes."""
  rng = np.random.default_rng(i)
  pixels = rng.integers(0, 256, (*rng.integers(1, 7, 2), 3), np.uint8)
  answer = Text(f'a{i}'[: rng.integers(1, 4)], trained=True)
  return Document((Image(pixels), Text(f'{i:02}' + 'q' * rng.integers(0, 9)), answer))


def prepare(path):
  with Writer(path, ByteTokenizer(), {'source': 'test'}) as writer:
    for i in range(N):
      writer.add('train', document(i))
  return path


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  return prepare(tmp_path_factory.mktemp('pipeline') / 'd')


def pipeline(dataset, **options):
  if isinstance(dataset, str | os.PathLike):
    dataset = Dataset(dataset, 'train')
  options = {'budget': BUDGET, 'rows': ROWS, 'slots': slots, 'seed': 5} | options
  return Pipeline(
    dataset, rules={'image': ImageRule(2, 'native', max_patches=9)}, **options
  )


def steps(pipeline, n, start=0, index=0, count=1):
  it = pipeline.iterate(start, index, count)
  try:
    return [next(it) for _ in range(n)]
  finally:
    it.close()


def digest(batch):
  """sha256 of a batch: names, types, shapes and bytes of all its arrays."""
  sha = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
    sha.update(f'{path} {leaf.dtype} {leaf.shape}'.encode())
    sha.update(np.ascontiguousarray(leaf).tobytes())
  return sha.hexdigest()


def assembled(parts):
  """Global batches from the local ones of each process."""
  return [
    jax.tree.map(lambda *leaves: np.concatenate(leaves), *(p.batch for p in step))
    for step in zip(*parts, strict=True)
  ]


def texts(batch):
  """The first two bytes of each document's text, which is its number."""
  out = []
  for tokens, segments in zip(batch.stream.tokens, batch.stream.segment_ids):
    for segment in range(1, segments.max() + 1):
      here = tokens[(segments == segment) & (tokens >= 0)]
      out.append(int(bytes(here[:2].astype(np.uint8))))
  return out


@pytest.fixture(scope='module')
def chain(path):
  """Digests of 12 steps, over more than an epoch, by one process without workers."""
  made = pipeline(path)
  assert 2 < made.steps_per_epoch < 8
  assert made.plan.num_rows % ROWS  # so that steps straddle epochs
  return [digest(x.batch) for x in steps(made, 12)]


@pytest.mark.parametrize('count', [1, 2, 4])
@pytest.mark.parametrize('start', [0, 7])
def test_the_global_batches_are_the_same_for_any_number_of_processes(
  path, chain, count, start
):
  parts = [steps(pipeline(path), 12 - start, start, h, count) for h in range(count)]
  assert [digest(batch) for batch in assembled(parts)] == chain[start:]


def test_steps_differ(chain):
  assert len(set(chain)) == len(chain)


@pytest.mark.slow
@pytest.mark.parametrize('workers', [1, 2])
def test_worker_processes_change_nothing(path, chain, workers):
  got = steps(pipeline(path, workers=workers), 5, start=7)
  assert [digest(x.batch) for x in got] == chain[7:]
  assert all(type(leaf) is np.ndarray for x in got for leaf in jax.tree.leaves(x.batch))
  assert [x.stats for x in got] == [x.stats for x in steps(pipeline(path), 5, start=7)]


def test_threads_change_nothing(path, chain):
  got = steps(pipeline(path, threads=3), 12)
  assert [digest(x.batch) for x in got] == chain


@pytest.mark.slow
def test_steps_of_workers_stay_as_they_are_when_others_follow_and_after_the_end(path):
  it = pipeline(path, workers=1).iterate()
  first = next(it)
  before = digest(first.batch)
  for _ in range(10):  # more than there are in queues
    next(it)
  it.close()
  assert digest(first.batch) == before
  assert all(leaf.flags.writeable for leaf in jax.tree.leaves(first.batch))


@pytest.mark.slow
def test_blocks_of_workers_are_used_again_but_not_while_someone_has_them(path, chain):
  """Batches are kept, altered, placed on devices and dropped in all sorts of ways."""
  made = pipeline(path, workers=2)
  it = made.iterate()
  rng, kept, places = np.random.default_rng(0), {}, set()
  for step in range(40):
    loaded = next(it).batch
    places.add(loaded.stream.tokens.ctypes.data)
    if step < len(chain):
      assert digest(loaded) == chain[step]
    want = digest(loaded)
    for leaf in jax.tree.leaves(loaded) if step % 3 == 0 else ():
      leaf.fill(3)  # it is the consumer's
    if step % 3 == 1:
      kept[step] = jax.device_put(loaded), want
    elif step % 3 == 2:
      kept[step] = loaded, want
    while len(kept) > (3, 30)[10 < step < 30]:  # for some time, more than the ring has
      batch, want = kept.pop(int(rng.choice(list(kept))))
      assert digest(batch) == want
  assert len(places) < 40  # some were used again
  it.close()
  assert all(digest(batch) == want for batch, want in kept.values())


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
sys.path.insert(0, sys.argv[1])
import test_pipeline as t

if __name__ == '__main__':
  import json
  made = t.pipeline(sys.argv[2], workers=int(sys.argv[4]))
  it = made.iterate(3, int(sys.argv[3]), 2)
  print(json.dumps([next(it).batch.stream.tokens.tolist() for _ in range(3)]), flush=True)
  if int(sys.argv[4]):
    import multiprocessing, time
    started = multiprocessing.active_children()
    print(json.dumps([p.pid for p in started]), flush=True)
    sys.stdin.readline()
    for _ in range(20):  # more than there are in queues
      next(it)
    print('more', flush=True)
    time.sleep(60)
"""


def launch(tmp_path, data, index, workers=0):
  script = tmp_path / 'one_process.py'
  script.write_text(SCRIPT)
  here = str(pathlib.Path(__file__).parent)
  return subprocess.Popen(
    [sys.executable, str(script), here, str(data), str(index), str(workers)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
def test_two_real_processes_make_the_same_batches(path, tmp_path):
  running = [launch(tmp_path, path, h) for h in range(2)]
  out = []
  for process in running:
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert not stderr
    out.append(json.loads(stdout))
  want = [x.batch.stream.tokens.tolist() for x in steps(pipeline(path), 3, start=3)]
  assert [a + b for a, b in zip(*out)] == want


@pytest.mark.slow
def test_workers_outlive_ctrl_c_but_not_their_parent(path, tmp_path):
  process = launch(tmp_path, path, 0, workers=2)
  try:
    process.stdout.readline()
    pids = json.loads(process.stdout.readline())
    assert len(pids) == 2
    for pid in pids:
      os.kill(pid, signal.SIGINT)
    time.sleep(0.5)
    process.stdin.write('go on\n')
    process.stdin.flush()
    assert process.stdout.readline() == 'more\n'
    assert all(alive(pid) for pid in pids)
  finally:
    process.send_signal(signal.SIGKILL)
  _, stderr = process.communicate(timeout=60)
  assert 'leaked shared_memory' not in stderr
  deadline = time.monotonic() + 20
  while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
    time.sleep(0.1)
  assert not [pid for pid in pids if alive(pid)]


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_and_leaves_nothing(path, tmp_path):
  process = launch(tmp_path, path, 0, workers=2)
  process.stdout.readline()
  os.kill(json.loads(process.stdout.readline())[1], signal.SIGKILL)
  _, stderr = process.communicate('go on\n', timeout=60)
  assert process.returncode == 1
  assert 'Worker process was terminated unexpectedly with exit code -9' in stderr
  assert 'leaked' not in stderr and 'Exception ignored' not in stderr


def alive(pid):
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().rsplit(')')[1].split()[0] != 'Z'
  except (FileNotFoundError, ProcessLookupError):
    return False


def test_every_document_once_an_epoch(path):
  made = pipeline(path, rows=1)
  epochs = 2
  loaded = steps(made, epochs * made.plan.num_rows)
  for epoch in range(epochs):
    part = loaded[epoch * made.plan.num_rows :][: made.plan.num_rows]
    assert sorted(i for x in part for i in texts(x.batch)) == list(range(N))
  assert loaded[-1].stats['epoch'] == epochs


def test_a_step_over_the_end_of_an_epoch_is_the_rows_on_either_side(path):
  epoch = pipeline(path).plan.num_rows
  rows = next(n for n in range(ROWS, epoch) if epoch % n > 1)
  made = pipeline(path, rows=rows)
  step = epoch // rows  # the first that straddles
  (loaded,) = steps(made, 1, start=step)
  singles = steps(pipeline(path, rows=1), rows, start=step * rows)
  (joined,) = assembled([[x] for x in singles])
  assert digest(joined) == digest(loaded.batch)
  assert int(singles[0].stats['epoch']) == 0
  assert int(singles[-1].stats['epoch']) == 1


def test_stats_against_a_plain_count(path):
  made = pipeline(path)
  for step, loaded in enumerate(steps(made, 6)):
    numbers = texts(loaded.batch)
    patches = sum(int(np.prod(rule_grid(document(i)))) for i in numbers)
    tokens = patches
    targets = 0
    for i in numbers:
      _, prompt, answer = document(i).spans
      tokens += len(prompt.text) + len(answer.text) + 1
      targets += len(answer.text) + 1
    assert loaded.stats == {
      'documents': len(numbers),
      'tokens': tokens,
      'targets': targets,
      'fill/stream': pytest.approx(tokens / (ROWS * 64)),
      'fill/image': pytest.approx(patches / (ROWS * 24)),
      'epoch': pytest.approx((step + 1) * ROWS / made.plan.num_rows),
    }


def rule_grid(document):
  return ImageRule(2, 'native', max_patches=9).grid(*document.spans[0].content.shape[:2])


def test_summary(path):
  text = pipeline(path, budget=dataclasses.replace(BUDGET, stream=20)).summary()
  made = pipeline(path, budget=dataclasses.replace(BUDGET, stream=20))
  dropped = made.plan.dropped['too_long_stream']
  assert f'{N - dropped} documents in {made.plan.num_rows} rows' in text
  assert f'stream {made.plan.fill["stream"]:.1%}' in text
  assert f'dropped: {dropped} (too_long_stream {dropped})' in text
  assert pipeline(path).summary().endswith('dropped: 0')


class Damaged:
  """A dataset of which some documents can't be read, or aren't what they were."""

  def __init__(self, path, damage):
    self.dataset = Dataset(path, 'train')
    self.index = self.dataset.index
    self.tokenizer = self.dataset.tokenizer
    self.damage = damage

  def __getitem__(self, i):
    damage = self.damage.get(i)
    if damage == 'record':
      raise BadDocument('unreadable_record', f'document {i}')
    made = self.dataset[i]
    if damage == 'image':
      return dataclasses.replace(made, spans=(Image(b'no image'), *made.spans[1:]))
    if damage == 'longer':
      return dataclasses.replace(made, spans=(*made.spans, Text('and so on')))
    return made


def test_bad_documents_are_left_out_and_counted(path, caplog):
  damage = {3: 'record', 4: 'image', 5: 'image', 20: 'longer'}
  made = pipeline(Damaged(path, damage), max_bad_share=0.5, rows=1)
  with caplog.at_level(logging.WARNING, logger='mmjax.data.pipeline'):
    loaded = steps(made, 2 * made.plan.num_rows)
  whole = steps(pipeline(path, rows=1), 2 * made.plan.num_rows)
  for x, y in zip(loaded, whole):
    assert texts(x.batch) == [i for i in texts(y.batch) if i not in damage]
    assert x.stats['documents'] == len(texts(x.batch))
  counts = {}
  for x in loaded:
    for name, value in x.stats.items():
      if name.startswith('bad/'):
        counts[name] = counts.get(name, 0) + value
  assert counts == {
    'bad/unreadable_record': 2,
    'bad/not_image': 4,
    'bad/differs_from_index': 2,
  }
  # Each reason once, with its document.
  lines = [r.getMessage() for r in caplog.records]
  assert len(lines) == 3
  assert any('bad document 3 left out: unreadable_record: document 3' in x for x in lines)
  assert any('bad document 20 left out: differs_from_index' in x for x in lines)


def test_too_many_bad_documents_stop_the_run(path):
  damage = {i: 'record' if i % 2 else 'image' for i in range(6)}  # 12 %
  made = pipeline(Damaged(path, damage), max_bad_share=0.1)
  it = made.iterate()
  with pytest.raises(
    TooManyBadDocuments,
    match=r'1[1-9] of the last \d+ documents are bad, over data.max_bad_share = 10.00%: '
    r'(not_image|unreadable_record) \d, (not_image|unreadable_record) \d$',
  ):
    for _ in range(100):
      next(it)
  with pytest.raises(ValueError, match='closed'):
    next(it)


def test_a_share_below_the_limit_goes_on(path):
  made = pipeline(Damaged(path, {7: 'record'}), max_bad_share=0.03)
  loaded = steps(made, int(20 * made.steps_per_epoch))
  assert sum(x.stats.get('bad/unreadable_record', 0) for x in loaded) >= 19


def test_a_late_burst_of_bad_documents_is_not_diluted(path, monkeypatch):
  monkeypatch.setattr('mmjax.data.pipeline._WINDOW', 50)
  dataset = Damaged(path, {})
  it = pipeline(dataset, max_bad_share=0.3).iterate()
  for _ in range(60):
    next(it)
  dataset.damage.update(dict.fromkeys(range(N), 'record'))
  with pytest.raises(TooManyBadDocuments, match='unreadable_record'):
    for _ in range(20):
      next(it)
  it.close()


def test_no_bad_document_is_allowed_at_zero(path):
  made = pipeline(Damaged(path, {7: 'record'}), max_bad_share=0.0)
  it = made.iterate()
  with pytest.raises(TooManyBadDocuments, match='1 of the last'):
    for _ in range(int(made.steps_per_epoch) + 1):
      next(it)


def test_image_attention_reaches_the_examples(path):
  (block,) = steps(pipeline(path), 1)
  (causal,) = steps(pipeline(path, image_attention='causal'), 1)
  assert (causal.batch.stream.order.max() > block.batch.stream.order.max()).all()


def test_wrong_numbers_are_refused(path):
  with pytest.raises(ValueError, match='rows = 4 does not divide over 3 processes'):
    pipeline(path).iterate(0, 0, 3)
  for args in ((-1,), (0, 2, 2), (0, -1, 2)):
    with pytest.raises(ValueError, match='no such'):
      pipeline(path).iterate(*args)
  for options in ({'rows': 0}, {'workers': -1}, {'threads': 0}, {'max_bad_share': 1.5}):
    with pytest.raises(ValueError, match='pipeline: rows='):
      pipeline(path, **options)
  with pytest.raises(ValueError, match='none of 50 documents'):
    pipeline(path, budget=dataclasses.replace(BUDGET, stream=2))


def test_augmentation_is_by_epoch_and_the_same_after_a_restart(path):
  made = pipeline(path, augment=('mirror',), rows=1)
  epoch = made.plan.num_rows
  straight = made.iterate()
  images = [next(straight).batch.bank['image'].values for _ in range(2 * epoch)]
  again = pipeline(path, augment=('mirror',), rows=1).iterate(epoch + 3)
  np.testing.assert_array_equal(next(again).batch.bank['image'].values, images[epoch + 3])
  plain = pipeline(path, rows=1).iterate()
  same = [np.array_equal(next(plain).batch.bank['image'].values, x) for x in images]
  assert not all(same[:epoch]) and not all(same[epoch:])
  straight.close(), again.close(), plain.close()
