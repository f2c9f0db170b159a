"""Evaluators: what a model can do, on data it has not seen, beside blind baselines.

  evaluators = build_evaluators(config, model=model, mesh=mesh, rules=rules)
  for name, evaluator in evaluators.items():
    if evaluator.every and step % evaluator.every == 0:
      result = evaluator.run(params, step)            # at the end: full=True
      report.write(workdir, step, {name: result})

`config.eval` has a section of fields for each evaluator by name.
"""

import inspect
from typing import Any

from mmjax import sharding
from mmjax.eval.gain import Gain, GainResult
from mmjax.eval.retrieval import Retrieval
from mmjax.eval.vqa import Result, Vqa
from mmjax.eval.zeroshot import ZeroShot
from mmjax.names import closest, pick

EVALUATORS = {'gain': Gain, 'retrieval': Retrieval, 'vqa': Vqa, 'zeroshot': ZeroShot}

__all__ = [
  'EVALUATORS',
  'Gain',
  'GainResult',
  'Result',
  'Retrieval',
  'Vqa',
  'ZeroShot',
  'build_evaluators',
]

# What a section of config.eval may not say; it may name a `split` of the prepared data,
# and, with `shots`, the split of their supports: `shots_split`, 'train' by default.
_OURS = (
  'dataset',
  'model',
  'mesh',
  'rules',
  'media_rules',
  'budget',
  'pool',
  'image_attention',
  'prompt_attention',
  'image_positions',
  'generate',
)


def build_evaluators(
  config: Any,
  *,
  model: Any,
  mesh: Any,
  rules: Any,
  dataset: Any = None,
  tokenizer_hash: str | None = None,
) -> dict[str, Any]:
  """The evaluators that `config.eval` names, each with `.every` and `.run`.

  Args:
    config: the resolved configuration; `data` (path, image_attention, and budget with
      the rules of its media) and `eval` are read.
    model: the module.
    mesh, rules: as in training.
    dataset: instead of the prepared data at `config.data.path` (for tests).
    tokenizer_hash: what the model was trained with, if it is to be checked.

  Raises:
    ValueError: an unknown evaluator or field, with the choices; no such data, or
      data of another tokenizer.
  """
  from mmjax.data.store import Dataset
  from mmjax.train.build import budget_of, rules_of

  built = {}
  for name in config.eval:
    cls = pick('evaluator', name, EVALUATORS)
    fields = dict(config.eval[name])
    fields = {k: v.to_dict() if hasattr(v, 'to_dict') else v for k, v in fields.items()}
    split = fields.pop('split', 'test')
    known = inspect.signature(cls).parameters
    from_split = 'train'
    if 'pool' in known:
      from_split = fields.pop('shots_split', from_split)
    allowed = [f for f in known if f not in _OURS]
    for field in fields:
      if field not in allowed:
        near = closest(field, [*allowed, 'split', 'shots_split'])
        raise ValueError(f'eval.{name} has no field {field!r}{near}')
    data = dataset
    if data is None:
      data = Dataset(config.data.path, split, tokenizer_hash)
    media_rules = rules_of(config)
    ours = dict(
      dataset=data,
      model=model,
      mesh=mesh,
      # Rows of other lengths than in training may not divide over a stream's devices.
      rules=rules if 'budget' in known else sharding.whole_stream(rules),
      media_rules=media_rules,
      image_attention=config.data.image_attention,
      prompt_attention=config.data.prompt_attention,
      image_positions=config.data.image_positions,
    )
    if fields.get('shots') and dataset is None and from_split != split:
      ours['pool'] = Dataset(config.data.path, from_split, tokenizer_hash)
    if 'budget' in known:
      ours['budget'] = budget_of(config, media_rules)
    built[name] = cls(**{k: v for k, v in ours.items() if k in known}, **fields)
  return built
