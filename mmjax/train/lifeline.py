"""No process of a run waits for one that has gone, and each says in a line why it ends.

  ended      <- who stopped, and why: all wait for this, all the time
  alive/<k>  <- a number that process k raises every few seconds
  gone/<k>   <- process k has read it and leaves

These are entries of the store by which `jax.distributed` has processes meet; process 0
holds it. So there are three ways in which a process hears that it is alone:

- One that fails says so itself. Process 0 then stays until the others have read it.
- One that was killed, or lost with its machine, raises its number no more. Process 0
  notices, by its own clock (clocks of two hosts are never compared).
- With process 0 goes the store, and a read from it fails at once.

JAX ends the others too, but by SIGABRT with a stack trace, the second kind after 100 s.
In the third case it is a race, so the abort has a last line and an exit code as well.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from typing import Any

SILENT = 60.0  # seconds without a sign of life
_BEAT = 5.0  # seconds between two signs
_READ = 1.0  # seconds that a read waits, hence also how long an orderly end may take
_LINGER = 5.0  # seconds that process 0 waits for the others to have read
LOST = 75  # exit code, as `processes.STOPPED`: nothing is wrong with the run itself


class Lifeline:
  """One process' end of it; a thread from `start` until `close`.

  Args:
    store: JAX's client of the store, or anything with its `key_value_set`,
      `blocking_key_value_get` and `key_value_dir_get`.
    process, count: this one, of how many.
    silent: seconds after which a process that gives no sign counts as lost.
  """

  def __init__(self, store: Any, process: int, count: int, silent: float = SILENT):
    self._store, self._process, self._count = store, process, count
    self._silent = silent
    self._ending = threading.Lock()  # whoever has it says the last words
    self._closed = threading.Event()
    self._signs: dict[int, tuple[str, float]] = {}  # the last one, and when it changed
    self._thread = threading.Thread(target=self._listen, name='lifeline', daemon=True)

  def start(self) -> None:
    now = time.monotonic()
    self._signs = {k: ('', now) for k in range(self._count)}
    self._thread.start()

  def close(self) -> None:
    """An orderly end: this process isn't missed from here on."""
    self._closed.set()
    self._try_set(f'alive/{self._process}', 'done')
    self._thread.join()

  def post(self, name: str, text: str) -> None:
    """Leaves a text for `posted`."""
    self._try_set(f'{name}/{self._process}', text)

  def posted(self, name: str) -> dict[int, str]:
    """By process, what each has left last."""
    return self._read(name)

  def hear(self, seconds: float) -> None:
    """Waits for what another has to say, which then ends this process; or returns."""
    self._closed.wait(seconds)

  def leave(self, why: str, code: int, print_it: bool = True) -> None:
    """Ends this process and all others, which print `why` and exit with `code`."""
    with self._ending:
      if print_it:
        print(f'error: {why}', file=sys.stderr)
      said = {'who': self._process, 'why': why, 'code': code}
      self._try_set('ended', json.dumps(said), overwrite=False)
      self._go(code)

  def _go(self, code):
    sys.stdout.flush()
    sys.stderr.flush()
    self._try_set(f'gone/{self._process}', '')
    if self._process == 0:  # with which the store goes
      end = time.monotonic() + _LINGER
      while time.monotonic() < end and len(self._read('gone')) < self._count:
        time.sleep(0.02)
    os._exit(code)

  def _listen(self):
    beats, beat = 0, -_BEAT
    while not self._closed.is_set():
      if time.monotonic() - beat >= _BEAT:
        beats, beat = beats + 1, time.monotonic()
        self._try_set(f'alive/{self._process}', str(beats))
        if self._process == 0:
          self._look_after_the_others()
      try:
        text = self._store.blocking_key_value_get(_key('ended'), int(_READ * 1000))
      except Exception as error:  # JAX has one type for all of them
        if self._closed.is_set():
          return
        if 'DEADLINE_EXCEEDED' not in str(error):
          self._end('lost process 0, and with it the way to all others', LOST)
        continue
      said = json.loads(text)
      # What was lost is the same for all; what stopped one has a place.
      lost = said['code'] == LOST
      who = '' if lost else f'process {said["who"]} stopped: '
      self._end(f'{who}{said["why"]}', said['code'])

  def _look_after_the_others(self):
    now, signs = time.monotonic(), self._read('alive')
    for k, (last, since) in self._signs.items():
      sign = signs.get(k, '')
      if sign != last:
        self._signs[k] = sign, now
      elif sign != 'done' and now - since > self._silent:
        self.leave(f'lost process {k}: no sign of it for {now - since:.0f} s', LOST)

  def _end(self, line, code):
    with self._ending:
      if not self._closed.is_set():
        print(f'error: {line}', file=sys.stderr)
        self._go(code)

  def _read(self, folder):
    try:
      found = self._store.key_value_dir_get(_key(folder))
    except Exception:  # there is nothing yet
      return {}
    return {int(key.rpartition('/')[2]): value for key, value in found}

  def _try_set(self, key, value, overwrite=True):
    try:
      self._store.key_value_set(_key(key), value, allow_overwrite=overwrite)
    except Exception:  # somebody was faster, or the store is gone: heard by reading
      return


def _key(name: str) -> str:
  return f'mmjax/{name}'


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(number):
  """Runs on the thread that aborts; Python's own handlers would come too late."""
  os.write(
    2, b'error: JAX ended this process, see above; most likely another one is lost\n'
  )
  os._exit(LOST)


def join() -> Lifeline | None:
  """The started lifeline of this process; None if it is alone, or JAX has no store that
  we know."""
  from jax._src import distributed  # the store has no public name

  # Not by `jax.process_count`, which would make the devices before they are chosen.
  state = distributed.global_state
  client, count = getattr(state, 'client', None), getattr(state, 'num_processes', None)
  needed = ('key_value_set', 'blocking_key_value_get', 'key_value_dir_get')
  if count in (None, 1) or not all(hasattr(client, name) for name in needed):
    return None
  line = Lifeline(client, state.process_id, count)
  line.start()
  ctypes.CDLL(None).signal(int(signal.SIGABRT), _aborted)
  return line
