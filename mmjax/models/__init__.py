"""Models by name: `build('unified', vocab_size=512, num_layers=4, ...)`."""

import dataclasses
import types
import typing
from typing import Any

import flax.linen as nn

from mmjax.models.flamingo import Flamingo
from mmjax.models.text import Encoder
from mmjax.models.unified import Unified
from mmjax.names import closest

MODELS = {'encoder': Encoder, 'flamingo': Flamingo, 'unified': Unified}


def build(name: str, **fields: Any) -> nn.Module:
  """Builds a model from plain values, as a config holds them.

  Raises:
    ValueError: an unknown name or field (with the closest right one), a missing
      field, or a value of the wrong type.
  """
  if name not in MODELS:
    raise ValueError(f'unknown model {name!r}{closest(name, MODELS)}')
  cls = MODELS[name]
  types_ = typing.get_type_hints(cls)
  known = {f.name: f for f in dataclasses.fields(cls) if f.name not in ('parent', 'name')}
  for field in fields:
    if field not in known:
      raise ValueError(f'model {name!r} has no field {field!r}{closest(field, known)}')
  for field, spec in known.items():
    required = spec.default is dataclasses.MISSING
    if required and spec.default_factory is dataclasses.MISSING and field not in fields:
      raise ValueError(f'model {name!r} needs field {field!r}')
  return cls(**{f: _convert(name, f, types_[f], value) for f, value in fields.items()})


def _convert(model, field, want, value):
  """The value as the field's type wants it: lists become tuples, ints floats."""
  if isinstance(value, list | tuple):
    value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
  if want is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if not _fits(value, want):
    text = want.__name__ if isinstance(want, type) else str(want)
    raise ValueError(
      f'model {model!r}: field {field!r} must be {text}, got {value!r}'
      f' ({type(value).__name__})'
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
