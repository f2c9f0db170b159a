"""Steps that went wrong are kept, so that they can be looked at again.

  a step whose loss or gradient is not finite
  a step whose loss is over   median + mads * 1.4826 * MAD   of the last steps

(MAD: the median of the distances from the median; 1.4826 of it is a standard deviation
where the losses are normal. Unlike the mean, neither feels single outliers.)

  <workdir>/spikes/<step>/about.json       losses, random numbers, documents, checkpoint
                         /rows-0of4.npz    the batch, as each process had loaded it

The checkpoint before such a step is not deleted. `train.replay` makes the step again.
"""

import collections
import io
import json
import logging
import pathlib
from typing import Any

import jax
import numpy as np

from mmjax import files
from mmjax.train.optim import by_path

_log = logging.getLogger('mmjax')
_WINDOW, _FEW = 100, 20  # losses that are compared with, and without which nothing is
_SMALLEST = 0.01  # of the median: less than that is no deviation


class Spikes:
  """Judges the steps of a run, and keeps the batches of some.

  Args:
    folder: <workdir>/spikes.
    mads: see above; 0 = only what isn't finite.
    keep: how many are kept in a run, over all its restarts.
  """

  def __init__(self, folder: pathlib.Path, mads: float, keep: int):
    self._folder, self._mads, self._keep = folder, mads, keep
    self._losses = collections.deque(maxlen=_WINDOW)
    self._kept = {x['step'] for x in kept(folder)}

  def judge(self, loss: float, skipped: bool) -> str | None:
    """What is wrong with a step, the same on all processes; None = nothing."""
    if skipped:
      return 'loss or gradient not finite'
    losses = np.array(self._losses)
    self._losses.append(loss)
    if not self._mads or losses.size < _FEW:
      return None
    median = np.median(losses)
    deviation = 1.4826 * np.median(np.abs(losses - median))
    limit = median + self._mads * max(deviation, _SMALLEST * abs(median))
    if loss <= limit:
      return None
    return f'loss {loss:.4g}, over {limit:.4g} (median {median:.4g} of {losses.size})'

  def keep(self, step: int, batch: Any, block: tuple[int, int], about: Any) -> bool:
    """Keeps a step, unless there are enough; whether it did. All processes call it.

    Args:
      batch: the rows of this process.
      block: `sharding.row_block`, which of the blocks of rows they are.
      about: plain JSON data.
    """
    if step in self._kept or len(self._kept) >= self._keep:
      return False
    self._kept.add(step)
    folder = self._folder / str(step)
    rows = io.BytesIO()
    np.savez(rows, **by_path(batch))
    try:
      with files.reaching(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Processes that load the same rows write the same file.
        files.replace(folder / _rows(*block), rows.getvalue())
        if jax.process_index() == 0:
          text = json.dumps({'step': step, 'blocks': block[1], **about}, indent=2)
          files.replace(folder / 'about.json', text)
    except (OSError, ValueError) as error:  # no reason to end a run
      _log.warning('step %d could not be kept: %s', step, error)
    return True


def kept(folder: pathlib.Path) -> list[dict[str, Any]]:
  """What is known about each step that was kept, by step."""
  found = [json.loads(p.read_text()) for p in folder.glob('*/about.json')]
  return sorted(found, key=lambda about: about['step'])


def load(folder: pathlib.Path, about: dict[str, Any], like: Any) -> Any:
  """The whole batch of a step that was kept, put together from its files.

  Args:
    folder: <workdir>/spikes.
    like: a batch of any number of rows.

  Raises:
    ValueError: a file is missing, or it is of another budget.
  """
  blocks = []
  for i in range(about['blocks']):
    path = folder / str(about['step']) / _rows(i, about['blocks'])
    if not path.exists():
      raise ValueError(f'{path} is missing')
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
      blocks.append({name: file[name] for name in file.files})
  want = by_path(like)
  have = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
  kinds = [{k: (x.shape[1:], x.dtype) for k, x in flat.items()} for flat in (have, want)]
  if kinds[0] != kinds[1]:
    raise ValueError(f'the batch in {folder / str(about["step"])} is of another budget')
  return jax.tree.unflatten(jax.tree.structure(like), [have[name] for name in want])


def _rows(block, blocks):
  return f'rows-{block}of{blocks}.npz'
