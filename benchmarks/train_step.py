"""The train step of three models beside PyTorch's, on this machine.

  python benchmarks/train_step.py --model=unified,flamingo,clip > report.jsonl
  python benchmarks/table.py report.jsonl

Needs the extra `parity` (CPU torch, transformers). What the models and their batches
are stands in `step_<model>.py`. Same architecture, sizes, documents and optimizer on
both sides; before anything is timed the losses of equal weights are compared. Each
contestant lives in a process of its own; rounds alternate; medians are reported, as
one JSON line for each model and case:

  fixed    rows that are full: what the steps themselves cost
  mixture  documents of mixed lengths: torch pads a batch to the longest, mmjax packs;
           counted are the slots of text and patches that are not padding ("useful")

torch runs "stock" and, where the processor isn't Intel's, "unlocked": Intel's MKL,
which torch uses, picks slow code on other makers' processors unless a two-line
library, preloaded, tells it otherwise. Every contestant first times a product of two
2048 x 2048 matrices: the ceiling that its step can be held against; `ceiling_share` is
what of that rate mmjax's step reaches, by the FLOPs of its products. With --malloc=glibc
steps get their memory anew from the system each time, in huge pages, which is a fifth to
a third of both sides' time on a virtual machine; peak memory is measured with it. With
--malloc=jemalloc processes keep what they had (two or three contestants fit into 24 GB),
and steps take what they compute. A round is two runs, of which the second counts, as in
training one step follows another: while the others have their turn, a virtual machine's
host may take back what a process has freed. Seconds are of the clock; CPU-seconds are of
all threads, and say more than the clock where the machine has other work (for torch with
--threads 1 only, since its idle threads spin). Peak memory is the resident set during
the timed steps (start-up and compilation not counted).
"""

import argparse
import ctypes
import functools
import importlib
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import step_documents as documents
from contestant import MALLOCS, Contestant, environment, memory, processor, take_turns

MODELS, CASES = ('unified', 'flamingo', 'clip'), ('fixed', 'mixture')
UNLOCK = ''.join(
  f'int mkl_serv_intel_cpu{x}(void) {{ return 1; }}\n' for x in ('_true', '')
)


def model_of(name):
  """The module of a model."""
  return importlib.import_module(f'step_{name}')


def batches_of(model, case, pack):
  """The batches of a case, packed or padded."""
  found = model.examples(case)
  if pack:
    return documents.packed(found, model.budget(case), model.ROWS[case], model.GROUP)
  return documents.padded(found, model.PADDED)


def mmjax_parts(model, case, dtype='float32', devices=1):
  import jax
  from ml_collections import ConfigDict

  from mmjax.train import build, config

  run = config.resolve(ConfigDict(model.config(dtype)))
  room = model.budget(case)
  image = room.bank['image']
  run.data.rows = model.ROWS[case]
  run.data.budget.update(
    stream=room.stream,
    targets=room.targets,
    image=dict(patches=image.patches, items=image.items),
  )
  run.optim.update(
    name='adamw',
    learning_rate=1e-4,
    weight_decay=0.1,
    clip_norm=1.0,
    options={'b2': 0.999},
  )
  run.sharding.max_replicated = 1.0
  return build.build(run, model.vocab_size(), jax.devices()[:devices])


class Mmjax:
  """The contestant: mmjax's own step, compiled once per shape."""

  def __init__(self, model, case, dtype, devices):
    import jax

    from mmjax import sharding
    from mmjax.plan.flops import flops
    from mmjax.train import step

    rows = model.ROWS[case]
    self.host = batches_of(model, case, True)
    parts = mmjax_parts(model, case, dtype, devices)
    with sharding.use(parts.mesh, parts.rules):
      self.state = parts.init(jax.random.key(0))
      self.parameters = sum(x.size for x in jax.tree.leaves(self.state.params))
      pure = step.make_step(parts.loss_fn, parts.optimizer, jax.random.key(0))
      shapes = parts.batch_shapes(rows)
      self.gflop = flops(pure, parts.abstract, shapes) / 1e9 * len(self.host)
      self.step = step.compile_step(pure, parts.abstract, shapes)
      self.batches = [
        sharding.place_batch(b, rows, parts.mesh, parts.rules) for b in self.host
      ]

  def run(self):
    for batch in self.batches:
      self.state, metrics = self.step(self.state, batch)
    return float(metrics['loss'])


