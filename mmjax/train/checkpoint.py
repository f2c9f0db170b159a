"""Checkpoints: Orbax writes them beside the run, this file decides which to trust.

  <workdir>/checkpoints/<step>/params       the parameters, alone, for whoever reuses them
                              /ema          their moving average, if there is one
                              /optimizer    optimizer, step and counts
                              /meta         JSON: fingerprints, tokenizer hash, ...

A directory appears under its step's name only when it is complete (in a bucket: counts
from when commit_success.txt is in it), so a process that is killed while saving leaves
the older ones whole. Since storage can still
lose or turn bytes, each array has a fingerprint: the sum modulo 2^32 of its bits
times odd numbers of their places. It is the same on every mesh. A checkpoint that
can't be read, or whose fingerprints differ, is put aside and the one before it
taken. Nothing is unpickled.
"""

import contextlib
import dataclasses
import errno
import fnmatch
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from mmjax import files
from mmjax.train import processes
from mmjax.train.optim import by_path
from mmjax.train.state import TrainState

_log = logging.getLogger('mmjax')
_ITEMS = ('params', 'ema', 'optimizer')
_COMMITTED = 'commit_success.txt'  # Orbax's mark of a whole one, where nothing is renamed
FORMAT = 1
# By format, what a checkpoint of it lacks to be one of the next; 0 had no number yet.
_MIGRATIONS = {0: lambda meta: {**meta, 'goodput': {}}}


class CheckpointError(ValueError):
  """A checkpoint that can't be written, or doesn't fit; one line."""


