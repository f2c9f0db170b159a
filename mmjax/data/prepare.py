"""Prepares a dataset: source records to documents, a tokenizer, lengths, on disk.

python -m mmjax.data.prepare easy_vqa --out data/easy_vqa --tokenizer=bpe:512
python -m mmjax.data.prepare jsonl:pages.jsonl --out data/pages
python -m mmjax.data.prepare html:manual/en --out data/manual --html-max-words=128
python -m mmjax.data.prepare tfds:coco_captions --out data/coco --rules-min-side=64
python -m mmjax.data.prepare --mixture mixture.json --out data/mixture

Stopped by Ctrl-C or killed, the same command goes on from there. --rules-... are told in
mmjax/data/rules.py, mixtures in mmjax/data/prepare_mixture.py.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tqdm

from mmjax.data import chat, media, report, sources, store, workers
from mmjax.data import delimiters as delimiters_lib
from mmjax.data import parts as parts_lib
from mmjax.data import rules as rules_lib
from mmjax.data import tokenizer as tokenizer_lib
from mmjax.data import writer as writer_lib
from mmjax.data.document import BadDocument, Text
from mmjax.data.settings import Settings
from mmjax.data.source import Source

TRAINING_TEXT = 10**8  # characters that a tokenizer is trained on, at most
_ENOUGH = 1000  # records before the share of bad ones is looked at
_COUNT = '{desc}: {n_fmt} docs, {rate_fmt}'  # while the total isn't known
_BAR = '{desc}: {percentage:3.0f}%|{bar}| {n_fmt} docs, {rate_fmt}, ETA {remaining}'


def prepare(
  source: str,
  out: str | os.PathLike,
  *,
  tokenizer: str = 'bytes',
  end: str | None = None,
  splits: tuple[str, ...] | None = None,
  max_pixels: int = media.MAX_PIXELS,
  rules: rules_lib.Rules | dict[str, Any] | None = None,
  scorer: rules_lib.Scorer | None = None,
  chat_template: str | None = None,
  delimiters: str | None = None,
  max_dropped: float = 0.5,
  workers: int = 0,
  progress: bool = True,
  **options: Any,
) -> dict[str, Any]:
  """Prepares `source` into the directory `out`, or finds it done there already.

  What a call that was stopped or killed has done, the same call doesn't do again.

  Args:
    source: see `sources`.
    out: the dataset's directory.
    tokenizer: 'bytes', 'bpe:N' (trained on the first split) or a path, see `tokenizer`.
    end: the tokenizer's end token, where it isn't one of the usual.
    splits: which splits to prepare; all by default.
    max_pixels: images above it are dropped.
    rules: see `rules`.
    scorer: (u8[H, W, 3], text) -> similarity, for the rule `min_similarity`; with
      workers, one that pickles. It is known by its name alone.
    chat_template: how dialogues are written; see `chat`.
    delimiters: what stands around images and at the beginning; see `delimiters`.
    max_dropped: the share of records that may be unusable; what is left out because
      rules or the source's options say so doesn't count.
    workers: processes; 0 = in this one. The dataset is the same for any number.
    progress: show a bar.
    **options: of the source.

  Returns:
    The dataset's meta.json.

  Raises:
    ValueError: a wrong source, rule or tokenizer, another dataset at `out`, nothing
      usable in the source, or too little.
    OSError: the disk is full, or a file of the source is gone.
    workers.WorkerError: a worker process failed.
    workers.Stopped: Ctrl-C.
  """
  if not isinstance(rules, rules_lib.Rules):
    rules = rules_lib.build(rules or {})
  settings = Settings(
    tuple(splits) if splits else None,
    max_pixels,
    rules,
    scorer,
    chat_template,
    delimiters,
    max_dropped=max_dropped,
    workers=workers,
    progress=progress,
  )
  made = sources.build(source, **options)

  def make_tokenizer():
    return tokenizer_lib.from_spec(tokenizer, lambda: texts(made, settings.splits), end)

  made_from = {'source': source, 'options': options, 'tokenizer': tokenizer, 'end': end}
  return make(out, made, made_from, make_tokenizer, settings)


def make(
  out: str | os.PathLike,
  source: Source,
  made_from: dict[str, Any],
  tokenizer: tokenizer_lib.Tokenizer | Callable[[], tokenizer_lib.Tokenizer],
  settings: Settings,
) -> dict[str, Any]:
  """`prepare` of a built source.

  Args:
    made_from: what the caller knows the data by, 'source' and 'tokenizer' at least.
    tokenizer: one, or what makes it.
  """
  fingerprint = source.fingerprint()
  made_from = {**made_from, **settings.made_from()}
  if not callable(tokenizer):
    made_from['tokenizer_hash'] = tokenizer.hash
  if os.path.exists(os.path.join(out, 'meta.json')):
    return _reuse(out, made_from, fingerprint)
  pieces = list(source.pieces(settings.splits))
  info = {**made_from, 'fingerprint': fingerprint}
  begun = {**info, 'pieces': _digest(pieces)}
  if callable(tokenizer) and not made_from['tokenizer'].startswith('bpe:'):
    tokenizer = tokenizer()  # to train one takes long, so that is kept for a later run
  if not callable(tokenizer):
    begun['tokenizer_hash'] = tokenizer.hash
  try:
    with writer_lib.Place(out) as place:
      work = _work(place, begun)
      try:
        _make(place, work, source, pieces, info, tokenizer, settings)
      except BaseException as error:
        place.keep = bool(parts_lib.done(work)) and not isinstance(error, _Nothing)
        raise
  except writer_lib.InUse:
    if not os.path.exists(os.path.join(out, 'meta.json')):
      raise
    return _reuse(out, made_from, fingerprint)  # another process was faster
  return store.read_meta(out)


class _Nothing(ValueError):
  """Nothing usable; there is nothing to go on from."""


def _make(place, work, source, pieces, info, tokenizer, settings):
  name = info['source']
  if callable(tokenizer):
    tokenizer = _trained(work, tokenizer)
  if settings.chat_template:
    chat.check(settings.chat_template, tokenizer)
  if settings.delimiters:
    delimiters_lib.check(settings.delimiters, tokenizer)
  tasks = parts_lib.group(pieces)
  numbers = parts_lib.done(work)
  have = [parts_lib.read_part(work, number) for number in numbers]
  records, bad = (sum(part[key] for part in have) for key in ('records', 'bad'))
  before, finished = records, len(have)
  if have:
    _say(f'going on: {finished:,} of {len(tasks):,} parts are done already')
  total = source.total(settings.splits)
  bar = tqdm.tqdm(
    desc=f'preparing {name if len(name) < 40 else name[:37] + "..."}',
    total=total,
    initial=before,
    unit=' docs',
    bar_format=_COUNT if total is None else _BAR,
    disable=not settings.progress,
  )

  def progress(count):
    bar.update(before + count - bar.n)

  def done(task, part):
    nonlocal records, bad, finished
    records, bad, finished = records + part['records'], bad + part['bad'], finished + 1
    if total is None:  # as many in the parts to come as in those that are done
      bar.bar_format = _BAR
      bar.total = round(records * len(tasks) / finished)
    if records >= _ENOUGH:
      _check_share(name, records, bad, part['dropped'], settings)

  job = parts_lib.PartJob(source, work, tokenizer, settings)
  with bar:
    missing = [task for task in tasks if task[0] not in numbers]
    workers.run(job, missing, settings.workers, done, progress)
  shard = parts_lib.ShardJob(place.new, tokenizer, settings.max_pixels, settings.rules)
  splits, indexes, dropped, removed = parts_lib.assemble(
    work, shard, settings.shard_bytes, settings.workers
  )
  _check_any(name, settings.splits, splits, dropped)
  _check_share(name, records, bad, dropped.tree, settings)
  report.draw(place.new / 'report.png', indexes)
  info = {**info, 'removed': removed.counts, 'removed_first': removed.first}
  writer_lib.finish(place, tokenizer, info, splits, dropped)


def _work(place: writer_lib.Place, begun: dict[str, Any]) -> pathlib.Path:
  """The directory of this preparation's parts; what another one left is discarded."""
  begun = json.loads(json.dumps(begun))
  work = place.partial / f'work-{_digest(begun)[:12]}'
  for other in place.partial.glob('work-*'):
    if other == work:
      continue
    try:
      theirs = json.loads((other / 'begun.json').read_text())
      key = next(key for key in begun if theirs.get(key) != begun[key])
      why = f'{key}={_short(theirs.get(key))}, not {_short(begun[key])}'
    except (OSError, ValueError, StopIteration):
      why = 'something else'
    _say(f'discarding what was begun at {place.path} before: it was with {why}')
    shutil.rmtree(other)
  work.mkdir(exist_ok=True)
  fresh = work / '.begun.json'
  fresh.write_text(json.dumps(begun))
  os.replace(fresh, work / 'begun.json')
  return work