class Torch:
  """The contestant in PyTorch: fused AdamW, clipping, autocast for bfloat16."""

  def __init__(self, model, case, head, bf16, threads):
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    self.torch, self.model, self.head, self.bf16 = torch, model, head, bf16
    self.net = model.torch_model()
    self.params = [p for p in self.net.parameters() if p.requires_grad]
    self.parameters = sum(p.numel() for p in self.params)
    self.gflop = None
    self.optimizer = torch.optim.AdamW(self.params, lr=1e-4, weight_decay=0.1, fused=True)
    self.host = batches_of(model, case, False)
    self.batches = [model.torch_batch(b) for b in self.host]

  def run(self):
    torch = self.torch
    for batch in self.batches:
      self.optimizer.zero_grad(set_to_none=True)
      with torch.autocast('cpu', torch.bfloat16, enabled=self.bf16):
        loss = self.model.torch_loss(self.net, batch, self.head)
      loss.backward()
      torch.nn.utils.clip_grad_norm_(self.params, 1.0)
      self.optimizer.step()
      loss = float(loss.detach())
    return loss


def compare(model):
  """The losses of the same weights on the same documents, packed here, padded there."""
  import jax
  import torch

  from mmjax.train import tasks

  torch.manual_seed(0)
  net = model.torch_model()
  found = model.examples('mixture')[: model.PADDED]
  with tempfile.TemporaryDirectory() as folder:
    made, params = model.weights(net, folder)
  room = model.budget('mixture')
  (batch,) = documents.packed(found, room, model.PADDED, model.PADDED)
  if model.config('float32').get('train'):
    loss_fn = tasks.contrastive(made)
  else:
    loss_fn = tasks.next_token(made, num_targets=room.targets)
  batch = jax.tree.map(jax.numpy.asarray, batch)
  made = jax.jit(loss_fn, static_argnums=3)(params, batch, jax.random.key(0), False)
  total, sums = made
  (theirs,) = documents.padded(found, model.PADDED)
  theirs = model.torch_batch(theirs)
  heads = sorted(set(model.HEADS.values()))
  with torch.no_grad():
    there = [float(model.torch_loss(net, theirs, head)) for head in heads]
  return {'mmjax': float(total / sums['weight']), 'torch': there}


def refuse_others(losses):
  """Ends the program if `compare` found losses that differ by more than 1e-4."""
  here, there = losses['mmjax'], losses['torch']
  if any(abs(x - here) > 1e-4 * here for x in there):
    raise SystemExit(f'not the same model: losses {here} here and {there} there')


def ceiling(name, threads):
  """GFLOP/s of a product of 2048 x 2048 matrices, the best of ten."""
  if name.startswith('mmjax'):
    import jax

    dtype = 'bfloat16' if name.endswith('bf16') else 'float32'
    x = jax.numpy.ones((2048, 2048), dtype)
    # The fastest form that XLA has, see `mmjax.ops.linear`.
    form = functools.partial(jax.numpy.matmul, preferred_element_type='float32')
    product = jax.jit(form)

    def multiply():
      product(x, x).block_until_ready()
  else:
    import torch

    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if name.endswith('bf16') else torch.float32
    x = torch.ones(2048, 2048, dtype=dtype)

    def multiply():
      torch.matmul(x, x)

  multiply()
  times = []
  for _ in range(10):
    start = time.perf_counter()
    multiply()
    times.append(time.perf_counter() - start)
  return round(2 * 2048**3 / min(times) / 1e9)


def serve(name, model, case, devices, threads):
  """A contestant's process: a line in, seconds out."""
  model = model_of(model)
  bf16 = name.endswith('bf16')
  if name == 'compare':
    print(json.dumps(compare(model)), flush=True)
    return
  if name.startswith('mmjax'):
    import jax

    jax.config.update('jax_num_cpu_devices', devices)
    contestant = Mmjax(model, case, 'bfloat16' if bf16 else 'float32', devices)
  else:
    contestant = Torch(model, case, model.HEADS[name], bf16, threads)
  batches = contestant.host
  facts = {
    'steps': len(batches),
    'parameters': contestant.parameters,
    'useful': documents.useful(batches),
    'slots': int(sum(b.stream.tokens.size for b in batches)),
    'trained': int(sum((b.stream.weights > 0).sum() for b in batches)),
    'gflop': contestant.gflop,
    'ceiling': ceiling(name, threads),
  }
  contestant.run()
  # Peak memory from here on, without what compilation left behind.
  ctypes.CDLL(None).malloc_trim(0)
  pathlib.Path('/proc/self/clear_refs').write_text('5')
  print(json.dumps(facts), flush=True)
  for _ in sys.stdin:
    contestant.run()
    start, cpu = time.perf_counter(), time.process_time()
    loss = contestant.run()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    status = pathlib.Path('/proc/self/status').read_text()
    peak = next(int(x.split()[1]) for x in status.splitlines() if x.startswith('VmHWM'))
    print(json.dumps([seconds, loss, peak * 1024 / 1e9, cpu]), flush=True)