class Checkpoints:
  """The checkpoints of one run.

  Args:
    directory: where they are; made if absent, unless `read_only`.
    keep: how many of the newest are kept.
    read_only: never writes, deletes or renames.
  """

  def __init__(self, directory, keep: int = 3, read_only: bool = False):
    directory = files.place(directory, 'checkpoints')
    self._bucket = files.in_bucket(directory)
    self.directory = directory if self._bucket else directory.resolve()
    self._keep = _Keep(keep)
    self._read_only = read_only
    with files.reaching(self.directory):
      if read_only and not self.directory.is_dir():
        raise CheckpointError(f'no checkpoints at {self.directory}')
      if self._bucket and not read_only and jax.process_index() == 0:
        self._remove_unfinished()
      self._open()

  def _open(self):
    import orbax.checkpoint as ocp

    items = {name: ocp.StandardCheckpointHandler() for name in _ITEMS}
    self._manager = ocp.CheckpointManager(
      self.directory,
      item_handlers={**items, 'meta': ocp.JsonCheckpointHandler()},
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._keep,
        create=not self._read_only,
        read_only=self._read_only,
        cleanup_tmp_directories=not self._read_only and not self._bucket,
        enable_async_checkpointing=not self._read_only,
      ),
    )

  def _remove_unfinished(self):
    # Orbax' own way is in the background, and removes what is being put aside as well.
    for path in self.directory.iterdir() if self.directory.is_dir() else ():
      if path.name.isdigit() and not (path / _COMMITTED).exists():
        path.rmtree()

  def steps(self) -> list[int]:
    """The steps of the complete checkpoints, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, state: TrainState, step: int, meta: dict[str, Any]) -> None:
    """Starts to write; returns once the arrays are copied. Skips a step that exists.

    Waits for the save before, if that is still being written: see `busy`.

    Args:
      state: the state after `step` steps.
      meta: plain JSON data.

    Raises:
      CheckpointError: this save, or the one before, failed.
    """
    import orbax.checkpoint as ocp

    if step in self._manager.all_steps():
      return
    items = _items(state)
    meta = {**meta, 'step': step, 'fingerprints': fingerprints(items)}
    meta['format'] = FORMAT
    args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    args['meta'] = ocp.args.JsonSave(meta)
    with self._clear_errors():
      self._manager.save(step, args=ocp.args.Composite(**args))

  def busy(self, patience: float = 0.0) -> bool:
    """Whether a save is still being written after so many seconds more.

    Processes may differ in it for a moment.
    """
    end = time.monotonic() + patience
    while (busy := self._manager.is_saving_in_progress()) and time.monotonic() < end:
      time.sleep(0.01)
    return busy

  def pin(self, step: int) -> None:
    """Keeps a checkpoint although newer ones come."""
    self._keep.pinned.add(step)

  def check(self) -> None:
    """Raises CheckpointError if a save in the background has failed; doesn't wait."""
    with self._clear_errors():
      self._manager.check_for_errors()

  def wait(self) -> None:
    """Waits until everything is on disk.

    Raises:
      CheckpointError: it isn't.
    """
    with self._clear_errors():
      self._manager.wait_until_finished()

  def close(self) -> None:
    with self._clear_errors():
      self._manager.close()

  def restore(
    self,
    abstract: TrainState,
    accept: Callable[[dict[str, Any]], None] = lambda meta: None,
    until: int | None = None,
  ) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest whole checkpoint, placed as `abstract` says; None if there is none.

    Damaged ones are told in the log and renamed to damaged-<step>.

    Args:
      abstract: shapes with shardings (of this mesh, not of the one that saved).
      accept: called with the meta data before the arrays are read; raises to refuse.
      until: the last step that is looked at.

    Raises:
      CheckpointError: it is another architecture's (lists missing and extra keys
        and shapes), or there are checkpoints but none is whole.
    """
    items = _items(abstract)
    steps = [step for step in self.steps() if until is None or step <= until]
    found = self._newest(steps, lambda shapes: items, accept)
    if found is None:
      return None
    trees, meta = found
    leaves = {
      f'{k}/{p}': x for k, tree in trees.items() for p, x in by_path(tree).items()
    }
    parts = _rebuild(_split(abstract), leaves)
    state = TrainState(params=parts['params'], ema=parts.get('ema'), **parts['optimizer'])
    return state, meta

  def restore_params(
    self,
    params: Any,
    step: int | None = None,
    *,
    part: str = '',
    ignore: Sequence[str] = (),
  ) -> tuple[Any, dict[str, Any]]:
    """Only what evaluation needs: the parameters, or their moving average.

    Args:
      params: shapes with shardings.
      step: which checkpoint; None = the newest whole one.
      part: where the parameters are in the checkpoint's, if they are a part of them.
      ignore: patterns of paths that the checkpoint may have besides (in the part).

    Returns:
      (parameters, meta data).

    Raises:
      CheckpointError: as `restore`; or there is none, or not of this step.
    """
    steps = self.steps()
    if not steps or step not in (None, *steps):
      what = 'no checkpoint' if step is None else f'no checkpoint of step {step}'
      raise CheckpointError(f'{what} in {self.directory} (there are: {steps})')
    wanted = by_path(params)
    names = dict(zip(wanted, wanted))  # by our path, that of the checkpoint

    def items(shapes):
      nonlocal names
      stored = by_path(shapes['params'])
      inside = part and any(path.startswith(f'{part}/') for path in stored)
      names = {path: f'{part}/{path}' if inside else path for path in wanted}
      needed = {names[path]: x for path, x in wanted.items()}
      spare = [
        path
        for path in stored.keys() - needed.keys()
        if (inside and not path.startswith(f'{part}/'))
        or any(fnmatch.fnmatchcase(path, f'{part}/{p}' if inside else p) for p in ignore)
      ]
      if spare:  # read as well, and dropped
        needed |= _whole({path: stored[path] for path in spare}, params)
      averaged = by_path(shapes.get('ema', {}))
      means = {path: x for path, x in needed.items() if path in averaged}
      return {'params': _nested(needed)} | ({'ema': _nested(means)} if means else {})

    trees, meta = self._newest(steps if step is None else [step], items)
    leaves = by_path(trees['params']) | by_path(trees.get('ema', {}))
    return _rebuild(params, {path: leaves[names[path]] for path in wanted}), meta

  def _newest(self, steps, wanted, accept=lambda meta: None):
    """(trees, meta) of the newest whole checkpoint; see `restore`."""
    damaged = []
    for step in reversed(steps):
      try:
        meta, shapes = self._look(step)
      except Exception as error:  # Orbax and TensorStore raise anything
        damaged.append((step, error))
        continue
      meta = self._migrated(meta, step)
      accept(meta)
      items = wanted(shapes)
      if problems := differences(items, {k: shapes.get(k, {}) for k in items}):
        path = self.directory / str(step)
        raise CheckpointError(f'checkpoint {path} is of another architecture: {problems}')
      try:
        trees = self._read(step, items)
        _verify(trees, meta['fingerprints'])
      except Exception as error:
        damaged.append((step, error))
        continue
      self._put_aside(damaged, step)
      return trees, meta
    if damaged:
      told = '; '.join(f'step {s}: {_line(e)}' for s, e in damaged)
      raise CheckpointError(f'no whole checkpoint in {self.directory}: {told}')
    return None

  def _look(self, step):
    """Meta data, and shapes by item, without reading arrays."""
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    meta = self._manager.restore(step, args=args).meta
    stored = self._manager.item_metadata(step)
    shapes = {name: stored[name].tree for name in _ITEMS if stored.get(name) is not None}
    if not isinstance(meta.get('fingerprints'), dict) or 'params' not in shapes:
      raise ValueError('its meta data are not whole')
    return meta, shapes

  def _migrated(self, meta, step):
    """The meta data as if written today."""
    number = meta.get('format', 0)
    while number in _MIGRATIONS:
      meta, number = _MIGRATIONS[number](meta), number + 1
    if number != FORMAT:
      raise CheckpointError(
        f'checkpoint {self.directory / str(step)} is of format {number}, written by mmjax'
        f' {meta.get("mmjax", "?")}; this one reads up to format {FORMAT}'
      )
    return {**meta, 'format': number}

  def _read(self, step, items):
    import orbax.checkpoint as ocp

    args = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
    found = self._manager.restore(step, args=ocp.args.Composite(**args))
    return {name: found[name] for name in items}

  def _put_aside(self, damaged, step):
    for bad, error in damaged:
      _log.warning(
        'checkpoint of step %d is damaged (%s); going back to step %d',
        bad, _line(error), step,
      )  # fmt: skip
      if not self._read_only and jax.process_index() == 0:
        aside = self.directory / f'damaged-{bad}'
        for n in range(1, 1000):
          if not aside.exists():
            break
          aside = self.directory / f'damaged-{bad}.{n}'
        (self.directory / str(bad)).rename(aside)
    if damaged and not self._read_only:
      processes.barrier('put aside')  # nobody may still see what was damaged
      self._manager.reload()

  @contextlib.contextmanager
  def _clear_errors(self):
    try:
      yield
    except CheckpointError:
      raise
    except Exception as error:
      whole = self._whole()
      last = (
        f'the last whole one is of step {whole[-1]}' if whole else 'there is none yet'
      )
      raise CheckpointError(
        f'could not save a checkpoint to {self.directory}: {_line(error)}; {last}'
      ) from error

  def _whole(self):
    """The steps that stand there; of a bucket that can't be reached, none."""
    try:
      found = [p for p in self.directory.glob('*') if p.name.isdigit()]
      if self._bucket:
        found = [p for p in found if (p / _COMMITTED).exists()]
    except Exception:
      if self._bucket:
        return []
      raise
    return sorted(int(p.name) for p in found)


