"""What a process does when another one leaves, with a store that is a dict."""

import json
import threading
import time

import pytest

from mmjax.train import lifeline
from mmjax.train.lifeline import Lifeline


class Gone(BaseException):
  """Stands for the end of a process."""


class Store:
  """JAX's store as far as it is used, with its errors."""

  def __init__(self):
    self.entries, self.changed, self.alive = {}, threading.Condition(), True

  def _check(self):
    if not self.alive:
      raise RuntimeError('UNAVAILABLE: Socket closed')

  def key_value_set(self, key, value, allow_overwrite=False):
    with self.changed:
      self._check()
      if key in self.entries and not allow_overwrite:
        raise RuntimeError('ALREADY_EXISTS')
      self.entries[key] = value
      self.changed.notify_all()

  def blocking_key_value_get(self, key, milliseconds):
    with self.changed:
      done = self.changed.wait_for(
        lambda: key in self.entries or not self.alive, milliseconds / 1000
      )
      self._check()
      if not done:
        raise RuntimeError('DEADLINE_EXCEEDED')
      return self.entries[key]

  def key_value_dir_get(self, folder):
    with self.changed:
      self._check()
      return [(k, v) for k, v in self.entries.items() if k.startswith(folder + '/')]

  def die(self):
    with self.changed:
      self.alive = False
      self.changed.notify_all()


@pytest.fixture
def lines(monkeypatch):
  """lines(count) -> store and started lifelines; .codes by thread that ended."""
  monkeypatch.setattr(lifeline, '_BEAT', 0.05)
  monkeypatch.setattr(lifeline, '_READ', 0.02)
  monkeypatch.setattr(lifeline, '_LINGER', 0.5)
  made = []

  def make(count, silent=60.0):
    store = Store()
    for k in range(count):
      made.append(Lifeline(store, k, count, silent))
      made[-1].codes = []
    return store, made

  def leave(code):
    caller = threading.current_thread()
    line = next(x for x in made if caller in (x._thread, x.main))
    line.codes.append(code)
    line._closed.set()
    raise Gone

  monkeypatch.setattr(Lifeline, 'main', None, raising=False)
  monkeypatch.setattr(lifeline.os, '_exit', leave)
  # A thread that ends by `Gone` has done what it should.
  monkeypatch.setattr(threading, 'excepthook', lambda args: None)
  yield make
  for line in made:
    if line._thread.ident is not None:
      line.close()


def ended(line, seconds=5.0):
  line._thread.join(seconds)
  assert not line._thread.is_alive()
  return line.codes


@pytest.mark.parametrize('who', [0, 2])
def test_all_end_with_the_reason_of_the_one_that_stops(lines, capsys, who):
  _, made = lines(3)
  for line in made:
    line.start()
  made[who].main = threading.current_thread()
  began = time.monotonic()
  with pytest.raises(Gone):
    made[who].leave('too many bad documents', 1, print_it=False)
  others = [line for line in made if line is not made[who]]
  assert [ended(line) for line in others] == [[1], [1]]
  # Process 0 waits until all have read it, but not for its time to run out.
  assert time.monotonic() - began < 0.4
  said = capsys.readouterr().err.splitlines()
  assert said == [f'error: process {who} stopped: too many bad documents'] * 2


def test_process_0_waits_for_the_others_only_so_long(lines):
  _, made = lines(2)
  made[0].start()
  made[0].main = threading.current_thread()
  began = time.monotonic()
  with pytest.raises(Gone):
    made[0].leave('disk full', 1)
  assert 0.4 < time.monotonic() - began < 3


def test_one_that_is_killed_is_missed(lines, capsys):
  """And those that are there, or have come to their end, aren't."""
  _, made = lines(4, silent=0.4)
  for line in made[:3]:  # process 3 never gives a sign
    line.start()
  made[2].close()
  assert ended(made[0]) == ended(made[1]) == [75]
  first, second = capsys.readouterr().err.splitlines()
  assert first == second and first.startswith('error: lost process 3: no sign of it for')


def test_clocks_of_two_hosts_are_never_compared(lines, monkeypatch):
  """Signs are numbers that grow; only process 0 looks at a clock, its own."""
  store, made = lines(2, silent=0.4)
  monkeypatch.setattr(time, 'time', lambda: 1 / 0)
  for line in made:
    line.start()
  time.sleep(0.8)
  assert all(line._thread.is_alive() for line in made)
  assert int(store.entries['mmjax/alive/1']) > 5


def test_without_process_0_the_store_is_gone(lines, capsys):
  store, made = lines(2)
  made[1].start()
  time.sleep(0.1)
  store.die()
  assert ended(made[1]) == [75]
  assert capsys.readouterr().err.startswith('error: lost process 0')


def test_an_orderly_end_says_nothing(lines, capsys):
  store, made = lines(2)
  for line in made:
    line.start()
  for line in made:
    line.close()
  assert not made[0].codes and not made[1].codes and not capsys.readouterr().err
  assert store.entries['mmjax/alive/1'] == 'done'


def test_the_first_reason_counts(lines):
  store, made = lines(2)
  for why, line in zip(('first', 'second'), made):
    line.main = threading.current_thread()
    with pytest.raises(Gone):
      line.leave(why, 1)
    line.main = None
  assert json.loads(store.entries['mmjax/ended'])['why'] == 'first'


def test_what_is_left_for_process_0(lines):
  _, made = lines(2)
  for k, line in enumerate(made):
    line.post('where', f'step {k}')
  assert made[0].posted('where') == {0: 'step 0', 1: 'step 1'}


def test_without_other_processes_there_is_none():
  assert lifeline.join() is None