def _trained(work, make_tokenizer) -> tokenizer_lib.Tokenizer:
  """The tokenizer of an earlier run, or a new one that is kept for a later."""
  kept = work / 'tokenizer'
  if kept.exists():
    return tokenizer_lib.load(kept)
  tokenizer = make_tokenizer()
  fresh = work / '.tokenizer'
  fresh.mkdir(exist_ok=True)
  tokenizer.save(fresh)
  os.rename(fresh, kept)
  return tokenizer


def texts(
  source: Source, splits: Sequence[str] | None, most: int = TRAINING_TEXT
) -> Iterator[str]:
  """Texts of the first split, to train a tokenizer on; the others stay unseen.

  At most so many characters, from pieces all over the source.
  """
  first = splits[0] if splits else next((s for s, _ in source.records(splits)), None)
  pieces = list(source.pieces([first])) if first is not None else []
  random.Random(0).shuffle(pieces)
  for piece in pieces:
    for split, document in source.read(piece, [first]):
      if isinstance(document, BadDocument) or split != first:
        continue
      for span in document.spans:
        if isinstance(span, Text):
          if most <= 0:
            return
          most -= len(span.text)
          yield span.text


def _check_any(source, wanted, splits, dropped):
  missing = [split for split in wanted or () if split not in splits]
  if missing or not splits:
    where = f' in split {missing[0]!r}' if missing else ''
    raise _Nothing(
      f'{source}: nothing usable{where}; splits: {", ".join(splits) or "none"}; '
      f'dropped: {report.counted(dropped.counts)}'
    )


