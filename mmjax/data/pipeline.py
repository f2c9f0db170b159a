"""The loading pipeline: from a prepared dataset to packed batches, step by step.

  step s -> rows s*B .. s*B+B-1 of the plan -> documents -> examples -> Loaded

One element is a whole step, and each step is a function of its number alone.
So the place in the data IS the step: a run resumes by starting at one. Process
h of H takes the h-th block of each step's rows, hence the global batches are the
same for any number of processes and of Grain's worker processes.

A document that can't be read or decoded is left out of its row (there is padding
instead) and counted; too large a share of them stops the run.
"""

import collections
import dataclasses
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mmjax.batch import Budget, Item, PackedBatch
from mmjax.data import augment as augment_lib
from mmjax.data.block import Layout, Ring
from mmjax.data.deck import EVEN
from mmjax.data.document import BadDocument
from mmjax.data.example import Example, to_example
from mmjax.data.pack import needs_of, pack
from mmjax.data.plan import Lengths, PackPlan

_log = logging.getLogger(__name__)
_ENDLESS = 2**48  # steps
_WINDOW = 4096  # documents over which the share of bad ones is taken
_UNEVEN = 0.02  # what a source's share may be off, untold
_FEW = 10  # bad documents that stop no run yet, unless none are allowed
_AHEAD = 3  # steps that wait in the queue of a worker process
_BLOCKS = _AHEAD + 5  # of a worker: one in the making, one made; the rest are lent


