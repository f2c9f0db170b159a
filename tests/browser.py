"""A headless Chromium to click in pages with, over its own pipe: nothing to install.

The DevTools protocol on two pipes (--remote-debugging-pipe), messages ended by a zero
byte. Without a Chromium the test is skipped.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
# Chromium reads commands from descriptor 3 and answers on 4.
_START = (
  'import fcntl, os, sys\n'
  'r, w = (fcntl.fcntl(int(x), fcntl.F_DUPFD, 10) for x in sys.argv[1:3])\n'
  'os.dup2(r, 3), os.dup2(w, 4)\n'
  'os.execvp(sys.argv[3], sys.argv[3:])\n'
)
_FLAGS = ('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic',
          '--no-first-run', '--disable-background-networking', '--hide-scrollbars',
          '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage',
          '--disable-extensions', '--window-size=1280,900')  # fmt: skip


class Browser:
  """One tab of a Chromium.

  Args:
    profile: an empty folder.
  """

  def __init__(self, profile):
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
      pytest.skip(f'no Chromium to click with: none of {", ".join(NAMES)} is installed')
    theirs_in, self._in = os.pipe()
    self._out, theirs_out = os.pipe()
    command = [path, *_FLAGS, f'--user-data-dir={profile}', '--remote-debugging-pipe']
    start = [sys.executable, '-S', '-c', _START, str(theirs_in), str(theirs_out)]
    self._process = subprocess.Popen(
      [*start, *command], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
    )
    os.close(theirs_in)
    os.close(theirs_out)
    self._read = b''
    self._count, self._session = 0, None
    target = self.call('Target.createTarget', url='about:blank')['targetId']
    attached = self.call('Target.attachToTarget', targetId=target, flatten=True)
    self._session = attached['sessionId']
    self.requests = []  # URLs that pages asked for
    self.call('Page.enable')
    self.call('Network.enable')

  def call(self, method, **params):
    """A command and its answer; what happens in between is noted."""
    self._count += 1
    message = {'id': self._count, 'method': method, 'params': params}
    if self._session:
      message['sessionId'] = self._session
    os.write(self._in, json.dumps(message).encode() + b'\0')
    while (answer := self._next()).get('id') != self._count:
      self._note(answer)
    if 'error' in answer:
      raise RuntimeError(f'{method}: {answer["error"]}')
    return answer['result']

  def open(self, url):
    """Opens a page and waits until it is loaded."""
    self._loaded = False
    self.call('Page.navigate', url=url)
    while not self._loaded:
      self._note(self._next())

  def run(self, script):
    """The value of a JavaScript expression."""
    found = self.call('Runtime.evaluate', expression=script, returnByValue=True)
    if 'exceptionDetails' in found:
      raise RuntimeError(found['exceptionDetails'])
    return found['result'].get('value')

  def click(self, selector):
    """The mouse goes to the middle of an element, and clicks."""
    place = self.run(
      f'(() => {{ const x = document.querySelector({json.dumps(selector)});'
      " x.scrollIntoView({block: 'center'}); const r = x.getClientRects()[0];"
      ' return [r.x + r.width / 2, r.y + r.height / 2]; })()'
    )
    for kind in ('mousePressed', 'mouseReleased'):
      where = dict(x=place[0], y=place[1], button='left', clickCount=1)
      self.call('Input.dispatchMouseEvent', type=kind, **where)

  def close(self):
    os.close(self._in)
    os.close(self._out)
    self._process.kill()
    self._process.wait()

  def _next(self):
    while b'\0' not in self._read:
      more = os.read(self._out, 2**20)
      if not more:
        raise RuntimeError('Chromium has ended')
      self._read += more
    message, _, self._read = self._read.partition(b'\0')
    return json.loads(message)

  def _note(self, message):
    if message.get('method') == 'Page.loadEventFired':
      self._loaded = True
    if message.get('method') == 'Network.requestWillBeSent':
      self.requests.append(message['params']['request']['url'])
