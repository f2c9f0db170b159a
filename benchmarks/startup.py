"""From the command to the first step, and what imports take.

  python benchmarks/startup.py --data data/easy_vqa       # prepared by the quickstart

  run      train.py's own way through configs/quickstart.py:tiny until the numbers of
           step 1 are there: a process each, in phases that follow one another
             interpreter   from the command to the first line of Python
             imports       jax, flax, then what mmjax's loop and config need
             open          config, dataset, model, shapes of the state
             plan          the pack plan, evaluators
             init          checkpoints (Orbax), parameters made on their devices
             compile       the train step: traced, lowered, compiled
             batch, step   the first batch; the first step with its numbers
           cold = with an empty compilation cache; cached = with that of the run before;
           off = without one
  import   `import NAME` in a process that has jax and flax already, per public module

Cases alternate; medians of --rounds. Seconds are of the clock and, where told, of the
processor: the latter say more where the machine has other work. One JSON line each;
`--table FILE` prints what an earlier run said.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
PHASES = ('interpreter', 'imports', 'open', 'plan', 'init', 'compile', 'batch', 'step')
MODULES = (
  'mmjax', 'mmjax.batch', 'mmjax.sharding', 'mmjax.ops.attention', 'mmjax.nn.transformer',
  'mmjax.models', 'mmjax.generate', 'mmjax.interop.huggingface', 'mmjax.interop.gguf',
  'mmjax.data.pipeline', 'mmjax.data.prepare', 'mmjax.train.config', 'mmjax.train.loop',
  'mmjax.eval', 'mmjax.plan.compile',
)  # fmt: skip
IMPORT = (
  'import time, jax, flax.linen; t, c = time.perf_counter(), time.process_time();'
  'import {}; print(time.perf_counter() - t, time.process_time() - c)'
)


class Marks:
  """When each phase ended, by the clock and by the processor."""

  def __init__(self, began):
    self.last = began, 0.0
    self.seconds, self.cpu = {}, {}

  def __call__(self, phase):
    now, cpu = time.time(), time.process_time()
    self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last[0]
    self.cpu[phase] = self.cpu.get(phase, 0.0) + cpu - self.last[1]
    self.last = now, cpu

  def after(self, owner, name, phase):
    """Has owner.name end a phase when it returns."""
    inner = getattr(owner, name)

    def outer(*args, **kwargs):
      out = inner(*args, **kwargs)
      self(phase)
      return out

    setattr(owner, name, outer)


def child(began, data, workdir, cache):
  """A run up to the numbers of its first step; prints its phases."""
  marks = Marks(began)
  marks('interpreter')
  sys.path.insert(0, str(ROOT))
  import jax

  from mmjax.train import build, config, loop

  marks('imports')
  marks.after(loop.build_lib, 'build', 'open')
  marks.after(loop.build_lib, 'pipeline_of', 'plan')
  marks.after(loop.begin, 'state', 'init')
  marks.after(loop.build_lib, 'step_of', 'compile')
  marks.after(loop._Run, '_draw', 'batch')
  given = config.load(f'{ROOT}/configs/quickstart.py:tiny')
  given.data.path, given.train.compilation_cache = data, cache
  inner = build.step_of

  class First(Exception):
    """The first step is done."""

  def step_of(*args):
    compiled = inner(*args)

    def step(state, batch):
      jax.block_until_ready(compiled(state, batch))
      marks('step')
      raise First

    return step

  build.step_of = step_of
  try:
    loop.train(given, workdir)
  except First:
    print(json.dumps([marks.seconds, marks.cpu]), flush=True)
  os._exit(0)


def run(data, cache):
  """({phase: seconds}, {phase: CPU-seconds}) of a fresh process."""
  with tempfile.TemporaryDirectory() as workdir:
    command = [
      sys.executable,
      __file__,
      '--child',
      str(time.time()),
      data,
      workdir,
      cache,
    ]
    out = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
  if not out.stdout:
    raise SystemExit(f'a run ended early: {" ".join(command)}')
  return json.loads(out.stdout.splitlines()[-1])


def runs(data, rounds):
  """A line for each of cold, cached, off."""
  data = str(pathlib.Path(data).absolute())
  if not (pathlib.Path(data) / 'meta.json').is_file():
    raise SystemExit(f'no prepared data at {data}; run configs/quickstart.py:tiny first')
  made = {'cold': [], 'cached': [], 'off': []}
  run(data, 'off')  # files come from the disk once
  for _ in range(rounds):
    with tempfile.TemporaryDirectory() as cache:
      made['cold'].append(run(data, cache))
      made['cached'].append(run(data, cache))
    made['off'].append(run(data, 'off'))
  for name, found in made.items():
    phases = {
      p: [round(statistics.median(one[i][p] for one in found), 2) for i in (0, 1)]
      for p in PHASES
    }
    totals = [statistics.median(sum(one[i].values()) for one in found) for i in (0, 1)]
    yield {
      'benchmark': 'startup', 'cache': name, 'rounds': rounds,
      'seconds': round(totals[0], 2), 'cpu_seconds': round(totals[1], 2),
      'phases': {p: s for p, (s, _) in phases.items()},
      'cpu': {p: c for p, (_, c) in phases.items()},
    }  # fmt: skip


def imports(rounds):
  """A line of what `import NAME` takes beyond jax and flax."""
  found = {name: [] for name in MODULES}
  for _ in range(rounds):
    for name in MODULES:
      command = [sys.executable, '-c', IMPORT.format(name)]
      out = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
      found[name].append([float(x) for x in out.split()])
  median = {
    name: [round(statistics.median(x[i] for x in all_), 3) for i in (0, 1)]
    for name, all_ in found.items()
  }
  return {
    'benchmark': 'import', 'rounds': rounds,
    'seconds': {name: s for name, (s, _) in median.items()},
    'cpu': {name: c for name, (_, c) in median.items()},
  }  # fmt: skip


def table(lines):
  starts = [line for line in lines if line['benchmark'] == 'startup']
  text = ['| phase, s | ' + ' | '.join(line['cache'] for line in starts) + ' |']
  text.append('|---|' + '---|' * len(starts))
  for phase in PHASES:
    cells = (f'{line["phases"][phase]:.2f}' for line in starts)
    text.append(f'| {phase} | ' + ' | '.join(cells) + ' |')
  cells = (f'**{line["seconds"]:.2f}**' for line in starts)
  text.append('| to the first step | ' + ' | '.join(cells) + ' |')
  for line in lines:
    if line['benchmark'] == 'import':
      text += ['', '| import | s |', '|---|---|']
      text += [f'| `{name}` | {s:.2f} |' for name, s in line['seconds'].items()]
  return '\n'.join(text)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data', default='data/easy_vqa')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--only', choices=('run', 'import'))
  parser.add_argument('--table', help='print the lines of an earlier run as a table')
  parser.add_argument('--child', nargs=4, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.child:
    began, data, workdir, cache = args.child
    child(float(began), data, workdir, cache)
  if args.table:
    read = pathlib.Path(args.table).read_text().splitlines()
    print(table([json.loads(line) for line in read if line.startswith('{')]))
    return
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  if args.only != 'import':
    for line in runs(args.data, args.rounds):
      print(json.dumps(line), flush=True)
  if args.only != 'run':
    print(json.dumps(imports(args.rounds)), flush=True)


if __name__ == '__main__':
  main()
