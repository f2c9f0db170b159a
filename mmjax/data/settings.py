"""How a dataset is prepared, as `prepare` and its worker processes are told."""

import dataclasses
from typing import Any

from mmjax.data import media
from mmjax.data import rules as rules_lib
from mmjax.data import writer as writer_lib


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to prepare; see `prepare`. Only the first seven change what is made."""

  splits: tuple[str, ...] | None = None
  max_pixels: int = media.MAX_PIXELS
  rules: rules_lib.Rules = rules_lib.Rules()
  scorer: rules_lib.Scorer | None = None
  chat_template: str | None = None
  delimiters: str | None = None
  shard_bytes: int = writer_lib.SHARD_BYTES
  max_dropped: float = 0.5
  workers: int = 0
  progress: bool = True

  def __post_init__(self):
    if not 0 <= self.max_dropped <= 1:
      raise ValueError(f'max_dropped={self.max_dropped} is no share')
    if self.workers < 0:
      raise ValueError(f'workers={self.workers} must be >= 0')
    if (self.scorer is None) != (self.rules.min_similarity is None):
      raise ValueError('a scorer and the rule min_similarity need each other')
    if self.delimiters and self.rules.unique_images:
      raise ValueError(
        'the rule unique_images takes images out once delimiters stand around them;'
        ' choose one of both'
      )

  def made_from(self) -> dict[str, Any]:
    """What of this the data depends on, as plain data."""
    fields = dataclasses.fields(rules_lib.Rules)
    rules = {f.name: getattr(self.rules, f.name) for f in fields
             if getattr(self.rules, f.name) != f.default}  # fmt: skip
    return {
      'requested_splits': list(self.splits) if self.splits else None,
      'max_pixels': self.max_pixels,
      'rules': rules,
      'scorer': _name(self.scorer),
      'chat_template': self.chat_template,
      'delimiters': self.delimiters,
    }


def _name(scorer: Any) -> str | None:
  if scorer is None or dataclasses.is_dataclass(scorer):
    return scorer and repr(scorer)
  named = scorer if hasattr(scorer, '__qualname__') else type(scorer)
  return f'{named.__module__}.{named.__qualname__}'
