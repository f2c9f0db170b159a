"""Real processes, killed for real: the end is the same, bit for bit."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import shades

from mmjax.train import log as log_lib

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 120


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  return shades.write(
    tmp_path_factory.mktemp('kill'),
    optim=dict(learning_rate=3e-3, schedule=dict(name='cosine', warmup_steps=5), ema=0.9),
    train=dict(steps=STEPS, log_every=3, checkpoint_every=7, keep=2),
    eval=dict(vqa=dict(every=50, limit=4, rows=4, max_new=6)),
  )


def start(config, workdir, *args):
  command = [sys.executable, str(ROOT / 'train.py'), f'--config={config}']
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  return subprocess.Popen(
    [*command, f'--workdir={workdir}', *args],
    env=env,
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_for(process, seen):
  """Until `seen()`, in a hurry; the process must still be running then."""
  end = time.monotonic() + 200
  while not seen():
    assert process.poll() is None, process.stderr.read()
    assert time.monotonic() < end
    time.sleep(0.001)


def last_step(workdir):
  path = workdir / 'metrics.jsonl'
  lines = log_lib.read(path) if path.exists() else []
  return lines[-1]['step'] if lines else 0


def saving(workdir):
  return any((workdir / 'checkpoints').glob('*tmp*'))


def result(workdir):
  """Every bit of the state, every line of the log, every answer."""
  meta = workdir / 'checkpoints' / str(STEPS) / 'meta' / 'metadata'
  lines = log_lib.read(workdir / 'metrics.jsonl')
  lines = [{k: v for k, v in x.items() if not log_lib.clocked(k)} for x in lines]
  found = json.loads((workdir / 'eval' / f'{STEPS}.json').read_text())
  answers = found['results']['vqa']['predictions']
  return json.loads(meta.read_text())['fingerprints'], lines, answers


@pytest.fixture(scope='module')
def undisturbed(config):
  workdir = config.parent / 'straight'
  process = start(config, workdir)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  return result(workdir)


@pytest.mark.slow
def test_kill_9_at_any_moment(config, undisturbed, tmp_path):
  for moment in (
    lambda: (tmp_path / 'config.json').exists(),  # nothing saved yet
    lambda: last_step(tmp_path) >= 10,
    lambda: last_step(tmp_path) >= 40 and saving(tmp_path),  # half a checkpoint
    lambda: last_step(tmp_path) >= 90,
  ):
    process = start(config, tmp_path)
    wait_for(process, moment)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
  process = start(config, tmp_path)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert 'going on from step' in err
  assert result(tmp_path) == undisturbed


@pytest.mark.slow
def test_sigterm_saves(config, undisturbed, tmp_path):
  """And what a scheduler took away it starts again, by the exit code."""
  process = start(config, tmp_path)
  wait_for(process, lambda: last_step(tmp_path) >= 10)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 75, err
  assert 'SIGTERM: finishing the step and saving' in err
  assert 'the same command goes on' in err
  kept = [int(p.name) for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()]
  assert max(kept) >= last_step(tmp_path) - 3
  process = start(config, tmp_path)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert f'going on from step {max(kept)}' in err
  assert result(tmp_path) == undisturbed


class Terminal:
  """train.py in a terminal of 120 columns; `out` is what the screen got."""

  PTY = (
    'import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))'
  )

  def __init__(self, config, workdir):
    sized = ['sh', '-c', 'stty cols 120 rows 30; exec "$@"', 'sh', sys.executable]
    command = [str(ROOT / 'train.py'), f'--config={config}', f'--workdir={workdir}']
    self.process = subprocess.Popen(
      [sys.executable, '-c', self.PTY, *sized, *command],
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )
    self.out = ''
    self.reader = threading.Thread(target=self._read, daemon=True)
    self.reader.start()

  def _read(self):
    while chunk := os.read(self.process.stdout.fileno(), 4096):
      self.out += chunk.decode(errors='replace')

  def ctrl_c(self):
    self.process.stdin.write(b'\x03')
    self.process.stdin.flush()

  def wait_for(self, seen):
    end = time.monotonic() + 200
    while not seen() and self.process.poll() is None:
      assert time.monotonic() < end, self.out
      time.sleep(0.001)

  def finish(self):
    """The exit code."""
    code = self.process.wait(timeout=60)
    self.reader.join()
    self.process.stdin.close()
    self.process.stdout.close()
    return code


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(config, undisturbed, tmp_path):
  """Once: it saves, and nobody is to start it again. The bar tears no line."""
  terminal = Terminal(config, tmp_path)
  terminal.wait_for(lambda: last_step(tmp_path) >= 30)
  terminal.ctrl_c()
  assert terminal.finish() == 0, terminal.out
  lines = [line.strip() for line in terminal.out.replace('\r', '\n').split('\n')]
  step = max(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())
  for line in (
    'SIGINT: finishing the step and saving (Ctrl-C now: at once)',
    f'stopped at step {step}; the same command goes on',
  ):
    assert any(x.removeprefix('^C') == line for x in lines), terminal.out
  bars = [line for line in lines if f'/{STEPS} [' in line and '%|' in line]
  assert any('loss' in bar and 'trained tokens/s' in bar for bar in bars)
  assert max(map(len, bars)) <= 120
  process = start(config, tmp_path)
  assert process.communicate(timeout=300)[1] and process.returncode == 0
  assert result(tmp_path) == undisturbed


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(config, undisturbed, tmp_path):
  """Without saving, and what was saved before stays whole."""
  for _ in range(5):  # until the second key comes before the step is saved
    before = last_step(tmp_path)
    terminal = Terminal(config, tmp_path)
    saved = (tmp_path / 'checkpoints').glob
    terminal.wait_for(
      lambda before=before, saved=saved: (
        last_step(tmp_path) >= before + 10 and any(p.name.isdigit() for p in saved('*'))
      )
    )
    terminal.ctrl_c()
    terminal.wait_for(lambda t=terminal: 'finishing the step' in t.out)
    terminal.ctrl_c()
    pressed = time.monotonic()
    code = terminal.finish()
    if code:
      break
  assert code == 256 - signal.SIGINT, terminal.out
  assert time.monotonic() - pressed < 5
  assert 'Traceback' not in terminal.out
  process = start(config, tmp_path)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert 'damaged' not in err and 'going on from step' in err
  assert result(tmp_path) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(
  ('arg', 'message'),
  [
    ('--config.train.stepz=3', "did you mean 'train.steps'"),
    ('--config.optim.options={"b3": 1}', "no option 'b3' (choices: b1, b2, eps)"),
    ('--config.data.source=other', "source 'other'; choose among"),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_2(config, tmp_path, arg, message):
  if 'source' in arg:
    process = start(config, tmp_path, arg, '--config.data.path=/nonexistent/x')
  else:
    process = start(config, tmp_path, arg)
  _, err = process.communicate(timeout=100)
  assert process.returncode == 2, err
  last = err.strip().splitlines()[-1]
  assert last.startswith('error: ') and message in last
  assert 'Traceback' not in err
