"""Models by name: `build('unified', vocab_size=512, num_layers=4, ...)`.

A model's parts are its fields, modules again, and built of plain values the same way:

  build('flamingo', lm=dict(name='unified', ...), vision=dict(name='vit', ...),
        resampler=dict(num_latents=64), vocab_size=512, media=(('image', 768),))

What the data says is told once, at the top, and goes where it is a field: `vocab_size`
to language models, `channels` of the media to encoders.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from mmjax.batch import Bank, BankBudget, Budget, PackedBatch
from mmjax.models.dual import Dual
from mmjax.models.encoded import Encoded
from mmjax.models.flamingo import Flamingo
from mmjax.models.late import Late
from mmjax.models.text import Encoder
from mmjax.models.unified import Unified
from mmjax.names import closest
from mmjax.nn.efficientnet import EfficientNet
from mmjax.nn.nfnet import NFNet
from mmjax.nn.projector import (
  LinearProjector,
  MlpProjector,
  PoolProjector,
  ResamplerProjector,
)
from mmjax.nn.resnet import ResNet
from mmjax.nn.vit import Vit

MODELS = {
  'dual': Dual,
  'encoded': Encoded,
  'encoder': Encoder,
  'flamingo': Flamingo,
  'late': Late,
  'unified': Unified,
}
# Parts of models that take a bank of media, see `nn.features`.
ENCODERS = {
  'efficientnet': EfficientNet,
  'nfnet': NFNet,
  'resnet': ResNet,
  'vit': Vit,
}
# Parts between an encoder and a language model, see `nn.projector`.
PROJECTORS = {
  'linear': LinearProjector,
  'mlp': MlpProjector,
  'pool': PoolProjector,
  'resampler': ResamplerProjector,
}


def build(name: str, *, shared: Mapping[str, Any] = {}, **fields: Any) -> nn.Module:  # noqa: B006
  """Builds a model, or an encoder alone, from plain values, as a config holds them.

  Args:
    name: of `MODELS` or `ENCODERS`.
    shared: fields for the model and all of its parts that have them, e.g. dtype, where
      they aren't said.
    **fields: of the model.

  Raises:
    ValueError: an unknown name or field (with the closest right one), a missing
      field, or a value of the wrong type.
  """
  classes = MODELS | ENCODERS
  if name not in classes:
    raise ValueError(f'unknown model {name!r}{closest(name, MODELS)}')
  known = fields_of(classes[name])
  told = {**shared}
  if 'vocab_size' in fields:
    told['vocab_size'] = fields['vocab_size']
  if media := fields.get('media'):
    told['channels'] = media[0][1]
  fields = {k: v for k, v in fields.items() if k in known or k != 'vocab_size'}
  fields = {k: v for k, v in shared.items() if k in known} | fields
  return _make(f'model {name!r}', classes[name], fields, told)


def padding(model: nn.Module) -> PackedBatch | Bank:
  """The least input of a model or an encoder, nothing but padding: good for `init`."""
  if isinstance(model, tuple(ENCODERS.values())):
    return (
      Budget(2, 1, {'image': BankBudget(1, 1, model.channels)}).empty(1).bank['image']
    )
  bank = {kind: BankBudget(1, 1, C) for kind, C in getattr(model, 'media', ())}
  return Budget(2, 1, bank).empty(1)


def part_of(want: Any, fields: Mapping[str, Any], where: str = 'part') -> type | None:
  """The class of a part: by its name, or the one that a field's type allows.

  Args:
    want: the type of the model's field.
    fields: plain values of the part, perhaps with its 'name'.
    where: for the error.

  Returns:
    The class; None, if the field is not one for a part.

  Raises:
    ValueError: an unknown name.
  """
  if not (isinstance(want, type) and issubclass(want, nn.Module)):
    return None
  parts = MODELS | ENCODERS | PROJECTORS
  parts = {k: v for k, v in parts.items() if issubclass(v, want)}
  if 'name' not in fields and len(parts) <= 1:
    return next(iter(parts.values()), want)
  if fields.get('name') not in parts:
    name = fields.get('name')
    raise ValueError(f'{where}: unknown name {name!r}{closest(name, parts)}')
  return parts[fields['name']]


def fields_of(cls: type) -> dict[str, dataclasses.Field]:
  """The fields of a module that a config may set, by name."""
  return {f.name: f for f in dataclasses.fields(cls) if f.name not in ('parent', 'name')}


def _make(where: str, cls: type, fields: Mapping[str, Any], told: dict[str, Any]):
  known, types_ = fields_of(cls), typing.get_type_hints(cls)
  for field in fields:
    if field not in known:
      raise ValueError(f'{where} has no field {field!r}{closest(field, known)}')
  made = {}
  for field, spec in known.items():
    value = fields.get(field)
    if isinstance(value, Mapping):
      inside = f'{where}: {field}'
      part = part_of(types_[field], value, inside)
      if part is not None:
        rest = {k: v for k, v in value.items() if k != 'name'}
        rest |= {k: v for k, v in told.items() if k in fields_of(part) and k not in rest}
        made[field] = _make(inside, part, rest, told)
        continue
    if field in fields:
      made[field] = _convert(where, field, types_[field], value)
    elif spec.default is spec.default_factory is dataclasses.MISSING:
      raise ValueError(f'{where} needs field {field!r}')
  return cls(**made)


def _convert(where, field, want, value):
  """The value as the field's type wants it: lists become tuples, ints floats."""
  if isinstance(value, list | tuple):
    value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
  if want is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if not _fits(value, want):
    text = want.__name__ if isinstance(want, type) else str(want)
    raise ValueError(
      f'{where}: field {field!r} must be {text}, got {value!r} ({type(value).__name__})'
    )
  return value


def _fits(value, want) -> bool:
  if want is Any:
    return True
  origin, args = typing.get_origin(want), typing.get_args(want)
  if origin in (typing.Union, types.UnionType):
    return any(_fits(value, a) for a in args)
  if origin is tuple:
    if not isinstance(value, tuple):
      return False
    if args[-1:] == (Ellipsis,):
      return all(_fits(v, args[0]) for v in value)
    return len(value) == len(args) and all(_fits(v, a) for v, a in zip(value, args))
  if want is int and isinstance(value, bool):
    return False
  return isinstance(value, origin or want)
