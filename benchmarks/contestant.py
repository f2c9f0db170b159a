"""A contestant of a benchmark: a process that waits for 'go' and answers with a line.

  child   {"facts": ...}\n                [seconds, ...]\n
  parent                      go\n                         go\n  ...

Each has a process of its own, so that none has another's memory, threads or settings.
"""

import json
import subprocess


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
