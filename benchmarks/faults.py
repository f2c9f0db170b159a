"""Kills a small run again and again, and looks whether anything was lost.

  python benchmarks/faults.py                 100 kills
  python benchmarks/faults.py --kills=20 --seed=1

  start -> SIGKILL or SIGTERM at a random moment of a random phase -> start again -> ...

Phases: while a checkpoint is restored or the step compiled, in a step or its data,
while a checkpoint is written (which goes on in the background when the phase is over),
in an evaluation. When a run has come to its end in spite of that, its parameters, its
optimizer, every line of its log and every answer of its evaluation must equal those of
a run that nobody disturbed, bit for bit; then the next run begins. SIGTERM must lose no
step.

Each start is a process of train.py. It is forked from one that has imported everything
already, so a restart costs a second or two instead of ten. Prints a table by signal and
phase, and one line of JSON.
"""

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import pathlib
import random
import signal
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
STEPS, EVERY, EVALUATE = 96, 8, 48
# Of the run that tests/shades.py writes.
SECTIONS = dict(
  optim=dict(learning_rate=3e-3, schedule=dict(name='cosine', warmup_steps=5), ema=0.9),
  train=dict(steps=STEPS, log_every=4, checkpoint_every=EVERY, keep=2),
  eval=dict(vqa=dict(every=EVALUATE, limit=4, rows=4, max_new=6)),
)
# By phase: how often it is let pass, and how long it lasts at most until the kill comes.
PHASES = {
  'restoring': (0, 0.6), 'compiling': (0, 0.3), 'data': (24, 0.02), 'step': (24, 0.02),
  'saving': (3, 0.3), 'evaluating': (0, 0.4),
}  # fmt: skip
# The imports of a start.
PRELOAD = ('mmjax.train.loop', 'mmjax.eval', 'mmjax.eval.report', 'mmjax.eval.curves',
           'mmjax.models', 'mmjax.data.pipeline', 'orbax.checkpoint', 'grain',
           'tensorboardX', 'ml_collections', 'matplotlib.figure',
           'matplotlib.backends.backend_agg', 'jinja2')  # fmt: skip


def child(argv, errors, phases):
  """A start of train.py that says which phase begins."""
  import runpy

  from mmjax.train.progress import Progress

  os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
  enter = Progress.enter

  def told(self, phase, step=None):
    enter(self, phase, step)
    if phase in PHASES:
      phases.send_bytes(f'{phase} {self.step}'.encode())

  Progress.enter = told
  sys.argv = argv
  runpy.run_path(argv[0], run_name='__main__')


class Run:
  """A workdir, and the processes that work on it."""

  def __init__(self, context, config, workdir):
    self.context, self.workdir = context, workdir
    self.argv = [str(ROOT / 'train.py'), f'--config={config}', f'--workdir={workdir}']
    self.errors = workdir.with_suffix('.err')

  def start(self):
    self.phases, theirs = self.context.Pipe(duplex=False)
    args = (self.argv, str(self.errors), theirs)
    self.process = self.context.Process(target=child, args=args)
    self.process.start()
    theirs.close()

  def said(self):
    """(phase, step), or None at the end of the process."""
    try:
      phase, step = self.phases.recv_bytes().decode().split()
      return phase, int(step)
    except EOFError:
      return None

  def finish(self):
    """The exit code, and the step that was last begun."""
    last = 0
    while said := self.said():
      last = max(last, said[1])
    self.process.join()
    return self.process.exitcode, last

  def result(self):
    from mmjax.train import log

    meta = self.workdir / 'checkpoints' / str(STEPS) / 'meta' / 'metadata'
    lines = log.read(self.workdir / 'metrics.jsonl')
    page = json.loads((self.workdir / 'eval' / f'{STEPS}.json').read_text())
    return {
      'parameters': json.loads(meta.read_text())['fingerprints'],
      'log': [{k: v for k, v in x.items() if not log.clocked(k)} for x in lines],
      'answers': page['results']['vqa']['predictions'],
    }


