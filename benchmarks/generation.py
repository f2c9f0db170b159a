"""Greedy text after two pictures and 32 words, beside transformers, on this machine.

  python benchmarks/generation.py            # needs the extra `parity` (CPU torch)

Both sides read the same files, drawn once (`torch_generation.py`): Idefics for the
Flamingo type, Fuyu for the unified one; before anything is timed, mmjax' greedy tokens
are compared with those of transformers in float32, as the share that is equal before
the first that isn't. Every contestant lives in a process of its own; rounds alternate;
medians are reported, as one JSON line for each case:

  prefill_per_second   slots of the prompts, from the pictures to the first new token
  decode_per_second    new tokens after the first, of all rows
  new_per_second       new tokens over all of the time

transformers runs in float32 and bfloat16, with its default cache and with a static one;
mmjax in float32 and bfloat16. `faster_by` is the best of mmjax over the best of
transformers in new tokens per second.

`--table` prints lines written before as a table.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np
from contestant import MALLOCS, Contestant, environment, memory, take_turns
from prompts_generation import IMAGES, PATCH, SIDE, SLOTS, WORDS, patches, prompts

CONTESTANTS = (
  'mmjax', 'mmjax-bf16', 'transformers', 'transformers-bf16', 'transformers-static',
  'transformers-bf16-static',
)  # fmt: skip
NEVER = -1  # an end that no token is: all of `new` tokens are written
NEW = 128


def packed(name, words, pixels):
  """The prompts as a `PackedBatch`: both pictures, then the words, causal."""
  from mmjax.batch import PLACEHOLDER, BankBudget, Budget

  B, n, slots = len(words), SIDE // PATCH, SLOTS[name]
  media = IMAGES * slots
  T = media + words.shape[1]
  values = patches(pixels).reshape(B, IMAGES * n * n, -1)
  bank = BankBudget(values.shape[1], IMAGES, values.shape[2], 'float32')
  batch = Budget(T, 1, {'image': bank}).empty(B)
  s, bank = batch.stream, batch.bank['image']
  s.tokens[:, :media] = PLACEHOLDER['image']
  s.tokens[:, media:] = words
  s.segment_ids[:] = 1
  s.order[:] = s.last[:] = np.arange(T)
  s.positions[:] = np.arange(T)[:, None]
  s.source[:, :media] = np.arange(media)
  bank.values[:] = values
  bank.items[:] = np.repeat(np.arange(IMAGES), n * n) + 1
  grid = [[0, r, c] for r in range(n) for c in range(n)]
  bank.positions[:] = np.tile(grid, (IMAGES, 1))
  bank.item_segments[:] = 1
  bank.item_order[:] = slots * np.arange(IMAGES)
  return batch


class Mmjax:
  """The contestant: mmjax' own generation, with layers one by one."""

  def __init__(self, name, folder, rows, bf16):
    import jax

    from mmjax.generate import make_generate
    from mmjax.interop import huggingface

    dtype = dict(param_dtype='bfloat16', dtype='bfloat16') if bf16 else {}
    model, params = huggingface.load(folder, **dtype)
    model, params = model.unscanned(params)
    self.params = jax.block_until_ready(params)
    self.batch = packed(name, *prompts(rows))
    self.programs = {n: make_generate(model, n, NEVER) for n in (1, NEW)}

  def run(self, new):
    return np.asarray(self.programs[new](self.params, self.batch))


def serve(contestant, name, folder, rows, threads):
  """A contestant's process: its tokens; then a line in, two numbers of seconds out."""
  bf16 = 'bf16' in contestant
  if contestant.startswith('mmjax'):
    made = Mmjax(name, folder, rows, bf16)
  else:
    from torch_generation import Peer

    static = 'static' in contestant
    made = Peer(name, folder, *prompts(rows), bf16, static, threads)
  made.run(1)
  print(json.dumps(made.run(NEW).tolist()), flush=True)
  for _ in sys.stdin:
    seconds = []
    for new in (NEW, 1):
      start = time.perf_counter()
      made.run(new)
      seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds), flush=True)


