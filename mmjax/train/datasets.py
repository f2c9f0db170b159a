"""The datasets that a config names: prepared where they aren't there yet, and opened.

config.data.path                     one dataset
config.data.mixture.<name>.path      several, as shares of one; `data.path` is then
                                     what is evaluated

Where `config.data.shots` says so, each document comes behind others: `data.fewshot`.
"""

import contextlib
import logging
from typing import Any

from ml_collections import ConfigDict

from mmjax import files
from mmjax.train import build
from mmjax.train import config as config_lib

_log = logging.getLogger('mmjax')
_SHOWN = 16  # documents in a line


def prepare(config: ConfigDict, devices=None) -> None:
  """Prepares what isn't there yet; for one process to call.

  Raises:
    ValueError: the config, a source, or what it holds, doesn't fit; one line.
    OSError: the disk is full.
  """
  from mmjax.data.prepare import prepare

  built = False
  for name, of in _sources(config).items():
    place = files.on_disk(of['path'], f'the dataset {name}'.rstrip())
    if (place / 'meta.json').exists():
      continue
    if of['source'] is None:
      raise ValueError(f'no dataset at {of["path"]}, and no source to make {name!r} from')
    if not built:  # what is wrong in the config is told before waiting
      build.build(config, 1, devices)
      built = True
    _log.info('preparing %s in %s', of['source'], of['path'])
    prepare(
      of['source'],
      of['path'],
      tokenizer=config.data.tokenizer,
      rules=of['rules'],
      chat_template=config.data.chat_template,
      delimiters=config.data.delimiters,
      workers=config.data.workers,
      **of['options'],
    )


def load(config: ConfigDict) -> Any:
  """What is trained on: a `store.Dataset`, or a `mixture.Mixture` of several.

  Raises:
    ValueError: one isn't there, is damaged, or was prepared from something else.
  """
  from mmjax.data.mixture import Mixture
  from mmjax.data.store import Dataset

  names = list(config.data.mixture) or ['']
  sources = {name: of for name, of in _sources(config).items() if name in names}
  found = {name: Dataset(of['path'], config.data.split) for name, of in sources.items()}
  for name, of in sources.items():
    _refuse_other(of, config, found[name].meta)
  found = {name: _with_shots(one, config) for name, one in found.items()}
  if not config.data.mixture:
    return found['']
  return Mixture(found, config_lib.weights(config.data.mixture))


def _with_shots(dataset: Any, config: ConfigDict) -> Any:
  """The dataset with the support documents of `config.data.shots`."""
  from mmjax.data import fewshot
  from mmjax.data.store import Dataset

  shots = config.data.shots
  if not shots.count:
    return dataset
  other = shots.split not in (None, config.data.split)
  pool = Dataset(dataset.path, shots.split) if other else None
  return fewshot.build(
    dataset,
    shots.count,
    pool,
    seed=config.seed,
    trained=shots.trained,
    files=shots.embeddings,
  )


def refuse_others(config: ConfigDict, dataset: Any, plan: Any, meta: Any) -> None:
  """Refuses a checkpoint that was trained on other data.

  Args:
    dataset: what `load` gave.
    plan: the pipeline's.
    meta: of the checkpoint.

  Raises:
    ValueError: the tokenizer's hash or the counts of documents differ; one line.
  """
  mine, theirs = dataset.tokenizer.hash, meta['tokenizer_hash']
  if mine != theirs:
    raise ValueError(
      f'the tokenizer of {where(config)} has hash {mine[:12]}, the checkpoint was trained'
      f' with {theirs[:12]}; put that data back or use another --workdir'
    )
  # The place in the data is the step; the counts tell whether it is the same data.
  then, now = meta.get('documents'), plan.before(meta['data_position'] * config.data.rows)
  if then not in (None, now):
    raise ValueError(
      f'the data of {where(config)} is not what it was: {now} documents before step'
      f' {meta["data_position"]}, the checkpoint says {then}; put that data back or use'
      ' another --workdir'
    )


def ids(config: ConfigDict, plan: Any, index: int) -> list[int]:
  """The numbers of the documents of batch `index`, from 0 on, in order."""
  rows = range(index * config.data.rows, (index + 1) * config.data.rows)
  return [int(i) for row in rows for i in plan.row(row)]


def named(dataset: Any, numbers: list[int]) -> str:
  """Documents by their ids, for a line that people read; of many the first."""

  def name(i):
    with contextlib.suppress(ValueError):  # one that can't be read
      return dataset[i].id or f'#{i}'
    return f'#{i}'

  more = f' and {len(numbers) - _SHOWN} more' if len(numbers) > _SHOWN else ''
  return ', '.join(map(name, numbers[:_SHOWN])) + more


def where(config: ConfigDict) -> str:
  """The paths of what is trained on."""
  paths = [of['path'] for of in config.data.mixture.to_dict().values()]
  return ', '.join(paths) or config.data.path


def _sources(config: ConfigDict) -> dict[str, dict[str, Any]]:
  """path, source, options and rules of each, by name; a single one has none, ''."""
  plain = config.data.to_dict()
  one = {'': plain} if not plain['mixture'] or config.eval else {}
  return {
    name: {'path': given['path'], 'source': given.get('source'),
           'options': given.get('options', {}), 'rules': given.get('rules', {})}
    for name, given in (one | plain['mixture']).items()
  }  # fmt: skip


def _refuse_other(of: dict[str, Any], config: ConfigDict, meta: dict[str, Any]) -> None:
  wanted = {'source': of['source'], 'tokenizer': config.data.tokenizer}
  wanted |= {key: of[key] for key in ('options', 'rules') if of[key]}
  wanted |= {key: config.data[key] for key in ('chat_template', 'delimiters')}
  for key, value in wanted.items():
    if value is not None and meta.get(key) not in (None, value):
      raise ValueError(
        f'{of["path"]} was prepared with {key} {meta[key]!r}, the config says'
        f' {value!r}; choose another config.data.path'
      )
