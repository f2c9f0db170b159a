"""Prints reports of benchmarks/train_step.py as the README's tables.

python benchmarks/train_step.py --model=unified,flamingo,clip > report.jsonl
python benchmarks/table.py report.jsonl             # to stdout
python benchmarks/table.py report.jsonl README.md   # between the marks in that file

Lines of the same case, as of pairs of contestants, make one table. The marks are lines of
their own: `<!-- train_step -->` and `<!-- /train_step -->`.
"""

import json
import pathlib
import sys

MARKS = '<!-- train_step -->', '<!-- /train_step -->'
NAMES = {
  'mmjax': 'mmjax',
  'mmjax-bf16': 'mmjax, bfloat16',
  'torch': 'PyTorch',
  'torch-trained': 'PyTorch, logits of trained positions alone',
  'torch-bf16': 'PyTorch, bfloat16',
}
COLUMNS = {
  'seconds': 'seconds',
  'cpu_seconds': 'CPU-seconds',
  'trained_per_second': 'trained tokens/s',
  'useful_per_second': 'useful tokens/s',
  'fill': 'slots in use',
  'peak_gb': 'peak GB',
  'ceiling_gflops': 'product, GFLOP/s',
  'ceiling_share': 'share of it',
  'mmjax_is_faster': 'mmjax is faster by',
}
WHAT = {'fixed': 'full rows', 'mixture': 'documents of mixed lengths'}


def joined(reports):
  """Reports in which those of one case, e.g. of pairs of contestants, are one."""
  made = {}
  for r in reports:
    # All that a run was told, devices too; what it found is its own.
    case = json.dumps({k: x for k, x in r.items() if k not in ('results', 'same_loss')})
    earlier = made.get(case, {'results': {}})['results']
    made[case] = {**r, 'results': {**earlier, **r['results']}}
  return made.values()


def table(results):
  """Markdown of one case: {contestant: {column: number}}; columns that have numbers."""
  found = {c for r in results.values() for c in r}
  columns = {c: name for c, name in COLUMNS.items() if c in found}
  lines = [['', *columns.values()], ['---'] * (1 + len(columns))]
  for name, r in results.items():
    plain = name.removesuffix(' unlocked')
    label = NAMES.get(plain, plain) + (', MKL unlocked' if plain != name else '')
    lines.append([label, *(str(r.get(c, '')) for c in columns)])
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def tables(reports):
  """Markdown of reports, each under a line that says what it is of."""
  parts = []
  for r in joined(reports):
    threads = f'{r["threads"]} thread' + 's' * (r['threads'] > 1)
    how = f'{threads}, {r["malloc"]}'
    head = f'{r["model"]}, {WHAT[r["case"]]}; {r["processor"]}, {how}'
    parts.append(f'{head}:\n\n{table(r["results"])}\n')
  return '\n'.join(parts)


def put(text, made):
  """The text with what stands between the marks replaced.

  Raises:
    SystemExit: it hasn't both marks, each once and in this order.
  """
  start, end = MARKS
  if (
    text.count(start) != 1 or text.count(end) != 1 or text.index(end) < text.index(start)
  ):
    raise SystemExit(f'needs the lines {start} and {end}')
  before, after = text.partition(start)[0], text.partition(end)[2]
  return f'{before}{start}\n\n{made}\n{end}{after}'


def main():
  path, *into = map(pathlib.Path, sys.argv[1:])
  lines = [x for x in path.read_text().splitlines() if x.startswith('{')]
  made = tables(map(json.loads, lines))
  if not into:
    print(made)
    return
  into[0].write_text(put(into[0].read_text(), made))


if __name__ == '__main__':
  main()