class Process(Contestant):
  def __init__(self, contestant, name, folder, rows, threads, malloc):
    command = [sys.executable, __file__, '--serve', contestant, '--case', name]
    command += ['--folder', folder, '--rows', str(rows), '--threads', str(threads)]
    super().__init__(command, environment(threads, **memory(malloc)))
    self.tokens = np.asarray(self.facts)

  def result(self, slots):
    self.close()
    whole, first = (statistics.median(r[i] for r in self.rounds) for i in (0, 1))
    rest = statistics.median(r[0] - r[1] for r in self.rounds)
    rows = len(self.tokens)
    return {
      'prefill_per_second': round(rows * slots / first),
      'decode_per_second': round(rows * (NEW - 1) / rest, 1),
      'new_per_second': round(rows * NEW / whole, 1),
      'range': [round(rows * NEW / f(r[0] for r in self.rounds), 1) for f in (max, min)],
    }


def agreement(got, want):
  """Share of tokens, i[B, N], that stand before a row's first that differs."""
  return float(np.cumprod(got == want, axis=1).mean())


def best(results, side):
  return max(r['new_per_second'] for n, r in results.items() if n.startswith(side))


def case(name, folder, rows, args):
  names = args.only.split(',') if args.only else CONTESTANTS
  running = {n: Process(n, name, folder, rows, args.threads, args.malloc) for n in names}
  take_turns(running, args.rounds, f'{name}, {rows} rows', '{:.2f} s'.format)
  slots = IMAGES * SLOTS[name] + WORDS
  results = {n: p.result(slots) for n, p in running.items()}
  report = {
    'benchmark': 'generation', 'model': name, 'rows': rows, 'new': NEW, 'prompt': slots,
    'threads': args.threads, 'malloc': args.malloc,
  }  # fmt: skip
  tokens = {n: p.tokens for n, p in running.items()}
  if {'mmjax', 'transformers'} <= set(tokens):
    report['same_tokens'] = agreement(tokens['mmjax'], tokens['transformers'])
    report['different_tokens'] = len(np.unique(tokens['mmjax']))
  sides = {n.partition('-')[0] for n in names}
  if sides == {'mmjax', 'transformers'}:
    ratio = best(results, 'mmjax') / best(results, 'transformers')
    report['faster_by'] = round(ratio, 2)
  return {**report, 'results': results}


def table(reports):
  """Markdown of the lines of a run."""
  columns = ('prefill_per_second', 'decode_per_second', 'new_per_second')
  lines = [['model', 'rows', '', *(c.replace('_', ' ') for c in columns)]]
  lines.append(['---'] * len(lines[0]))
  for report in reports:
    for name, r in report['results'].items():
      lines.append([report['model'], report['rows'], name, *(r[c] for c in columns)])
    lines.append([report['model'], report['rows'], 'faster by', '', ''])
    lines[-1].append(report.get('faster_by', ''))
  return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--cases', default='flamingo,unified')
  parser.add_argument('--rows', default='1,8')
  parser.add_argument('--threads', type=int, default=2, help="torch's")
  parser.add_argument('--malloc', choices=MALLOCS, default='glibc')
  parser.add_argument('--only', default='', help='contestants, e.g. mmjax,transformers')
  parser.add_argument('--folder', help='keeps the models, by name; default: for now')
  parser.add_argument('--table', type=pathlib.Path, help='a file of reports to print')
  parser.add_argument('--serve', help=argparse.SUPPRESS)
  parser.add_argument('--case', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.serve:
    serve(args.serve, args.case, args.folder, int(args.rows), args.threads)
    return
  if args.table:
    print(table(map(json.loads, args.table.read_text().splitlines())))
    return
  from torch_generation import save

  with tempfile.TemporaryDirectory() as temporary:
    for name in args.cases.split(','):
      folder = pathlib.Path(args.folder or temporary) / name
      if not folder.exists():
        save(name, folder)
      for rows in args.rows.split(','):
        print(json.dumps(case(name, str(folder), int(rows), args)), flush=True)


if __name__ == '__main__':
  main()
