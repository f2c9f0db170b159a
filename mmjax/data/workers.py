"""A job done over many tasks by several processes, each of which dies with its parent.

  tasks 0 1 2 3 4 5 ...      parent: hands out tasks, hears of results, shows progress
          |  |  |            worker: holds the job, does one task after the other
        done(task, result)   in the order in which they end

Ctrl-C once: what is begun is finished, nothing new is begun. Twice: everything stops at
once. Workers are spawned, not forked, so threads of the parent don't matter.
"""

import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any


class Stopped(KeyboardInterrupt):
  """Ctrl-C; what was begun before is whole."""


class WorkerError(RuntimeError):
  """A worker process failed in a way that isn't the data's fault."""


def run(
  job: Callable[[Any, Callable[[int], None]], Any],
  tasks: Sequence[Any],
  workers: int,
  done: Callable[[Any, Any], None],
  progress: Callable[[int], None] = lambda n: None,
) -> None:
  """Does `job(task, tick)` for each task.

  Args:
    job: picklable if there are workers; calls `tick(n)` after n records more.
    tasks: picklable as well.
    workers: how many processes; 0 = here.
    done: is told of each task and its result, in the order in which they end.
    progress: is told now and then how many records there are by now.

  Raises:
    ValueError, OSError: what a task or `done` raised; the others are stopped.
    WorkerError: a task raised something else, or its process was killed.
    Stopped: Ctrl-C. A second one is a KeyboardInterrupt at once.
  """
  with _interrupts() as stopping:
    if workers and len(tasks) > 1:
      _parallel(job, tasks, min(workers, len(tasks)), done, progress, stopping)
    else:
      count = 0

      def tick(n):
        nonlocal count
        count += n
        progress(count)

      for task in tasks:
        if stopping.is_set():
          break
        done(task, job(task, tick))
  if stopping.is_set():
    raise Stopped


def _parallel(job, tasks, workers, done, progress, stopping):
  context = multiprocessing.get_context('spawn')
  count = context.Value('q', 0)
  waiting = collections.deque(tasks)
  processes, busy = {}, {}
  try:
    with _without_interrupts():  # workers are born deaf to Ctrl-C
      for _ in range(workers):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, job, count), daemon=True)
        try:
          process.start()
        except (TypeError, AttributeError) as error:
          why = ' '.join(str(error).split())
          raise ValueError(
            f"this can't be sent to worker processes ({why}); choose workers=0"
          ) from None
        theirs.close()
        processes[ours] = process
    free = list(processes)
    while True:
      while free and waiting and not stopping.is_set():
        connection = free.pop()
        busy[connection] = waiting.popleft()
        with contextlib.suppress(OSError):  # its process has ended: heard of below
          connection.send(busy[connection])
      if not busy:
        break
      for connection in multiprocessing.connection.wait(list(busy), timeout=0.2):
        task = busy.pop(connection)
        done(task, _answer(connection, processes[connection]))
        free.append(connection)
      progress(count.value)
  finally:
    for process in processes.values():
      process.kill()  # idle, or to be stopped at once
    for connection, process in processes.items():
      process.join()
      connection.close()


def _answer(connection, process) -> Any:
  try:
    kind, value = connection.recv()
  except (EOFError, OSError):
    process.join(5)
    raise WorkerError(
      f'a worker process ended with code {process.exitcode}; out of memory?'
    ) from None
  if kind == 'done':
    return value
  raise {'ValueError': ValueError, 'OSError': OSError}.get(kind, WorkerError)(value)


def _serve(connection, job, count):
  """A worker process."""
  threading.Thread(target=_die_with_parent, daemon=True).start()

  def tick(n):
    with count.get_lock():
      count.value += n

  while True:
    try:
      task = connection.recv()
    except (EOFError, OSError):
      return
    try:
      answer = ('done', job(task, tick))
    except ValueError as error:
      answer = ('ValueError', str(error))
    except OSError as error:
      answer = ('OSError', str(error))
    except BaseException as error:
      last = traceback.extract_tb(error.__traceback__)[-1]
      where = f'{pathlib.Path(last.filename).name}:{last.lineno}'
      what = ' '.join(f'{type(error).__name__}: {error}'.split())
      answer = ('WorkerError', f'{what} ({where}; workers=0 shows all of it)')
    connection.send(answer)


def _die_with_parent():
  multiprocessing.parent_process().join()
  os._exit(1)


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
  """Sets an event at the first Ctrl-C. Elsewhere than in the main thread: never."""
  stopping = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield stopping
    return

  def hear(number, frame):
    if stopping.is_set():
      raise KeyboardInterrupt
    stopping.set()
    # Not by print, which may be what was interrupted.
    os.write(2, b'\nstopping after the pieces that are begun; Ctrl-C again: at once\n')

  before = signal.signal(signal.SIGINT, hear)
  try:
    yield stopping
  finally:
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _without_interrupts():
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
