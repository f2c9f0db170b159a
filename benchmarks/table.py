"""Prints the report of a benchmark as the README's table.

python benchmarks/train_step.py > report.json
python benchmarks/table.py report.json
"""

import json
import pathlib
import sys

NAMES = {
  'mmjax': 'mmjax',
  'torch': 'PyTorch, logits of all positions',
  'torch-trained': 'PyTorch, logits of trained positions',
  'torch-bf16': 'PyTorch, bfloat16, logits of trained positions',
}
COLUMNS = {
  'seconds': 'seconds',
  'cpu_seconds': 'CPU-seconds',
  'useful_per_second': 'useful tokens/s',
  'fill': 'share of slots that are useful',
  'peak_gb': 'peak GB',
  'mmjax_is_faster': 'mmjax is faster by',
}


def table(results):
  """Markdown of one case: {contestant: {column: number}}."""
  lines = [['', *COLUMNS.values()], ['---'] * (1 + len(COLUMNS))]
  for name, r in results.items():
    plain = name.removesuffix(' unlocked')
    label = NAMES.get(plain, plain) + (', MKL unlocked' if plain != name else '')
    lines.append([label, *(str(r.get(c, '')) for c in COLUMNS)])
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def main():
  report = json.loads(pathlib.Path(sys.argv[1]).read_text().splitlines()[-1])
  facts = ('processor', 'devices', 'threads', 'model')
  print(', '.join(f'{k}: {report[k]}' for k in facts if k in report))
  for case in ('fixed', 'mixture'):
    if case in report:
      print(f'\n{case}\n\n{table(report[case])}')


if __name__ == '__main__':
  main()