class TooManyBadDocuments(ValueError):
  """The share of documents that can't be read is over `max_bad_share`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loaded:
  """One step of one process.

  batch: the rows of this process, NumPy [rows / process_count, ...].
  stats: of these rows: 'documents', 'tokens' (stream slots that aren't padding),
    'targets', 'fill/stream', 'fill/<kind>' (share of patches), 'bad/<reason>'
    (documents left out), of a mixture '<source>/documents' and '<source>/tokens';
    and 'epoch', epochs done after this step.
  """

  batch: PackedBatch
  stats: dict[str, float]


@dataclasses.dataclass(frozen=True)
class _Step:
  """What is made of a step: the batch, and the documents left out.

  batch: of a worker process, the number of the ring's block that it lies in, or a block.
  """

  batch: PackedBatch | np.ndarray | int
  documents: int
  sources: tuple[tuple[int, int], ...]  # of each: documents, tokens
  bad: tuple[tuple[str, int, str], ...]  # reason, document, message


jax.tree_util.register_dataclass(_Step, ['batch'], ['documents', 'sources', 'bad'])


class Pipeline:
  """Packed batches of a dataset, endless, open at any step.

  Args:
    dataset: `store.Dataset`, `mixture.Mixture`, or anything with `[i] -> Document`,
      `.index` and `.tokenizer` (and picklable, if there are workers).
    budget: of a row.
    rows: of a step, over all processes.
    rules: by media kind, how an item becomes patches.
    slots: the model's answer to how many stream slots an item takes.
    seed: of the shuffle.
    image_attention, prompt_attention, image_positions: see `to_example`.
    augment: names of `augment.AUGMENTATIONS`, in order.
    max_bad_share: the run stops if a larger share of the documents is bad (of
      the last 4,096 or so, and more than 10 of them; 0 stops at the first).
    workers: Grain worker processes; 0 reads in threads of this one.
    threads: how many, without workers. Most decoders let threads run beside each other
      (libspng, for PNGs, doesn't, and Python itself never); processes always do.

  Raises:
    ValueError: no document fits the budget, or a number that makes no sense.
  """

  def __init__(
    self,
    dataset: Any,
    *,
    budget: Budget,
    rows: int,
    rules: Mapping[str, Any],
    slots: Callable[[Item], tuple[int, int, int]],
    seed: int = 0,
    image_attention: str = 'block',
    prompt_attention: str = 'causal',
    image_positions: str = 'grid',
    augment: Sequence[str] = (),
    max_bad_share: float = 0.01,
    workers: int = 0,
    threads: int = 1,
  ):
    if rows < 1 or workers < 0 or threads < 1 or not 0 <= max_bad_share <= 1:
      raise ValueError(
        f'pipeline: rows={rows} must be >= 1, workers={workers} >= 0, threads={threads}'
        f' >= 1 and max_bad_share={max_bad_share} in [0, 1]'
      )
    self.budget = budget
    self.rows = rows
    self.max_bad_share = max_bad_share
    self.workers = workers
    self.threads = threads
    self.lengths = Lengths.of(dataset.index, rules, slots)
    shares = getattr(dataset, 'shares', None)
    self.plan = PackPlan(self.lengths, budget, seed, shares, rows)
    # A single dataset has no counts of its own: they are those of the step.
    self.sources = shares.names if shares else ()
    options = dict(
      image_attention=image_attention,
      prompt_attention=prompt_attention,
      image_positions=image_positions,
    )
    self._convert = _Convert(
      dataset, dict(rules), slots, options, augment_lib.build(augment), seed
    )

  @property
  def steps_per_epoch(self) -> float:
    return self.plan.num_rows / self.rows

  @property
  def reach(self) -> tuple[int, int]:
    """How many slots (back, ahead) a slot may see: its document, its own item.

    In a prompt that sees itself, that is the document both ways.
    """
    longest = int(self.plan.largest[self.lengths.names.index('stream')])
    options = self._convert.options
    ahead = self.lengths.largest_item if options['image_attention'] == 'block' else 1
    if options['prompt_attention'] == 'block':
      ahead = longest
    return longest - 1, max(ahead - 1, 0)

  def summary(self) -> str:
    """Documents, rows, steps per epoch, fill and drops, for the log."""
    plan = self.plan
    dropped = sum(plan.dropped.values())
    why = ', '.join(f'{reason} {count:,}' for reason, count in plan.dropped.items())
    fill = ', '.join(f'{name} {share:.1%}' for name, share in plan.fill.items())
    lines = [
      f'{name}: {share:.1%} of the documents from step {step} on'
      for step, shares in (plan.shares.phases if self.sources else ())
      for name, share in zip(self.sources, map(float, shares))
    ]
    if plan.off_balance > _UNEVEN:
      lines.append(
        f'the share of a source is up to {plan.off_balance:.1%} off in {EVEN} documents:'
        ' some rows hold many documents of one source'
      )
    return '\n'.join(
      [
        f'{plan.num_documents:,} documents in {plan.num_rows:,} rows, '
        f'{plan.num_documents / plan.num_rows:.2f} a row; '
        f'{self.steps_per_epoch:,.1f} steps of {self.rows} rows an epoch',
        f'fill: {fill}',
        f'dropped: {dropped:,}' + (f' ({why})' if why else ''),
        *lines,
      ]
    )

  def iterate(
    self, start_step: int = 0, process_index: int = 0, process_count: int = 1
  ) -> 'Steps':
    """The steps from `start_step` on, the rows of one process.

    Raises:
      ValueError: rows that don't divide over the processes, or a wrong number.
    """
    if start_step < 0 or not 0 <= process_index < process_count:
      raise ValueError(
        f'start_step={start_step}, process {process_index} of {process_count}: no such'
      )
    if self.rows % process_count:
      raise ValueError(
        f'data.rows = {self.rows} does not divide over {process_count} processes'
      )
    local = self.rows // process_count
    layout = Layout(self.budget, local)
    ring = Ring(layout.size, _BLOCKS, self.workers) if self.workers else None
    load = _Load(self._convert, self.plan, layout, self.rows, process_index * local, ring)
    steps = _read(load, start_step, self.workers, self.threads)
    return Steps(steps, self, load, start_step)


class Steps(Iterator[Loaded]):
  """Iterates over steps; counts bad documents exactly, as it is the only consumer.

  `close()` ends the threads and worker processes behind it; so does the exit of
  the program. Batches stay as they are for as long as someone has them.
  """

  def __init__(self, steps, pipeline: Pipeline, load: '_Load', start_step: int):
    self._steps = [steps]
    self._load = load
    # At exit too, while there still are modules to close it with.
    self.close = weakref.finalize(self, _close, self._steps)
    self._pipeline = pipeline
    self.next_step = start_step
    self._window = collections.deque()  # (documents, reasons) per step
    self._logged = set()

  def __next__(self) -> Loaded:
    """The next step.

    Raises:
      TooManyBadDocuments: one line, with the counts by reason.
    """
    if not self.close.alive:
      raise ValueError('these steps are closed')
    step: _Step = next(self._steps[0])
    bad = collections.Counter(reason for reason, _, _ in step.bad)
    for reason, document, message in step.bad:
      if reason not in self._logged:
        self._logged.add(reason)
        _log.warning('bad document %d left out: %s', document, message)
    self._check(step.documents + len(step.bad), bad)
    self.next_step += 1
    step = dataclasses.replace(step, batch=self._load.batch(step.batch))
    stats = _stats(step)
    stats |= {f'bad/{reason}': float(count) for reason, count in bad.items()}
    for name, (documents, tokens) in zip(self._pipeline.sources, step.sources):
      stats |= {f'{name}/documents': float(documents), f'{name}/tokens': float(tokens)}
    stats['epoch'] = self.next_step / self._pipeline.steps_per_epoch
    return Loaded(step.batch, stats)

  def _check(self, documents: int, bad: collections.Counter):
    self._window.append((documents, bad))
    while sum(n for n, _ in self._window) - self._window[0][0] >= _WINDOW:
      self._window.popleft()
    share = self._pipeline.max_bad_share
    counts = sum((c for _, c in self._window), collections.Counter())
    seen = sum(n for n, _ in self._window)
    if counts.total() > max(share * seen, _FEW if share else 0):
      why = ', '.join(f'{reason} {count}' for reason, count in counts.most_common())
      self.close()
      raise TooManyBadDocuments(
        f'{counts.total()} of the last {seen} documents are bad, over'
        f' data.max_bad_share = {share:.2%}: {why}'
      )


def _close(steps: list):
  if steps:
    steps.pop().close()


def _stats(step: _Step) -> dict[str, float]:
  stream = step.batch.stream
  tokens = np.count_nonzero(stream.segment_ids)
  stats = {
    'documents': step.documents,
    'tokens': tokens,
    'targets': np.count_nonzero(stream.weights),
    'fill/stream': tokens / stream.segment_ids.size,
  }
  for kind, bank in step.batch.bank.items():
    stats[f'fill/{kind}'] = np.count_nonzero(bank.items) / max(bank.items.size, 1)
  return {name: float(value) for name, value in stats.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class _Convert:
  """Document number and epoch to example."""

  dataset: Any
  rules: dict[str, Any]
  slots: Callable[[Item], tuple[int, int, int]]
  options: dict[str, str]
  augmentations: tuple[Any, ...]
  seed: int

  def __call__(self, document: int, epoch: int) -> Example:
    return to_example(
      augment_lib.apply(
        self.augmentations, self.dataset[document], self.seed, document, epoch
      ),
      tokenizer=self.dataset.tokenizer,
      rules=self.rules,
      slots=self.slots,
      **self.options,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Load:
  """Step number to the step's local rows."""

  convert: _Convert
  plan: PackPlan
  layout: Layout
  rows: int
  first: int
  ring: Ring | None

  def batch(self, made: PackedBatch | np.ndarray | int) -> PackedBatch:
    """The batch of a step as it came here."""
    if isinstance(made, int):
      return self.layout.batch(self.ring.lend(made))
    if isinstance(made, np.ndarray):
      # Out of Grain's shared memory: it ends with the program, and may be small.
      return self.layout.batch(np.array(made))
    return made

  def __call__(self, step: int) -> _Step:
    start = int(step) * self.rows + self.first
    bad, sources = [], np.zeros((len(self.plan.shares.names), 2), np.int64)

    def rows():
      # Packed and forgotten one by one, so that little memory is ever touched.
      for r in range(start, start + self.layout.rows):
        examples = []
        for document, epoch in self.plan.dealt(r):
          try:
            examples.append(self._example(document, epoch))
          except BadDocument as error:
            bad.append((error.reason, document, str(error)))
          else:
            source = self.plan.shares.source(document)
            sources[source] += 1, len(examples[-1])
        yield examples

    made = self._packed(step, rows())
    counts = tuple(map(tuple, sources.tolist()))
    return _Step(made, int(sources[:, 0].sum()), counts, tuple(bad))

  def _packed(self, step: int, rows) -> PackedBatch | np.ndarray | int:
    budget = self.layout.budget
    if self.ring is None:
      return pack(rows, budget, budget.empty(self.layout.rows))
    number, block = self.ring.take(step) or (None, None)
    if block is None:  # more batches are kept than usual
      block = np.empty(self.layout.size, np.uint8)
    pack(rows, budget, self.layout.batch(block))
    return block if number is None else number

  def _example(self, document: int, epoch: int) -> Example:
    example = self.convert(document, epoch)
    planned = self.plan.needs(document)
    for name, need in needs_of(example).items():
      if need > planned.get(name, 0):
        raise BadDocument(
          'differs_from_index',
          f'document {document} needs {need} of {name}, its index says'
          f' {planned.get(name, 0)}',
        )
    return example


def _read(load: _Load, start_step: int, workers: int, threads: int):
  """Grain's iterator over the steps: threads, or worker processes."""
  import grain

  steps = grain.MapDataset.range(start_step, start_step + _ENDLESS).map(load)
  if not workers:
    ahead = max(4, 2 * threads)
    return iter(
      steps.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
      )
    )
  from absl import flags

  if not flags.FLAGS.is_parsed():  # Grain reads its own flags for its workers
    flags.FLAGS.mark_as_parsed()
  # Each makes a step when there is room for it. What waited in a worker when that is
  # told to stop would be left behind in shared memory.
  steps = steps.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  options = grain.MultiprocessingOptions(
    num_workers=workers, per_worker_buffer_size=_AHEAD
  )
  return iter(steps.mp_prefetch(options, worker_init_fn=_init_worker))


def _init_worker(*_):
  """Keeps a worker off the accelerators, and ends it with its parent only.

  Ctrl-C reaches workers too, but the parent wants to finish its step. A parent
  that was killed can't ask its workers to stop, so each looks out for itself.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  jax.config.update('jax_platforms', 'cpu')
  parent = multiprocessing.parent_process()

  def watch():
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)

  if parent is not None:
    threading.Thread(target=watch, name='parent-watch', daemon=True).start()