class Process(Contestant):
  """A contestant of one model and case."""

  def __init__(self, name, model, case, args, preload=None):
    self.malloc = args.malloc
    env = environment(args.threads, **memory(args.malloc, preload))
    command = [sys.executable, __file__, '--serve', name, '--model', model]
    command += ['--case', case]
    command += ['--devices', str(args.devices), '--threads', str(args.threads)]
    if args.threads == 1:
      command = ['taskset', '-c', str(min(os.sched_getaffinity(0))), *command]
    super().__init__(command, env)

  def result(self):
    self.close()
    seconds = statistics.median(r[0] for r in self.rounds)
    made = {
      'seconds': round(seconds, 3),
      'range': [round(f(r[0] for r in self.rounds), 3) for f in (min, max)],
      'cpu_seconds': round(min(r[3] for r in self.rounds), 3),
      'steps': self.facts['steps'],
      'parameters': self.facts['parameters'],
      'ceiling_gflops': self.facts['ceiling'],
      'trained_per_second': round(self.facts['trained'] / seconds),
      'useful_per_second': round(self.facts['useful'] / seconds),
      'fill': round(self.facts['useful'] / self.facts['slots'], 3),
    }
    if self.malloc == 'glibc':  # what the other keeps isn't what a step needs
      made['peak_gb'] = round(max(r[2] for r in self.rounds), 2)
    if gflop := self.facts['gflop']:
      share = gflop / seconds / self.facts['ceiling']
      made |= {'gflop': round(gflop), 'ceiling_share': round(share, 3)}
    return made


def unlock(folder):
  """The preloaded library's path; None on Intel's processors or without a compiler."""
  compiler = shutil.which('cc') or shutil.which('gcc')
  if compiler is None or processor()[0] == 'GenuineIntel':
    return None
  source, library = folder / 'unlock.c', folder / 'unlock.so'
  source.write_text(UNLOCK)
  subprocess.run([compiler, '-shared', '-fPIC', '-o', library, source], check=True)
  return str(library)


def measure(model, case, args, library):
  """The report of one model and case."""
  ours = ['mmjax'] + ['mmjax-bf16'] * args.bf16
  theirs = [n for n in model_of(model).HEADS if args.bf16 or not n.endswith('bf16')]
  names = args.only.split(',') if args.only else ours + theirs
  running = {n: Process(n, model, case, args) for n in names}
  for n in theirs:
    if library and n in names and not n.endswith('bf16'):
      running[f'{n} unlocked'] = Process(n, model, case, args, library)
  if len(counts := {p.facts['parameters'] for p in running.values()}) > 1:
    raise SystemExit(f'not the same model: {sorted(counts)} trained parameters')
  take_turns(running, args.rounds, f'{model}, {case}', '{:.2f} s'.format)
  results = {n: p.result() for n, p in running.items()}
  for n, r in results.items():
    # In the same format, if that ran.
    ours = results.get('mmjax-bf16') if n.endswith('bf16') else None
    if ours := ours or results.get('mmjax'):
      r['mmjax_is_faster'] = round(ours['useful_per_second'] / r['useful_per_second'], 2)
  return results


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--model', default='unified', help='several with commas')
  parser.add_argument('--case', default='fixed,mixture')
  parser.add_argument(
    '--devices', type=int, default=1, help='devices that mmjax makes of the CPU'
  )
  parser.add_argument('--threads', type=int, default=2, help='1 = all on one core')
  parser.add_argument('--malloc', choices=MALLOCS, default='glibc')
  parser.add_argument('--bf16', action=argparse.BooleanOptionalAction, default=True)
  parser.add_argument(
    '--only', help='contestants, e.g. mmjax,torch-trained; default all', default=''
  )
  parser.add_argument('--serve', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.serve:
    serve(args.serve, args.model, args.case, args.devices, args.threads)
    return
  if args.threads == 1:
    args.devices = 1
  with tempfile.TemporaryDirectory() as folder:
    library = unlock(pathlib.Path(folder))
    for model in args.model.split(','):
      comparison = Process('compare', model, 'mixture', args)
      comparison.close()
      refuse_others(comparison.facts)
      for case in args.case.split(','):
        report = {
          'benchmark': 'train_step',
          'model': model,
          'case': case,
          'processor': ' '.join(processor()),
          'devices': args.devices,
          'threads': args.threads,
          'malloc': args.malloc,
          'same_loss': comparison.facts,
          'results': measure(model, case, args, library),
        }
        print(json.dumps(report), flush=True)


if __name__ == '__main__':
  main()