def _check_share(source, records, bad, dropped, settings):
  if bad > settings.max_dropped * records:
    reason, (_, message) = max(dropped.items(), key=lambda entry: entry[1][0])
    raise ValueError(
      f'{source}: {bad:,} of {records:,} records are unusable, more than the share '
      f'max_dropped={settings.max_dropped:g}; for example {reason}: {message}'
    )


def _reuse(out, made_from, fingerprint) -> dict[str, Any]:
  meta = store.read_meta(out)
  want = {**made_from, 'fingerprint': fingerprint or meta.get('fingerprint')}
  for key, value in json.loads(json.dumps(want)).items():
    if meta.get(key, {} if key == 'rules' else None) != value:
      raise ValueError(
        f'{out} was prepared with {key}={meta.get(key)!r}, not {value!r}; remove it or '
        'choose another directory'
      )
  return meta


def _digest(tree: Any) -> str:
  return hashlib.sha256(json.dumps(tree).encode()).hexdigest()


def _short(value: Any) -> str:
  said = repr(value)
  return said if len(said) <= 60 else said[:57] + '...'


def _say(line: str):
  print(f'prepare: {line}', file=sys.stderr, flush=True)


def _options() -> dict[str, dict[str, Any]]:
  """The options of sources that have some, by name, with their defaults."""
  fields = {name: dataclasses.fields(cls)[1:] for name, cls in sources.SOURCES.items()}
  return {n: {f.name: f.default for f in some} for n, some in fields.items() if some}


