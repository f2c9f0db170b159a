"""A run's log where nothing can be appended to: written here, sent to the bucket.

  /tmp/mmjax-x/metrics.jsonl, train.log, tensorboard/, eval/, curves.png, profile/
      |   each 10 s, before each checkpoint, at the end: whatever changed, as a whole
      v
  gs://bucket/runs/one/metrics.jsonl, ...

An object in a bucket is whole when it appears, so a reader never sees half of a file,
and each is the one before with more lines. A restart fetches what it goes on with. A
process that is killed takes the last seconds along; but all lines up to a checkpoint
are there before it is, and those after it are made again. Of a workdir on a disk, its
files are the ones here, and nothing is sent.
"""

import logging
import pathlib
import shutil
import tempfile
import threading
from typing import Any

from mmjax import files

_log = logging.getLogger('mmjax')
_EVERY = 10.0  # seconds
_CONTINUED = ('metrics.jsonl', 'train.log')


class Mirror:
  """A workdir, with a folder of this machine for what process 0 writes into it.

  Use as a context. Nothing is lost when the bucket can't be reached for a while: that is
  told once, and tried again. What can't be sent at the end stays in the folder.

  Args:
    workdir: a `files.place`.
    active: whether this process writes.

  Raises:
    ValueError: the workdir can't be reached, or written.
  """

  def __init__(self, workdir: Any, active: bool = True):
    self.workdir = self.folder = workdir
    self._active = active and files.in_bucket(workdir)
    self._sent: dict[pathlib.Path, tuple[int, int]] = {}  # what a file was like then
    self._sending, self._closed = threading.Lock(), threading.Event()
    self._lost = False  # the way to the bucket
    self._thread = threading.Thread(target=self._keep_sending, name='mirror', daemon=True)

  def __enter__(self) -> 'Mirror':
    if not files.in_bucket(self.workdir):
      return self
    found = {}
    if self._active:
      with files.reaching(self.workdir):
        there = [name for name in _CONTINUED if (self.workdir / name).exists()]
        found = {name: (self.workdir / name).read_bytes() for name in there}
        # As it is, but now: whoever may not write here is told at the door.
        files.replace(self.workdir / 'train.log', found.get('train.log', b''))
    self.folder = pathlib.Path(tempfile.mkdtemp(prefix='mmjax-'))
    for name, content in found.items():
      (self.folder / name).write_bytes(content)
    if self._active:
      self._thread.start()
    return self

  def __exit__(self, *_):
    if not files.in_bucket(self.workdir):
      return
    if self._active:
      self._closed.set()
      self._thread.join()
      self.send()
    if self._lost:
      _log.warning('%s: not all could be written; it is in %s', self.workdir, self.folder)
    else:
      shutil.rmtree(self.folder, ignore_errors=True)

  def send(self) -> None:
    """Sends what has changed, and returns when it is there; does nothing on a disk."""
    if not self._active:
      return
    with self._sending:
      try:
        for path in sorted(self.folder.rglob('*')):
          self._send_file(path)
        self._lost = False
      except Exception as error:  # what the bucket's library raises
        if not self._lost:
          why = ' '.join(str(error).split())[:200] or type(error).__name__
          _log.warning('%s: %s; tried again until it works', self.workdir, why)
        self._lost = True

  def _send_file(self, path):
    try:
      if path.name.startswith('.') or not path.is_file():  # '.': half-written
        return
      now = path.stat().st_mtime_ns, path.stat().st_size
      if self._sent.get(path) == now:
        return
      content = path.read_bytes()
    except FileNotFoundError:  # renamed meanwhile
      return
    files.replace(self.workdir / path.relative_to(self.folder), content)
    self._sent[path] = now

  def _keep_sending(self):
    while not self._closed.wait(_EVERY):
      self.send()
