"""Prepares a dataset: source records to documents, a tokenizer, lengths, on disk.

python -m mmjax.data.prepare easy_vqa --out data/easy_vqa --tokenizer=bpe:512
python -m mmjax.data.prepare jsonl:pages.jsonl --out data/pages
python -m mmjax.data.prepare html:manual/en --out data/manual --html-max-words=128
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import tqdm

from mmjax.data import media, sources, store
from mmjax.data import tokenizer as tokenizer_lib
from mmjax.data import writer as writer_lib
from mmjax.data.document import BadDocument, Text


def prepare(
  source: str,
  out: str | os.PathLike,
  *,
  tokenizer: str = 'bytes',
  end: str | None = None,
  splits: tuple[str, ...] | None = None,
  max_pixels: int = media.MAX_PIXELS,
  progress: bool = True,
  **options: Any,
) -> dict[str, Any]:
  """Prepares `source` into the directory `out`, or finds it done there already.

  Args:
    source: see `sources`.
    out: the dataset's directory.
    tokenizer: 'bytes', 'bpe:N' (trained on the first split) or a path, see `tokenizer`.
    end: the tokenizer's end token, where it isn't one of the usual.
    splits: which splits to prepare; all by default.
    max_pixels: images above it are dropped.
    progress: show a bar.
    **options: of the source.

  Returns:
    The dataset's meta.json.

  Raises:
    ValueError: a wrong source or tokenizer, another dataset at `out`, nothing
      usable in the source.
    OSError: the disk is full; nothing is left behind.
  """
  made_from = {
    'source': source,
    'options': options,
    'tokenizer': tokenizer,
    'end': end,
    'requested_splits': list(splits) if splits else None,
    'max_pixels': max_pixels,
  }
  made = sources.build(source, **options)
  fingerprint = made.fingerprint()
  if os.path.exists(os.path.join(out, 'meta.json')):
    return _reuse(out, made_from, fingerprint)

  made_tokenizer = tokenizer_lib.from_spec(tokenizer, lambda: _texts(made, splits), end)
  info = {**made_from, 'fingerprint': fingerprint}
  try:
    with writer_lib.Writer(out, made_tokenizer, info, max_pixels=max_pixels) as writer:
      records = tqdm.tqdm(
        made.records(splits),
        desc=f'preparing {source if len(source) < 40 else source[:37] + "..."}',
        total=made.total(splits),
        unit=' docs',
        disable=not progress,
      )
      for split, document in records:
        try:
          if isinstance(document, BadDocument):
            writer.drop(document)
          else:
            writer.add(split, document)
        except BadDocument as error:
          writer.drop(error, document.id)
      _check_any(source, writer, splits)
  except writer_lib.InUse:
    if not os.path.exists(os.path.join(out, 'meta.json')):
      raise
    return _reuse(out, made_from, fingerprint)  # another process was faster
  return store.read_meta(out)


def _texts(source, splits) -> Iterator[str]:
  """The texts of the first split, to train a tokenizer on; the others stay unseen."""
  first = splits[0] if splits else None
  for split, document in source.records(splits):
    if isinstance(document, BadDocument):
      continue
    first = first or split
    if split == first:
      yield from (span.text for span in document.spans if isinstance(span, Text))


def _check_any(source, writer, splits):
  missing = [split for split in splits or () if split not in writer.counts]
  if missing or not writer.counts:
    where = f' in split {missing[0]!r}' if missing else ''
    raise ValueError(
      f'{source}: nothing usable{where}; splits: {", ".join(writer.counts) or "none"}; '
      f'dropped: {_drops(writer.dropped)}'
    )


def _reuse(out, made_from, fingerprint) -> dict[str, Any]:
  meta = store.read_meta(out)
  want = {**made_from, 'fingerprint': fingerprint or meta.get('fingerprint')}
  for key, value in want.items():
    if meta.get(key) != value:
      raise ValueError(
        f'{out} was prepared with {key}={meta.get(key)!r}, not {value!r}; remove it or '
        'choose another directory'
      )
  return meta


def report(meta: dict[str, Any]) -> str:
  """The counts of a dataset as a few lines of text."""
  lines = []
  for name, split in meta['splits'].items():
    counts = [f'{n:,} {what}' for what, n in split.items() if what != 'shards']
    lines.append(f'{name}: ' + ', '.join(counts).replace('_', ' '))
  lines.append(f'dropped: {_drops(meta["dropped"])}')
  for reason, message in sorted(meta['dropped_first'].items()):
    lines.append(f'  first {reason}: {message}')
  return '\n'.join(lines)


def _drops(dropped: dict[str, int]) -> str:
  return ', '.join(f'{n:,} {reason}' for reason, n in dropped.items()) or 'none'


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


def main(argv: list[str] | None = None) -> int:
  """The command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog='python -m mmjax.data.prepare',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    'source', help='a source, e.g. jsonl:FILE or html:DIR; see mmjax.data.sources'
  )
  parser.add_argument('--out', required=True, help='directory of the dataset')
  parser.add_argument('--tokenizer', default='bytes', help='bytes, bpe:N or a path')
  parser.add_argument('--end', help="name of the tokenizer's end token")
  parser.add_argument('--splits', help='comma-separated; default: all')
  parser.add_argument('--max-pixels', type=int, default=media.MAX_PIXELS)
  for source, fields in _options().items():
    for name, default in fields.items():
      flag = f'--{source}-{name.replace("_", "-")}'
      parser.add_argument(flag, dest=name, type=_value, help=f'default: {default}')
  args = parser.parse_args(argv)
  options = {name: getattr(args, name) for some in _options().values() for name in some}
  try:
    meta = prepare(
      args.source,
      args.out,
      tokenizer=args.tokenizer,
      end=args.end,
      splits=tuple(args.splits.split(',')) if args.splits else None,
      max_pixels=args.max_pixels,
      **{name: value for name, value in options.items() if value is not None},
    )
  except (ValueError, OSError) as error:
    print(f'prepare: {error}', file=sys.stderr)
    return 1
  print(f'{args.out}\n{report(meta)}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