def _value(text: str) -> Any:
  """A number, true, false or null; anything else is a string."""
  try:
    return json.loads(text)
  except ValueError:
    return text


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m mmjax.data.prepare',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    'source', nargs='?', help=f'one of {", ".join(sources.SOURCES)}, as NAME:ARGUMENT'
  )
  parser.add_argument('--mixture', help='a JSON file of several sources')
  parser.add_argument('--out', required=True, help='directory of the dataset')
  parser.add_argument('--tokenizer', default='bytes', help='bytes, bpe:N or a path')
  parser.add_argument('--end', help="name of the tokenizer's end token")
  parser.add_argument('--splits', help='comma-separated; default: all')
  parser.add_argument('--chat-template', help=f'one of {", ".join(chat.TEMPLATES)}')
  parser.add_argument(
    '--delimiters', help=f'one of {", ".join(delimiters_lib.DELIMITERS)}'
  )
  parser.add_argument('--max-pixels', type=int, default=media.MAX_PIXELS)
  parser.add_argument('--max-dropped', type=float, default=0.5, metavar='SHARE',
                      help='stop if more records than that are unusable')  # fmt: skip
  parser.add_argument('--workers', type=int, default=os.cpu_count() or 1,
                      help='processes; 0: in this one; default: %(default)s')  # fmt: skip
  for field in dataclasses.fields(rules_lib.Rules):
    flag = f'--rules-{field.name.replace("_", "-")}'
    parser.add_argument(flag, dest=f'rules.{field.name}', type=_value, metavar='VALUE')
  for source, fields in _options().items():
    for name, default in fields.items():
      flag = f'--{source}-{name.replace("_", "-")}'
      parser.add_argument(flag, dest=f'options.{name}', type=_value, metavar='VALUE',
                          help=f'default: {default}')  # fmt: skip
  return parser


def main(argv: list[str] | None = None) -> int:
  """The command line; returns the exit code."""
  args = _parser().parse_args(argv)
  given = {'rules': {}, 'options': {}}
  for name, value in vars(args).items():
    section, _, key = name.rpartition('.')
    if section and value is not None:
      given[section][key] = value
  common = {
    'tokenizer': args.tokenizer,
    'end': args.end,
    'splits': tuple(args.splits.split(',')) if args.splits else None,
    'max_pixels': args.max_pixels,
    'chat_template': args.chat_template,
    'delimiters': args.delimiters,
    'max_dropped': args.max_dropped,
    'workers': args.workers,
  }
  try:
    if bool(args.source) == bool(args.mixture):
      raise ValueError('name a source, or a file with --mixture')
    if args.mixture:
      return _main_mixture(args, given, common)
    prepare(args.source, args.out, rules=given['rules'], **common, **given['options'])
  except (ValueError, OSError, workers.WorkerError) as error:
    print(f'prepare: {" ".join(str(error).split())}', file=sys.stderr)
    return 1
  except KeyboardInterrupt as error:
    if not isinstance(error, workers.Stopped):
      print(file=sys.stderr)  # behind the ^C
    _say('stopped; the same command goes on from here')
    return 130
  _print_report(args.out)
  return 0


def _main_mixture(args, given, common) -> int:
  from mmjax.data import prepare_mixture

  for section, some in given.items():
    if some:
      name = next(iter(some))
      raise ValueError(f'{section} of a mixture, like {name}, stand in its file')
  mixture = prepare_mixture.read(args.mixture)
  for name in prepare_mixture.prepare_mixture(mixture, args.out, **common):
    _print_report(os.path.join(args.out, name))
  return 0


def _print_report(path):
  meta = store.read_meta(path)
  indexes = {
    split: store.read_index(pathlib.Path(path) / split / 'index.npz')
    for split in meta['splits']
  }
  print(f'{path}\n{report.text(meta, indexes)}')


if __name__ == '__main__':
  sys.exit(main())
