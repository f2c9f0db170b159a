"""What a run begins with: parameters of other runs, and of files.

  config.init = dict(model='runs/stage1')             all parameters of another run
  config.init = dict(lm='runs/words', vision='...')   of its part lm, or of a run that
                                                      trained such a part alone
  config.init = dict(lm=dict(spec='runs/words', ignore=['embed/image/*']))

A spec that is a workdir with checkpoints means its newest whole one, and the moving
average where there is one; what is to be ignored may be there and not be needed. Any
other spec is `interop.pretrained`'s.
"""

import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax

from mmjax import files
from mmjax.interop import pretrained
from mmjax.names import closest
from mmjax.train.checkpoint import Checkpoints

_log = logging.getLogger('mmjax')


def state(config: Any, parts: Any) -> Any:
  """The `TrainState` before the first step: a function of the config alone.

  Args:
    parts: `build.Parts` of the config.

  Raises:
    ValueError: as `parameters`.
  """
  given = parameters(parts.model, parts.abstract.params, config.init.to_dict())
  if given:
    count = sum(x.size for x in given.values())
    _log.info('%s parameters from %s', f'{count:,}', config.init.to_json())
  return parts.init(jax.random.fold_in(jax.random.key(config.seed), 0), given)


def parameters(
  model: nn.Module, abstract_params: Any, init: Mapping[str, Any]
) -> dict[str, jax.Array]:
  """What `config.init` names: {path in the model's tree: parameter}.

  Args:
    abstract_params: shapes with shardings.
    init: {name of a field, or 'model' for all of it: a spec, or what
      `pretrained.load_parts` takes}.

  Raises:
    ValueError: no such part, no checkpoint that fits, or what `load_parts` raises.
  """
  found, files = {}, {}
  for name, said in init.items():
    workdir = _workdir(said)
    if workdir is None:
      files[name] = said
      continue
    parts = ['model', *abstract_params]
    if name not in parts:
      raise ValueError(f'init: no part {name!r}{closest(name, parts)}')
    whole = name == 'model'
    wanted = abstract_params if whole else abstract_params[name]
    runs = Checkpoints(workdir / 'checkpoints', read_only=True)
    try:
      part, ignore = '' if whole else name, _ignored(said)
      params, _ = runs.restore_params(wanted, part=part, ignore=ignore)
    except ValueError as error:
      raise ValueError(f'init.{name}: {error}') from error
    finally:
      runs.close()
    flat = flax.traverse_util.flatten_dict(params, sep='/')
    found |= {k if whole else f'{name}/{k}': x for k, x in flat.items()}
  return pretrained.load_parts(model, abstract_params, files) | found


def _workdir(said) -> pathlib.Path | None:
  """The run that a spec means; None if it means a file."""
  spec = said if isinstance(said, str) else said.get('spec')
  if not isinstance(spec, str):
    return None
  path = files.place(spec, 'init') if files.in_bucket(spec) else files.find(spec)
  return path if (path / 'checkpoints').is_dir() else None


def _ignored(said) -> tuple[str, ...]:
  if isinstance(said, str):
    return ()
  for key in said:
    if key not in ('spec', 'ignore'):
      raise ValueError(f'of a run, there is no {key!r} to say (choices: spec, ignore)')
  return tuple(said.get('ignore', ()))