def disturb(run, chance, numbers):
  """Starts, kills; what happened, or None if the process ended before."""
  phase = chance.choice(list(PHASES))
  number = chance.choice(numbers)
  passes, longest = PHASES[phase]
  passes, delay = chance.randint(0, passes), chance.uniform(0, longest)
  run.start()
  last, begun = 0, None
  while said := run.said():
    last = max(last, said[1])
    begun = said[1] if begun is None and said[0] in ('data', 'step') else begun
    if said[0] == phase:
      passes -= 1
      if passes < 0:
        break
  if said is None:
    run.process.join()
    return None
  time.sleep(delay)
  with contextlib.suppress(ProcessLookupError):  # it has come to its end meanwhile
    os.kill(run.process.pid, number)
  code, later = run.finish()
  told = {'phase': phase, 'signal': number.name, 'code': code, 'step': max(last, later)}
  return None if code == 0 else told


def saved(run):
  """The newest checkpoint that a restart will find."""
  found = (run.workdir / 'checkpoints').glob('*')
  return max((int(p.name) for p in found if p.name.isdigit()), default=0)


def table(kills):
  rows = [f'{"signal":8} {"phase":11} {"kills":>5} {"steps made again":>17}  exit codes']
  by = collections.defaultdict(list)
  for kill in kills:
    by[kill['signal'], kill['phase']].append(kill)
  for (name, phase), some in sorted(by.items()):
    again = [kill['again'] for kill in some]
    mean = f'{sum(again) / len(again):.1f} (max {max(again)})'
    codes = collections.Counter(kill['code'] for kill in some)
    told = ', '.join(f'{code}: {n}' for code, n in sorted(codes.items()))
    rows.append(f'{name:8} {phase:11} {len(some):5} {mean:>17}  {told}')
  return '\n'.join(rows)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=100)
  parser.add_argument('--seconds', type=float, default=3600, help='no kill after them')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--folder', type=pathlib.Path, help='default: a temporary one')
  options = parser.parse_args()
  folder = options.folder or pathlib.Path(tempfile.mkdtemp(prefix='mmjax-faults-'))
  folder.mkdir(parents=True, exist_ok=True)
  os.environ |= {
    'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'PYTHONWARNINGS': 'ignore',
    'PYTHONPATH': str(ROOT),
  }  # fmt: skip
  sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
  import shades

  config, began = shades.write(folder, **SECTIONS), time.monotonic()
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(list(PRELOAD))
  straight = Run(context, config, folder / 'straight')
  straight.start()
  code, _ = straight.finish()
  if code:
    sys.exit(f'the undisturbed run ends with {code}: {straight.errors.read_text()}')
  want = straight.result()

  chance = random.Random(options.seed)
  kills, runs, lost, run = [], 0, [], None
  late = False
  while (len(kills) < options.kills and not late) or run is not None:
    if run is None:
      run, runs = Run(context, config, folder / f'run{runs}'), runs + 1
    late = time.monotonic() - began > options.seconds
    if late or len(kills) >= options.kills:
      run.start()
      code, _ = run.finish()
      kill = None
    else:
      kill = disturb(run, chance, (signal.SIGKILL, signal.SIGTERM))
      code = run.process.exitcode
    if kill is not None:
      kill['again'] = max(kill['step'] - saved(run), 0)
      kills.append(kill)
      allowed = (-9,) if kill['signal'] == 'SIGKILL' else (75, -15)
      if kill['code'] not in allowed:
        lost.append(f'{run.workdir}: exit code {kill["code"]} after {kill}')
      if len(kills) % 10 == 0:
        print(f'{len(kills)} kills, {time.monotonic() - began:.0f} s', file=sys.stderr)
      continue
    if code:
      lost.append(f'{run.workdir}: ends with {code}: {run.errors.read_text()[-500:]}')
    elif (got := run.result()) != want:
      differ = [name for name in want if got[name] != want[name]]
      lost.append(f'{run.workdir}: not the same: {", ".join(differ)}')
    run = None
  stops = [k['again'] for k in kills if k['code'] == 75]
  damaged = len(list(folder.glob('*/checkpoints/damaged-*')))
  result = {
    'benchmark': 'faults', 'kills': len(kills), 'runs': runs, 'lost': len(lost),
    'steps_made_again': sum(k['again'] for k in kills),
    'steps_made_again_after_sigterm': sum(stops), 'stops_by_sigterm': len(stops),
    'damaged_checkpoints': damaged, 'steps': STEPS, 'checkpoint_every': EVERY,
    'seconds': round(time.monotonic() - began),
  }  # fmt: skip
  print(table(kills))
  print(*lost, sep='\n')
  print(json.dumps(result))
  sys.exit(1 if lost else 0)


if __name__ == '__main__':
  main()
