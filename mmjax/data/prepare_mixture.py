"""Prepares several sources for a mixture: a dataset each, with one tokenizer.

  {"pages": {"source": "html:manual/en", "options": {"max_words": 128}},
   "pairs": {"source": "jsonl:pairs.jsonl", "rules": {"min_side": 64}, "share": 2}}

  out/tokenizer/    what all were prepared with
  out/pages/        a dataset; out/pairs/ another, as of `prepare`

Options, rules and splits are those of `prepare`. The tokenizer 'bpe:N' is trained on the
first split of each, in proportion to `share` (1 where not given) of `TRAINING_TEXT`
characters; a source that has less gives what it has.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from mmjax import files
from mmjax.data import prepare as prepare_lib
from mmjax.data import rules as rules_lib
from mmjax.data import sources
from mmjax.data import tokenizer as tokenizer_lib
from mmjax.data.source import Source
from mmjax.names import closest

_KEYS = ('source', 'options', 'rules', 'splits', 'share')


@dataclasses.dataclass(frozen=True)
class _Member:
  source: Source
  settings: prepare_lib.Settings
  made_from: dict[str, Any]
  share: float


def read(path: str | os.PathLike) -> dict[str, dict[str, Any]]:
  """The mixture of a JSON file.

  Raises:
    ValueError: no such file, or no JSON object.
  """
  try:
    tree = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  except OSError as error:
    raise ValueError(f'mixture {path}: {error.strerror}') from None
  except ValueError as error:
    raise ValueError(f'mixture {path}: no JSON: {error}') from None
  if not isinstance(tree, dict):
    raise ValueError(f'mixture {path}: no object of names and sources')
  return tree


def prepare_mixture(
  mixture: dict[str, dict[str, Any]],
  out: str | os.PathLike,
  *,
  tokenizer: str = 'bytes',
  end: str | None = None,
  splits: tuple[str, ...] | None = None,
  **settings: Any,
) -> dict[str, dict[str, Any]]:
  """Prepares each source of `mixture` into `out`/NAME.

  Args:
    mixture: by name, see above; all of it is checked before anything is read.
    out: the directory of all; what is there and made the same way stays.
    tokenizer, end: as of `prepare`.
    splits: of those sources that don't name theirs.
    **settings: `Settings` of all: max_pixels, scorer (for those that have the rule
      `min_similarity`), max_dropped, workers, progress.

  Returns:
    The meta.json of each by name.

  Raises:
    as `prepare`; errors name the source.
  """
  if not mixture:
    raise ValueError('mixture: names no source')
  members = {
    name: _member(name, entry, tokenizer, end, splits, settings)
    for name, entry in mixture.items()
  }
  out = files.on_disk(out, '--out')

  def texts() -> Iterator[str]:
    shares = sum(member.share for member in members.values())
    for member in members.values():
      most = round(prepare_lib.TRAINING_TEXT * member.share / shares)
      yield from prepare_lib.texts(member.source, member.settings.splits, most)

  made = _tokenizer(out, members, lambda: tokenizer_lib.from_spec(tokenizer, texts, end))
  metas = {}
  for name, member in members.items():
    try:
      metas[name] = prepare_lib.make(
        out / name, member.source, member.made_from, made, member.settings
      )
    except ValueError as error:
      raise ValueError(f'mixture {name!r}: {error}') from None
  return metas


def _member(name, entry, tokenizer, end, splits, settings) -> _Member:
  where = f'mixture {name!r}'
  if pathlib.PurePath(name).name != name or name.startswith('.') or name == 'tokenizer':
    raise ValueError(f'{where}: no plain name of a directory')
  if not isinstance(entry, dict):
    raise ValueError(f'{where}: {entry!r} is no object with "source"')
  for key in entry:
    if key not in _KEYS:
      raise ValueError(f'{where}: unknown key {key!r}{closest(key, _KEYS)}')
  spec, options = entry.get('source'), entry.get('options', {})
  if not isinstance(spec, str):
    raise ValueError(f'{where}: "source" must be a string, not {spec!r}')
  for key in ('options', 'rules'):
    if not isinstance(entry.get(key, {}), dict):
      raise ValueError(f'{where}: {key!r} must be an object')
  share, own = entry.get('share', 1), entry.get('splits', splits)
  if isinstance(share, bool) or not isinstance(share, (int, float)) or share <= 0:
    raise ValueError(f'{where}: share {share!r} must be a number > 0')
  if own is not None and (isinstance(own, str) or not all(map(_is_text, own))):
    raise ValueError(f'{where}: "splits" must be a list of names')
  try:
    rules = rules_lib.build(entry.get('rules', {}))
    scorer = settings.get('scorer') if rules.min_similarity is not None else None
    made = prepare_lib.Settings(
      splits=tuple(own) if own else None,
      rules=rules,
      **{**settings, 'scorer': scorer},
    )
    source = sources.build(spec, **options)
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from None
  made_from = {'source': spec, 'options': options, 'tokenizer': tokenizer, 'end': end}
  return _Member(source, made, made_from, share)


def _is_text(value) -> bool:
  return isinstance(value, str)


def _tokenizer(out, members, make) -> tokenizer_lib.Tokenizer:
  """The tokenizer of all: that of an earlier run if it was made from the same."""
  begun = json.dumps(
    [
      [name, m.made_from, m.settings.splits, m.share, m.source.fingerprint()]
      for name, m in members.items()
    ]
  )
  kept, key = out / 'tokenizer', out / 'tokenizer' / 'made_from.json'
  if key.exists() and key.read_text() == begun:
    return tokenizer_lib.load(kept)
  made = make()
  kept.mkdir(parents=True, exist_ok=True)
  key.unlink(missing_ok=True)
  made.save(kept)
  fresh = kept / '.made_from.json'
  fresh.write_text(begun)
  os.replace(fresh, key)
  return made
