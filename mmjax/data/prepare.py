"""Prepares a dataset: source records to documents, a tokenizer, lengths, on disk.

python -m mmjax.data.prepare easy_vqa --out data/easy_vqa --tokenizer=bpe:512
python -m mmjax.data.prepare jsonl:pages.jsonl --out data/pages
"""

import argparse
import os
import sys
from typing import Any

import tqdm

from mmjax.data import media, sources, store
from mmjax.data import tokenizer as tokenizer_lib
from mmjax.data.document import BadDocument, Document, Text


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
    tokenizer: 'bytes', 'bpe:N' (trained on the first split) or a path.
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

  def records():
    for split, document in made.records():
      if splits is None or split in splits:
        yield split, document

  def texts():
    first = None
    for split, document in records():
      if isinstance(document, Document) and split == (first := first or split):
        yield from (span.text for span in document.spans if isinstance(span, Text))

  info = {**made_from, 'fingerprint': fingerprint}
  made_tokenizer = tokenizer_lib.from_spec(tokenizer, texts, end)
  bar = tqdm.tqdm(
    records(),
    f'preparing {source}',
    made.total(),
    unit=' documents',
    disable=not progress,
  )
  with store.Writer(out, made_tokenizer, info, max_pixels=max_pixels) as writer:
    for split, document in bar:
      try:
        if isinstance(document, BadDocument):
          raise document
        writer.add(split, document)
      except BadDocument as error:
        writer.drop(error.reason)
    for split in splits or (None,):
      if not writer.counts if split is None else split not in writer.counts:
        raise ValueError(
          f'{source}: nothing usable{f" in split {split}" if split else ""}; '
          f'dropped: {dict(writer.dropped) or "nothing"}'
        )
  return store.read_meta(out)


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
  dropped = ', '.join(f'{n:,} {reason}' for reason, n in meta['dropped'].items())
  return '\n'.join([*lines, f'dropped: {dropped or "none"}'])


def main(argv: list[str] | None = None) -> int:
  """The command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog='python -m mmjax.data.prepare',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('source', help=sources.__doc__.split('\n')[0])
  parser.add_argument('--out', required=True, help='directory of the dataset')
  parser.add_argument('--tokenizer', default='bytes', help='bytes, bpe:N or a path')
  parser.add_argument('--end', help="name of the tokenizer's end token")
  parser.add_argument('--splits', help='comma-separated; default: all')
  parser.add_argument('--max-pixels', type=int, default=media.MAX_PIXELS)
  args = parser.parse_args(argv)
  try:
    meta = prepare(
      args.source,
      args.out,
      tokenizer=args.tokenizer,
      end=args.end,
      splits=tuple(args.splits.split(',')) if args.splits else None,
      max_pixels=args.max_pixels,
    )
  except ValueError as error:
    print(f'prepare: {error}', file=sys.stderr)
    return 1
  print(f'{args.out}\n{report(meta)}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
