"""Preparation by several processes: the same for any number, and after any kill."""

import json
import os
import pathlib
import pty
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest

from mmjax.data import parts, prepare, workers
from mmjax.data.store import Dataset

# A source that is slow, says what it reads, and can do worse; as a user would write it.
SLOW = """
import dataclasses, os, pathlib, signal, sys, time
from mmjax.data import prepare, sources
from mmjax.data import jsonl

jsonl._LINES = 20

@dataclasses.dataclass(frozen=True)
class Slow(jsonl.Jsonl):
  seconds: float = 0.0

  def read(self, piece, splits=None):
    log = pathlib.Path(self.file).parent / 'log'
    with open(log, 'a') as file:
      file.write(piece + '\\n')
    for i, record in enumerate(super().read(piece, splits)):
      time.sleep(self.seconds)
      yield record
    with open(log, 'a') as file:
      file.write('end ' + piece + '\\n')

sources.SOURCES['slow'] = Slow

if __name__ == '__main__':
  sys.exit(prepare.main(sys.argv[1:]))
"""
PIECES, EACH = 12, 20


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """240 lines in 12 pieces, one bad, a few with an image; test ones in between."""
  monkeypatch.setattr('mmjax.data.jsonl._LINES', EACH)
  rng = np.random.default_rng(0)
  for i in range(6):
    pixels = rng.integers(0, 256, (8, 8 + i, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / f'{i}.png')
  with open(tmp_path / 'd.jsonl', 'w') as file:
    for i in range(PIECES * EACH):
      spans = [{'text': f'{"word " * int(rng.integers(1, 9))}{i}', 'trained': True}]
      if i % 3 == 0:
        spans.insert(0, {'image': f'{rng.integers(6)}.png'})
      split = 'test' if i % 7 == 0 else 'train'
      bad = i == 50
      file.write(
        '{"spans"\n' if bad else json.dumps(dict(spans=spans, split=split)) + '\n'
      )
  (tmp_path / 'slow.py').write_text(SLOW)
  return tmp_path


def command(folder, out, seconds=0.0, count=2, tokenizer='bpe:300'):
  return [
    sys.executable,
    str(folder / 'slow.py'),
    f'slow:{folder / "d.jsonl"}',
    f'--slow-seconds={seconds}',
    f'--out={folder / out}',
    f'--workers={count}',
    f'--tokenizer={tokenizer}',
  ]


def call(*args, **options):
  done = subprocess.run(
    command(*args, **options), capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  return done


def content(path):
  """Every file of a dataset, by its name."""
  files = sorted(p for p in path.rglob('*') if p.is_file())
  return {str(p.relative_to(path)): p.read_bytes() for p in files}


def here(folder, out, **options):
  source = f'jsonl:{folder / "d.jsonl"}'
  return prepare.prepare(source, folder / out, progress=False, **options)


def test_any_number_of_workers_gives_the_same_bytes(folder):
  rules = {'unique_images': True, 'place_images': 'previous', 'min_words': 3}
  for count in (0, 1, 3):
    here(folder, f'out{count}', workers=count, rules=rules)
  want = content(folder / 'out0')
  assert content(folder / 'out1') == want and content(folder / 'out3') == want
  assert {'train/index.npz', 'test/index.npz', 'report.png'} < set(want)
  data = Dataset(folder / 'out3', 'train')
  numbers = [int(data[i].id) for i in range(len(data))]
  assert numbers == sorted(numbers) and len(numbers) > 100


def test_grouping_and_file_size_change_no_document(folder, monkeypatch):
  def documents(out):
    data = Dataset(folder / out, 'train')
    files = [shard['file'] for shard in data.meta['splits']['train']['shards']]
    assert files == [f'documents-{i:05d}.array_record' for i in range(len(files))]
    return [repr(data[i].spans[-1]) for i in range(len(data))], len(files)

  rules = {'unique_images': True}
  here(folder, 'one', rules=rules)
  monkeypatch.setattr(parts, 'MOST_PARTS', 5)
  source = prepare.sources.build(f'jsonl:{folder / "d.jsonl"}')
  made_from = {'source': 'x', 'options': {}, 'tokenizer': 'bytes', 'end': None}
  settings = prepare.Settings(
    rules=prepare.rules_lib.Rules(**rules), shard_bytes=5000, progress=False
  )
  tokenizer = prepare.tokenizer_lib.ByteTokenizer
  prepare.make(folder / 'many', source, made_from, tokenizer, settings)
  (one, files), (many, more) = documents('one'), documents('many')
  assert one == many and (files, more > 3) == (1, True)
  before, after = (Dataset(folder / out, 'train').index for out in ('one', 'many'))
  for name in ('text_tokens', 'targets', 'item_offsets', 'item_kind', 'item_size'):
    np.testing.assert_array_equal(getattr(before, name), getattr(after, name))


def test_line_numbers_hold_in_every_piece(folder):
  with open(folder / 'd.jsonl', 'ab') as file:
    file.write(b'\n\r\n{"spans": [{"text": "a\\r", "trained": true}]}\r\n[')
  source = prepare.sources.build(f'jsonl:{folder / "d.jsonl"}')
  assert len(source.pieces()) == PIECES + 1
  records = [record for _, record in source.records()]
  bad = [record.message.split(':')[0] for record in records if hasattr(record, 'reason')]
  assert bad == ['d.jsonl line 51', 'd.jsonl line 244']
  ids = [record.id for record in records if hasattr(record, 'id')]
  assert ids == [str(i) for i in range(1, 244) if i not in (51, 241, 242)]


def kill_in_the_middle(folder, out, after):
  """kill -9 of a preparation, its workers left alone, when so many pieces are done."""
  (folder / 'log').unlink(missing_ok=True)
  process = subprocess.Popen(
    command(folder, out, seconds=0.01, count=3), stderr=subprocess.PIPE
  )
  work = folder / f'.{out}.partial'
  finished = []
  while process.poll() is None and len(finished) < after:
    finished = [p for p in work.glob('work-*/0*') if p.name.isdecimal()]
    time.sleep(0.005)
  process.kill()
  process.wait()
  assert process.returncode == -signal.SIGKILL and not (folder / out).exists()
  process.stderr.close()
  for _ in range(100):  # workers die with their parent, but may end a part before
    if not running(folder):
      break
    time.sleep(0.1)
  assert not running(folder)
  return {p.name for p in work.glob('work-*/0*') if p.name.isdecimal()}


def running(folder):
  """Processes that have this folder in their command line or environment."""
  found = []
  for entry in pathlib.Path('/proc').iterdir():
    if entry.name.isdecimal() and int(entry.name) != os.getpid():
      try:
        environment = (entry / 'environ').read_bytes()
      except OSError:
        continue
      if f'MARK={folder}'.encode() in environment:
        found.append(int(entry.name))
  return found


def test_killed_again_and_again_it_goes_on(folder, monkeypatch):
  monkeypatch.setenv('MARK', str(folder))
  here(folder, 'whole', tokenizer='bpe:300')
  finished = kill_in_the_middle(folder, 'out', after=3)

  os.rename(folder / 'd.jsonl', folder / 'gone')
  args = command(folder, 'out', seconds=0.01)
  done = subprocess.run(args, capture_output=True, text=True, check=False)
  assert done.returncode == 1
  assert done.stderr == f'prepare: source {folder / "d.jsonl"}: no such file\n'
  os.rename(folder / 'gone', folder / 'd.jsonl')  # it was waited for

  finished |= kill_in_the_middle(folder, 'out', after=7)
  assert 7 <= len(finished) < PIECES
  (folder / 'log').unlink()
  done = call(folder, 'out', seconds=0.01, count=3)
  assert f'going on: {len(finished)} of {PIECES} parts are done already' in done.stderr
  names = prepare.sources.build(f'jsonl:{folder / "d.jsonl"}').pieces()
  again = set((folder / 'log').read_text().splitlines()) & set(names)
  assert again == {p for i, p in enumerate(names) if f'{i:06d}' not in finished}
  got, want = content(folder / 'out'), content(folder / 'whole')
  assert got.keys() == want.keys()
  for name in got.keys() - {'meta.json'}:  # which names the source
    assert got[name] == want[name], name
  assert not list(folder.glob('.*.partial'))


def test_leftovers_of_other_options_or_data_are_discarded(folder, capsys):
  def stop(**options):
    with pytest.raises(ValueError, match='unusable, more than the share max_dropped=0;'):
      here(folder, 'out', max_dropped=0, **options)
    capsys.readouterr()

  stop()
  here(folder, 'out', rules={'max_words': 5})
  said = capsys.readouterr().err
  assert "it was with rules={}, not {'max_words': 5}" in said
  assert said.count('\n') == 1 and 'going on' not in said
  for path in ('out/meta.json', '.out.partial'):
    assert (folder / path).exists() == (path == 'out/meta.json')
  os.rename(folder / 'out', folder / 'first')
  stop(rules={'max_words': 5})
  with open(folder / 'd.jsonl', 'a') as file:
    file.write('\n')
  here(folder, 'out', rules={'max_words': 5})
  assert 'it was with fingerprint=' in capsys.readouterr().err
  os.rename(folder / 'out', folder / 'second')
  stop()
  (work,) = (folder / '.out.partial').glob('work-*')
  (work / 'begun.json').write_text('{')
  here(folder, 'out', rules={'max_words': 5})
  assert 'it was with something else' in capsys.readouterr().err


def test_too_many_unusable_records_stop_it_and_more_may_be_allowed(folder, capsys):
  source = f'jsonl:{folder / "d.jsonl"}'
  args = [source, f'--out={folder / "out"}', '--workers=0']
  assert prepare.main([*args, '--max-dropped=0.004']) == 1
  said = capsys.readouterr().err
  assert said.endswith(
    "1 of 240 records are unusable, more than the share max_dropped=0.004; for example "
    "bad_json: d.jsonl line 51: Expecting ':' delimiter: line 2 column 1 (char 9)\n"
  )  # fmt: skip
  assert not (folder / 'out').exists()
  # What rules leave out doesn't count.
  assert prepare.main([*args, '--max-dropped=0.005', '--rules-min-words=9']) == 0
  assert 'few_words' in capsys.readouterr().out
  for share, match in ((2, 'max_dropped=2 is no share'), (-1, 'is no share')):
    with pytest.raises(ValueError, match=match):
      here(folder, 'o', max_dropped=share)
  with pytest.raises(ValueError, match='workers=-1'):
    here(folder, 'o', workers=-1)


def in_terminal(args):
  """A process at the far end of a terminal: (process, our end)."""
  ours, theirs = pty.openpty()
  # What runs between fork and exec is run by the new process itself: JAX allows no fork.
  takes_it = (
    'import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);'
    ' os.execv(sys.argv[1], sys.argv[1:])'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', takes_it, *args],
    stdin=theirs,
    stdout=theirs,
    stderr=theirs,
    start_new_session=True,
  )
  os.close(theirs)
  return process, ours


def read_until(end, word=None, seconds=60):
  """What the terminal shows, up to a word or to its end."""
  said, limit = b'', time.monotonic() + seconds
  while time.monotonic() < limit:
    try:
      some = os.read(end, 4096)
    except OSError:  # nobody is there any more
      return said.decode()
    said += some
    if not some or (word and word.encode() in said):
      return said.decode()
  raise TimeoutError(said)


@pytest.mark.parametrize('times', [1, 2])
def test_control_c_in_a_terminal(folder, monkeypatch, times):
  monkeypatch.setenv('MARK', str(folder))
  seconds = 0.05 if times == 1 else 5  # so a piece would take 1 s, or 100 s
  args = command(folder, 'out', seconds=seconds, tokenizer='bytes')
  process, end = in_terminal(args)
  while not (folder / 'log').exists():
    time.sleep(0.01)
  os.write(end, b'\x03')  # to all processes of the terminal
  said = read_until(end, 'at once')
  if times == 2:
    os.write(end, b'\x03')
  start = time.monotonic()
  said += read_until(end)
  assert process.wait(20) == 130 and time.monotonic() - start < 20
  os.close(end)
  assert 'Traceback' not in said and 'KeyboardInterrupt' not in said
  lines = [line.split('\r')[-1] for line in said.replace('\r\n', '\n').split('\n')]
  assert lines[-2:] == ['prepare: stopped; the same command goes on from here', '']
  assert all(line.count('ETA') <= 1 for line in lines)
  assert sum('ETA' in line for line in lines) <= 2  # where it was stopped, and its end
  log = (folder / 'log').read_text().splitlines()
  begun = [line for line in log if not line.startswith('end ')]
  ended = [line[4:] for line in log if line.startswith('end ')]
  if times == 1:
    assert begun and sorted(begun) == sorted(ended) and len(begun) < PIECES
  else:
    assert begun and not ended
  assert not running(folder)


def _odd(task, tick):
  if task == 'value':
    raise ValueError('a wrong value')
  if task == 'os':
    raise FileNotFoundError(2, 'gone', 'a.tar')
  if task == 'bug':
    raise KeyError('x')
  if task == 'die':
    os._exit(9)
  tick(1)
  return task * 2


def test_what_goes_wrong_in_a_worker_is_one_line():
  for task, kind, match in (
    ('value', ValueError, '^a wrong value$'),
    ('os', OSError, "gone: 'a.tar'"),
    ('bug', workers.WorkerError, r"^KeyError: 'x' \(test_parts.py:\d+; workers=0 shows"),
    ('die', workers.WorkerError, 'ended with code 9; out of memory'),
  ):
    with pytest.raises(kind, match=match) as error:
      workers.run(_odd, [1, task], 2, lambda *_: None)
    assert '\n' not in str(error.value)
  with pytest.raises(ValueError, match='worker processes .*; choose workers=0'):
    workers.run(lambda task, tick: task, [1, 2], 2, lambda *_: None)
  results, counts = {}, []
  workers.run(_odd, range(5), 2, results.__setitem__, counts.append)
  assert results == {i: 2 * i for i in range(5)} and max(counts) <= 5
