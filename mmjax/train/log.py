"""What a run says, all of it from process 0.

  metrics.jsonl   one line per log: {"step": 20, "train/loss": ...}
  tensorboard/    the same numbers
  train.log       what happened, in words
  stderr          a progress bar on a terminal, otherwise a line per log

A resumed run goes on in the same files: lines after the restored step, and a last
line that was cut in half, are taken out first, so no step stands there twice.
"""

import contextlib
import json
import logging
import math
import pathlib
import sys
import time

import tqdm

from mmjax import files

_log = logging.getLogger('mmjax')
_LIBRARIES = ('absl', 'asyncio', 'gcsfs')


class RunLog:
  """Writes the metrics of one run.

  Args:
    workdir: where the files go.
    start: the step that was restored; 0 = a fresh run.
    steps: steps of the whole run, for the bar.
    active: whether this process writes.
  """

  def __init__(self, workdir, start: int, steps: int, active: bool = True):
    self._active = active
    self._began, self._start, self._steps = time.monotonic(), start, steps
    self._bar = None
    self._evaluated: set[int] = set()
    if not active:
      return
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    self.path = workdir / 'metrics.jsonl'
    for line in truncate(self.path, start):
      if any(key.startswith('eval/') for key in line):
        self._evaluated.add(line['step'])
    self._file = self.path.open('a')
    self._board = None
    self._terminal = sys.stderr.isatty()

  def advance(self) -> None:
    """One more step is on its way."""
    if not self._active:
      return
    if self._bar is None:  # what was before the first step is no measure of the rest
      self._began = time.monotonic()
      self._bar = tqdm.tqdm(
        total=self._steps, initial=self._start, unit='step', disable=not self._terminal,
        file=sys.stderr, dynamic_ncols=True, smoothing=0.1,
      )  # fmt: skip
    self._bar.update()

  def evaluated(self, step: int) -> bool:
    """Whether the log already has an evaluation at this step."""
    return step in self._evaluated

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Writes a line of metrics, e.g. {'train/loss': 2.1}."""
    if not self._active:
      return
    line = {'step': step, **{k: float(v) for k, v in metrics.items()}}
    # JSON has no NaN: a number that isn't finite is written as null.
    plain = {k: v if math.isfinite(v) else None for k, v in line.items()}
    self._file.write(json.dumps(plain) + '\n')
    self._file.flush()
    if self._board is None:
      self._board = self._open_board()
    for name, value in metrics.items():
      self._board.add_scalar(name, value, step)
    text = self._text(step, line)
    if self._terminal and self._bar is not None and 'train/loss' in metrics:
      self._bar.set_postfix_str(text, refresh=False)
      _log.debug('%s', text)
    else:
      _log.info('%s', text)

  def _open_board(self):
    # Not before there is a number: it takes PyTorch along where that is installed.
    import tensorboardX

    purge = self._start + 1 if self._start else None
    return tensorboardX.SummaryWriter(str(self.path.parent / 'tensorboard'), purge)

  def _text(self, step, line):
    if 'train/loss' not in line:
      short = {k.removeprefix('eval/'): v for k, v in line.items() if k.count('/') == 2}
      shown = [f'{k} {v:.4g}' for k, v in short.items()]
      return f'step {step}  evaluation: ' + '  '.join(shown)
    left = (time.monotonic() - self._began) / max(step - self._start, 1)
    left = int(left * (self._steps - step))
    parts = [f'step {step}/{self._steps}', f'loss {line["train/loss"]:.4f}']
    if 'train/accuracy' in line:
      parts.append(f'accuracy {line["train/accuracy"]:.3f}')
    if 'train/tokens_per_second' in line:
      parts.append(f'{line["train/tokens_per_second"]:,.0f} trained tokens/s')
    if 'data/fill/stream' in line:
      parts.append(f'fill {line["data/fill/stream"]:.3f}')
    if line.get('train/skipped'):
      parts.append(f'skipped {line["train/skipped"]:.0f}')
    if bad := sum(v for k, v in line.items() if k.startswith('data/bad/')):
      parts.append(f'bad documents {bad:.0f}')
    if self._terminal:
      return '  '.join(parts[1:])  # the bar has the rest
    return '  '.join([*parts, f'ETA {left // 60}:{left % 60:02d}'])

  def close(self) -> None:
    if self._active:
      if self._bar is not None:
        self._bar.close()
      with contextlib.suppress(OSError):  # a full disk, which was told already
        self._file.close()
        if self._board is not None:
          self._board.close()


def clocked(name: str) -> bool:
  """Whether a metric is what a clock says, so that two equal runs may differ in it."""
  return 'second' in name or name == 'train/goodput'


def read(path) -> list[dict]:
  """The lines of a metrics.jsonl; a half-written last one is left out."""
  lines = []
  for text in files.place(path, 'the log').read_text().splitlines():
    try:
      lines.append(json.loads(text))
    except json.JSONDecodeError:
      continue
  return lines


def truncate(path: pathlib.Path, step: int) -> list[dict]:
  """Takes out lines after `step`; returns the ones that stay."""
  if not path.exists():
    return []
  kept = [line for line in read(path) if line['step'] <= step]
  files.replace(path, ''.join(json.dumps(line) + '\n' for line in kept))
  return kept


class _File(logging.FileHandler):
  """A file that a full disk doesn't turn into stack traces on stderr."""

  def handleError(self, record):
    pass


class _Console(logging.Handler):
  """Lines to stderr that don't tear a progress bar."""

  def emit(self, record):
    tqdm.tqdm.write(self.format(record), file=sys.stderr)


@contextlib.contextmanager
def logging_to(workdir, active: bool = True):
  """Inside, mmjax' logger writes to <workdir>/train.log and to stderr.

  What libraries complain about (Orbax answers a full disk with a dozen stack
  traces) goes to train.log alone.
  """
  loggers = [_log, *map(logging.getLogger, _LIBRARIES)]
  before = [(x.level, x.propagate) for x in loggers]
  file, handlers = logging.NullHandler(), []
  if active:
    pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
    file = _File(pathlib.Path(workdir) / 'train.log')
    file.setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(message)s'))
    handlers = [_Console(logging.INFO)]
  for logger in loggers:
    logger.setLevel(logging.DEBUG if logger is _log else logging.WARNING)
    logger.propagate = False
    logger.addHandler(file)
  for handler in handlers:
    _log.addHandler(handler)
  try:
    yield
  finally:
    for logger, (level, propagate) in zip(loggers, before):
      logger.level, logger.propagate = level, propagate
      for handler in (file, *handlers):
        logger.removeHandler(handler)
    for handler in (file, *handlers):
      handler.close()