class _Keep:
  """Which checkpoints stay: the newest few, and those that are pinned."""

  def __init__(self, newest: int):
    self.newest, self.pinned = newest, set()

  def should_preserve(self, checkpoints, *, context):
    del context
    first = len(checkpoints) - self.newest
    return [i >= first or x.step in self.pinned for i, x in enumerate(checkpoints)]


def differences(wanted: Any, stored: Any) -> str:
  """How two trees differ: missing and extra keys, other shapes or dtypes; '' = not."""
  want, have = by_path(wanted), by_path(stored)

  def kind(x):
    return f'{np.dtype(x.dtype).name}[{",".join(map(str, x.shape))}]'

  parts = []
  if missing := sorted(want.keys() - have.keys()):
    parts.append(f'missing {", ".join(missing)}')
  if extra := sorted(have.keys() - want.keys()):
    parts.append(f'extra {", ".join(extra)}')
  other = [k for k in want if k in have and kind(want[k]) != kind(have[k])]
  if other:
    told = (f'{k} is {kind(have[k])}, not {kind(want[k])}' for k in other)
    parts.append(f'shapes: {", ".join(told)}')
  return '; '.join(parts)


def fingerprints(trees: Any) -> dict[str, int]:
  """A number per array, by path; the same on every mesh. See the top of the file."""
  flat = by_path(trees)
  return {k: int(v) for k, v in jax.device_get(_fingerprints(flat)).items()}


@jax.jit
def _fingerprints(flat):
  return {path: _fingerprint(x) for path, x in flat.items()}


def _fingerprint(x):
  size = np.dtype(x.dtype).itemsize
  bits = jax.lax.bitcast_convert_type(x, {1: 'uint8', 2: 'uint16', 4: 'uint32'}[size])
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    stride = math.prod(x.shape[axis + 1 :]) % 2**32
    place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride)
  odd = place * np.uint32(2654435761) | np.uint32(1)  # Knuth's multiplicative hash
  return jnp.sum(bits.astype(jnp.uint32) * odd, dtype=jnp.uint32)


def _verify(trees, stored):
  for path, value in fingerprints(trees).items():
    if stored.get(path) != value:
      raise ValueError(f'the bytes of {path} are not those that were saved')


def _split(state: TrainState) -> dict[str, Any]:
  rest = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
  out = {'params': rest.pop('params')}
  if (ema := rest.pop('ema')) is not None:
    out['ema'] = ema
  return {**out, 'optimizer': rest}


def _items(state: TrainState) -> dict[str, Any]:
  return {name: _nested(by_path(tree)) for name, tree in _split(state).items()}


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def _rebuild(tree: Any, flat: dict[str, Any]) -> Any:
  """The tree with its leaves taken from `flat` by path."""
  return jax.tree.unflatten(jax.tree.structure(tree), [flat[p] for p in by_path(tree)])


def _whole(flat, params):
  """Shapes of arrays that are whole on every device of the params' mesh."""
  mesh = jax.tree.leaves(params)[0].sharding.mesh
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return {
    k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for k, x in flat.items()
  }


def _line(error: BaseException) -> str:
  """What the system said, if it did; else the root of an error in 200 characters."""
  while error.__cause__ is not None:
    error = error.__cause__
  text = ' '.join(str(error).split()) or type(error).__name__
  known = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO
  for reason in map(os.strerror, known):
    if reason in text:
      return reason
  return text if len(text) <= 200 else text[:200] + '...'
