"""A contestant of a benchmark: a process that waits for 'go' and answers with a line.

  child   {"facts": ...}\n                [seconds, ...]\n
  parent                      go\n                         go\n  ...

Each has a process of its own, so that none has another's memory, threads or settings.
"""

import ctypes.util
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping


class Contestant:
  """Runs a command, which first says its `facts`; `rounds` are its answers."""

  def __init__(self, command, env):
    pipe = subprocess.PIPE
    self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
    self.facts = self._read()
    self.rounds = []

  def _read(self):
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f'a contestant ended early: {self.process.args}')
    return json.loads(line)

  def round(self):
    """The first number of one more answer."""
    self.process.stdin.write('go\n')
    self.process.stdin.flush()
    self.rounds.append(self._read())
    return self.rounds[-1][0]

  def close(self):
    self.process.stdin.close()
    self.process.wait()


def environment(threads: int, **more: str) -> dict[str, str]:
  """A contestant's environment: so many threads of OpenMP's, JAX on the CPU."""
  return {**os.environ, 'OMP_NUM_THREADS': str(threads), 'JAX_PLATFORMS': 'cpu', **more}


MALLOCS = 'glibc', 'jemalloc'


def memory(malloc: str, preload: str | None = None) -> dict[str, str]:
  """An environment in which memory comes from a malloc; also preloads a library.

  glibc gives large arrays back to the system and gets them anew, emptied, at every step;
  here at least in huge pages, not page by page. jemalloc is told to keep all it ever had:
  steps then take what they compute, but the memory held says nothing.

  Raises:
    SystemExit: jemalloc isn't installed.
  """
  libraries = [preload] if preload else []
  if malloc == 'glibc':
    made = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
  else:
    found = ctypes.util.find_library('jemalloc')
    if found is None:
      raise SystemExit('--malloc=jemalloc: no such library here (Debian: libjemalloc2)')
    libraries.append(found)
    made = {
      'MALLOC_CONF': 'narenas:1,oversize_threshold:0,dirty_decay_ms:-1,'
      'muzzy_decay_ms:-1,thp:always'
    }
  if libraries:
    made['LD_PRELOAD'] = ':'.join(libraries)
  return made


def take_turns(
  running: Mapping[str, Contestant], rounds: int, what: str, words: Callable[[float], str]
) -> None:
  """So many rounds of every contestant, by name, in turns; told as they come.

  Args:
    what: is measured, for people.
    words: what is said of a round's first number.
  """
  for i in range(rounds):
    for name, contestant in running.items():
      found = words(contestant.round())
      where = f'{what}, round {i + 1} of {rounds}'
      print(f'{where}: {name} {found}', file=sys.stderr, flush=True)
      time.sleep(0.5)  # idle threads of the last one stop spinning


def processor() -> tuple[str, str]:
  """Maker and model, as Linux tells them; '?' = it doesn't."""
  text = pathlib.Path('/proc/cpuinfo').read_text()
  fields = dict(x.split('\t: ', 1) for x in text.splitlines() if '\t: ' in x)
  return fields.get('vendor_id', '?'), fields.get('model name', '?').strip()
