"""The log of a run that was killed and resumed reads as if nothing had happened."""

import json
import types

import numpy as np
import pytest

from mmjax.train import log as log_lib
from mmjax.train.window import Window, share


def test_resumed_log_has_every_step_once(tmp_path):
  log = log_lib.RunLog(tmp_path, 0, 40)
  for step in (10, 20, 30):
    log.write(step, {'train/loss': 1.0 / step})
  log.write(20, {'eval/vqa/accuracy': 0.5})
  log.close()
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 40, "trai')  # killed while writing
  log = log_lib.RunLog(tmp_path, 20, 40)
  assert log.evaluated(20) and not log.evaluated(10)
  log.write(30, {'train/loss': 0.25, 'train/grad_norm': float('nan')})
  log.close()
  lines = log_lib.read(tmp_path / 'metrics.jsonl')
  assert [line['step'] for line in lines] == [10, 20, 20, 30]
  assert lines[-1] == {'step': 30, 'train/loss': 0.25, 'train/grad_norm': None}
  text = (tmp_path / 'metrics.jsonl').read_text()
  assert 'NaN' not in text and text.endswith('\n')
  assert list((tmp_path / 'tensorboard').iterdir())


def test_only_the_active_process_writes(tmp_path):
  with log_lib.logging_to(tmp_path, active=False):
    log = log_lib.RunLog(tmp_path, 0, 10, active=False)
    log.write(5, {'train/loss': 1.0})
    log.advance()
    log.close()
  assert list(tmp_path.iterdir()) == []


def test_a_line_says_what_one_wants_to_know(tmp_path, capsys):
  with log_lib.logging_to(tmp_path):
    log = log_lib.RunLog(tmp_path, 0, 40)
    log.write(
      10,
      {
        'train/loss': 2.5,
        'train/accuracy': 0.25,
        'train/tokens_per_second': 12345.6,
        'train/skipped': 1.0,
        'data/fill/stream': 0.987,
        'data/bad/truncated_image': 3.0,
      },
    )
    log.close()
  out = capsys.readouterr().err
  for text in (
    'step 10/40', 'loss 2.5', 'accuracy 0.25', '12,346 trained tokens/s', 'fill 0.987',
    'skipped 1', 'bad documents 3', 'ETA',
  ):  # fmt: skip
    assert text in out
  assert 'loss 2.5' in (tmp_path / 'train.log').read_text()


def test_eta_leaves_out_what_was_before_the_first_step(tmp_path, capsys, monkeypatch):
  now = [0.0]
  clock = types.SimpleNamespace(monotonic=lambda: now[0])
  monkeypatch.setattr(log_lib, 'time', clock)
  with log_lib.logging_to(tmp_path):
    log = log_lib.RunLog(tmp_path, 100, 200)
    now[0] = 3600.0  # compiling, and an evaluation that was missing
    log.advance()
    now[0] += 50.0
    log.write(150, {'train/loss': 2.5})
    log.close()
  assert 'ETA 0:50' in capsys.readouterr().err


def step(loss, weight, skipped=0.0):
  return {
    'loss': loss, 'weight': weight, 'grad_norm': 2.0, 'learning_rate': 0.1,
    'skipped': skipped, 'skipped_in_a_row': skipped,
  }  # fmt: skip


def test_window_is_the_mean_over_tokens():
  window = Window()
  window.add(step(1.0, 10.0), {'fill/stream': 0.5, 'epoch': 0.1})
  window.add(step(np.nan, 5.0, skipped=1.0), {'fill/stream': 0.9, 'epoch': 0.2})
  window.add(step(4.0, 20.0), {'fill/stream': 1.0, 'bad/empty': 2.0, 'epoch': 0.3})
  line = window.flush()
  np.testing.assert_allclose(line['train/loss'], (1 * 10 + 4 * 20) / 30)
  np.testing.assert_allclose(line['train/grad_norm'], 2.0)
  np.testing.assert_allclose(line['train/tokens_per_step'], 15.0)
  np.testing.assert_allclose(line['data/fill/stream'], 0.8)
  assert (line['train/skipped'], line['data/bad/empty'], line['data/epoch']) == (
    1,
    2,
    0.3,
  )
  window.add(step(7.0, 1.0), {})
  assert window.flush()['train/loss'] == 7.0


def test_window_goes_through_a_checkpoint():
  one, other = Window(), Window()
  for window in (one, other):
    window.add(step(1 / 3, 7.0), {'fill/stream': 0.1, 'epoch': 0.5})
  other = Window.from_json(json.loads(json.dumps(other.to_json())))
  lines = []
  for window in (one, other):
    window.add(step(1 / 7, 3.0), {'fill/stream': 0.2, 'epoch': 0.6})
    line = window.flush()
    line.pop('train/tokens_per_second')
    lines.append(line)
  assert lines[0] == lines[1]


@pytest.mark.parametrize(('count', 'blocks'), [(1, 1), (2, 2), (4, 4), (4, 2), (8, 1)])
def test_processes_add_up_to_the_whole_batch(monkeypatch, count, blocks):
  """Each process loads one of `blocks` blocks of rows; several may load the same."""
  monkeypatch.setattr('jax.process_count', lambda: count)
  rng = np.random.default_rng(0)
  windows = [Window() for _ in range(count)]
  tokens = []
  for _ in range(3):
    per_block = rng.integers(1, 60, blocks)
    tokens.append(per_block.sum())
    for i, window in enumerate(windows):
      n = float(per_block[i % blocks])
      stats = {'tokens': n, 'fill/stream': n / 64, 'bad/empty': 1.0, 'epoch': 0.5}
      window.add(step(1.0, 4.0), share(stats, blocks))

  def gather(_):
    return [dict(window._stats) for window in windows]

  saved = json.loads(json.dumps(windows[-1].to_json(gather)))
  resumed = [Window.from_json(saved, first=i == 0) for i in range(count)]
  for window, found in ((windows[-1], gather), (
    resumed[-1], lambda _: [dict(w._stats) for w in resumed]
  )):  # fmt: skip
    line = window.flush(found)
    assert line['data/tokens'] == sum(tokens) / 3
    np.testing.assert_allclose(line['data/fill/stream'], np.mean(tokens) / blocks / 64)
    assert (line['data/bad/empty'], line['data/epoch']) == (3 * blocks, 0.5)


def test_log_of_nothing(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('')
  assert log_lib.truncate(tmp_path / 'metrics.jsonl', 5) == []
  with pytest.raises(FileNotFoundError):
    log_lib.read(tmp_path / 'x.jsonl')
