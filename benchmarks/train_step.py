"""The train step of the unified model beside a plain PyTorch one, on this machine.

  python benchmarks/train_step.py            # needs the extra `parity` (CPU torch)

Same architecture, sizes, batches and optimizer on both sides (float32, two ways
for torch to take the head, see `torch_unified.py`); before anything is timed the
weights are copied over and the losses compared. Each contestant lives in a
process of its own; rounds alternate; medians are reported, as one JSON line:

  fixed    8 rows of 512 slots, full: two images of 12 x 12 patches, 224 text tokens
  mixture  documents of mixed lengths: torch pads 8 documents to the longest, mmjax
           packs them; counted are the slots that are not padding ("useful")

torch runs "stock" and, where the processor isn't Intel's, "unlocked": Intel's MKL,
which torch uses, picks slow code on other makers' processors unless a two-line
library, preloaded, tells it otherwise. Every contestant first times a product of two
2048 x 2048 matrices: the ceiling that its step can be held against. All of them run
with huge pages in malloc (glibc), without which every step of either side pays for
the same memory, page by page, again. Seconds are of the clock; CPU-seconds are of
all threads, and say more than the clock where the machine has other work (for torch
with --threads 1 only, since its idle threads spin). Peak memory is the resident set
during the timed steps (start-up and compilation not counted).

`benchmarks/table.py` prints the report as a table.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from contestant import Contestant

HERE = pathlib.Path(__file__).resolve().parent
UNLOCK = ''.join(
  f'int mkl_serv_intel_cpu{x}(void) {{ return 1; }}\n' for x in ('_true', '')
)
# What one would set on a CPU: layers one by one are not copied to and from a stack.
MODEL = dict(scan=False)

SIZES = dict(
  vocab_size=32_000,
  embed_dim=512,
  num_layers=8,
  num_heads=8,
  num_kv_heads=8,
  head_dim=64,
  mlp_dim=2048,
  patch_channels=16 * 16 * 3,
  rope_base=10_000.0,
)
CONTESTANTS = ('mmjax', 'torch', 'torch-trained', 'torch-bf16')
ROWS, T = 8, 512
GRID = (1, 12, 12)
DOCUMENTS = 64  # of the mixture


def examples(rng, images, text):
  """A random document: images first, then text; all text is trained."""
  from mmjax.data.document import Document, Image, Text
  from mmjax.data.example import to_example
  from mmjax.data.media import ImageRule

  class Words:
    end_id = 0

    def encode(self, text):
      return list(rng.integers(1, SIZES['vocab_size'], len(text)))

  side = 16 * GRID[1]
  pictures = [
    Image(rng.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(images)
  ]
  document = Document((*pictures, Text('.' * (text - 1), True)))
  rule = ImageRule(patch=16, resize='fixed', size=side)
  return to_example(
    document, tokenizer=Words(), rules={'image': rule}, slots=lambda item: item.grid
  )


def fixed_batch():
  from mmjax.batch import BankBudget, Budget
  from mmjax.data.pack import pack

  rng = np.random.default_rng(0)
  budget = Budget(T, 224, {'image': BankBudget(288, 2, SIZES['patch_channels'])})
  return pack([[examples(rng, 2, 224)] for _ in range(ROWS)], budget), budget


def mixture_examples():
  """Documents as web pages come: lognormal text, a geometric number of images."""
  rng = np.random.default_rng(1)
  found = []
  while len(found) < DOCUMENTS:
    images = min(int(rng.geometric(0.7)) - 1, 2)
    text = int(rng.lognormal(np.log(70), 0.9))
    if text >= 8 and 144 * images + text <= T:
      found.append(examples(rng, images, text))
  return found


def mixture_packed(found):
  """All documents in as few batches of ROWS rows as first-fit-decreasing finds.

  A row holds T slots, at most 480 of them trained, and 2 images: what the largest
  documents need.
  """
  from mmjax.batch import BankBudget, Budget
  from mmjax.data.pack import pack

  budget = Budget(T, 480, {'image': BankBudget(288, 2, SIZES['patch_channels'])})
  rows = []
  for example in sorted(found, key=len, reverse=True):
    images = example.media['image'].item_order.size if example.media else 0
    need = np.array([len(example), (example.weights > 0).sum(), images])
    for row in rows:
      if (row['free'] >= need).all():
        break
    else:
      row = {'free': np.array([T, budget.targets, 2]), 'documents': []}
      rows.append(row)
    row['free'] = row['free'] - need
    row['documents'].append(example)
  packed = [row['documents'] for row in rows]
  while len(packed) % ROWS:
    packed.append([])
  return [pack(packed[i : i + ROWS], budget) for i in range(0, len(packed), ROWS)], budget


def mixture_padded(found):
  """The documents 8 by 8 as they come, padded to the longest of the 8."""
  from mmjax.batch import BankBudget, Budget
  from mmjax.data.pack import pack

  batches = []
  for i in range(0, DOCUMENTS, ROWS):
    group = found[i : i + ROWS]
    longest = max(map(len, group))
    patches = max([len(e.media['image'].values) if e.media else 0 for e in group] + [1])
    budget = Budget(
      longest, longest, {'image': BankBudget(patches, 2, SIZES['patch_channels'])}
    )
    batches.append(pack([[e] for e in group], budget))
  return batches


def useful(batches):
  return int(sum((b.stream.segment_ids > 0).sum() for b in batches))


def mmjax_parts(budget, devices=1):
  import jax
  from ml_collections import ConfigDict

  from mmjax.train import build, config

  image = budget.bank['image']
  fields = {k: v for k, v in SIZES.items() if k not in ('vocab_size', 'patch_channels')}
  run = ConfigDict(config.defaults())
  run.data.update(rows=ROWS, image=dict(patch=16, resize='fixed', size=16 * GRID[1]))
  run.data.budget = ConfigDict(
    dict(
      stream=budget.stream,
      targets=budget.targets,
      image=dict(patches=image.patches, items=image.items),
    )
  )
  fields |= {'tie_embeddings': False, **MODEL}
  run.model = ConfigDict(dict(name='unified', **fields))
  run.optim.update(
    name='adamw',
    learning_rate=1e-4,
    weight_decay=0.1,
    clip_norm=1.0,
    options={'b2': 0.999},
  )
  run.sharding.max_replicated = 1.0
  return build.build(run, SIZES['vocab_size'], jax.devices()[:devices])


class Mmjax:
  """The contestant: mmjax's own step, compiled once per shape."""

  def __init__(self, batches, budget, devices):
    import jax

    from mmjax import sharding
    from mmjax.train import step

    parts = mmjax_parts(budget, devices)
    self.jax, self.parts = jax, parts
    with sharding.use(parts.mesh, parts.rules):
      self.state = parts.init(jax.random.key(0))
      pure = step.make_step(parts.loss_fn, parts.optimizer, jax.random.key(0))
      self.step = step.compile_step(pure, parts.abstract, parts.batch_shapes(ROWS))
      self.batches = [
        sharding.place_batch(b, ROWS, parts.mesh, parts.rules) for b in batches
      ]

  def run(self):
    for batch in self.batches:
      self.state, metrics = self.step(self.state, batch)
    return float(metrics['loss'])


class Torch:
  """The contestant in PyTorch."""

  def __init__(self, batches, head, bf16, threads):
    import torch
    import torch_unified

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    self.model = torch_unified.Unified(torch_sizes())
    self.step = torch_unified.make_step(self.model, 1e-4, head, bf16)
    self.batches = [torch_batch(b) for b in batches]

  def run(self):
    for batch in self.batches:
      loss = self.step(batch)
    return loss


def torch_sizes():
  half = SIZES['head_dim'] // 2
  return {**SIZES, 'rope_axes': [i % 3 for i in range(half)]}


def torch_batch(batch):
  import torch

  s, image = batch.stream, batch.bank['image']
  long = ('tokens', 'source', 'positions', 'order', 'first', 'last', 'segment_ids')
  fields = {name: torch.from_numpy(np.int64(getattr(s, name))) for name in long}
  return {
    **fields,
    'weights': torch.from_numpy(s.weights.copy()),
    'patches': torch.from_numpy(image.values.copy()),
  }


def copy_weights(params, model):
  """mmjax's parameters into the torch model."""
  import jax
  import torch

  p = jax.tree.map(np.asarray, params)
  D = SIZES['embed_dim']

  def put(target, value):
    with torch.no_grad():
      target.copy_(torch.from_numpy(np.array(value)))

  # mmjax multiplies the looked-up rows by sqrt(D)
  put(model.embed.weight, p['embed']['text'] * D**0.5)
  put(model.patch.weight, p['embed']['image']['kernel'].T)
  put(model.patch.bias, p['embed']['image']['bias'])
  put(model.head.weight, p['head'].T)
  put(model.norm.weight, p['transformer']['norm']['scale'])
  for i, block in enumerate(model.blocks):
    one = p['transformer'][f'layer_{i}']
    put(block.norm_attention.weight, one['attention_norm']['scale'])
    put(block.norm_mlp.weight, one['mlp_norm']['scale'])
    for name in ('query', 'key', 'value'):
      put(getattr(block, name).weight, one['attention'][name].reshape(D, -1).T)
    put(block.out.weight, one['attention']['out'].reshape(-1, D).T)
    for name in ('gate', 'up', 'down'):
      put(getattr(block, name).weight, one['mlp'][name].T)


def compare():
  """The two losses of the same weights on the same batch."""
  import jax
  import torch
  import torch_unified

  batch, budget = fixed_batch()
  batch = jax.tree.map(lambda x: x[:2], batch)
  parts = mmjax_parts(budget)
  params = parts.init(jax.random.key(0)).params
  model = torch_unified.Unified(torch_sizes())
  copy_weights(params, model)
  total, sums = parts.loss_fn(params, batch, jax.random.key(0), False)
  with torch.no_grad():
    there = [float(model.loss(torch_batch(batch), head)) for head in ('all', 'trained')]
  return {'mmjax': float(total / sums['weight']), 'torch': there}


def ceiling(name, threads):
  """GFLOP/s of a product of 2048 x 2048 float32 matrices, the best of ten."""
  if name == 'mmjax':
    import jax

    x = jax.numpy.ones((2048, 2048))
    product = jax.jit(jax.numpy.matmul)

    def multiply():
      product(x, x).block_until_ready()
  else:
    import torch

    torch.set_num_threads(threads)
    x = torch.ones(2048, 2048)

    def multiply():
      torch.matmul(x, x)

  multiply()
  times = []
  for _ in range(10):
    start = time.perf_counter()
    multiply()
    times.append(time.perf_counter() - start)
  return round(2 * 2048**3 / min(times) / 1e9)


def serve(name, case, devices, threads):
  """A contestant's process: a line in, seconds out."""
  if name == 'mmjax':
    import jax

    jax.config.update('jax_num_cpu_devices', devices)
  found = mixture_examples() if case == 'mixture' else None
  if name == 'mmjax':
    batches, budget = (
      mixture_packed(found)
      if case == 'mixture'
      else ([fixed_batch()[0]], fixed_batch()[1])
    )
    contestant = Mmjax(batches, budget, devices)
  else:
    batches = mixture_padded(found) if case == 'mixture' else [fixed_batch()[0]]
    head = 'all' if name == 'torch' else 'trained'
    contestant = Torch(batches, head, name == 'torch-bf16', threads)
  facts = {
    'steps': len(batches),
    'useful': useful(batches),
    'slots': int(sum(b.stream.tokens.size for b in batches)),
    'trained': int(sum((b.stream.weights > 0).sum() for b in batches)),
    'ceiling': ceiling(name, threads),
  }
  contestant.run()
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # peak memory from here on
  print(json.dumps(facts), flush=True)
  for _ in sys.stdin:
    start, cpu = time.perf_counter(), time.process_time()
    loss = contestant.run()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    status = pathlib.Path('/proc/self/status').read_text()
    peak = next(int(x.split()[1]) for x in status.splitlines() if x.startswith('VmHWM'))
    print(json.dumps([seconds, loss, peak * 1024 / 1e9, cpu]), flush=True)


class Process(Contestant):
  def __init__(self, name, case, args, preload=None):
    env = {**os.environ, 'OMP_NUM_THREADS': str(args.threads), 'JAX_PLATFORMS': 'cpu'}
    env['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    if preload:
      env['LD_PRELOAD'] = preload
    command = [sys.executable, __file__, '--serve', name, '--case', case]
    command += ['--devices', str(args.devices), '--threads', str(args.threads)]
    if args.threads == 1:
      command = ['taskset', '-c', str(min(os.sched_getaffinity(0))), *command]
    super().__init__(command, env)

  def result(self):
    self.close()
    seconds = statistics.median(r[0] for r in self.rounds)
    return {
      'seconds': round(seconds, 3),
      'range': [round(f(r[0] for r in self.rounds), 3) for f in (min, max)],
      'cpu_seconds': round(min(r[3] for r in self.rounds), 3),
      'steps': self.facts['steps'],
      'ceiling_gflops': self.facts['ceiling'],
      'trained_per_second': round(self.facts['trained'] / seconds),
      'useful_per_second': round(self.facts['useful'] / seconds),
      'fill': round(self.facts['useful'] / self.facts['slots'], 3),
      'peak_gb': round(max(r[2] for r in self.rounds), 2),
    }


def processor():
  """Maker and model, as the kernel knows them."""
  text = pathlib.Path('/proc/cpuinfo').read_text()
  fields = dict(x.split('\t: ', 1) for x in text.splitlines() if '\t: ' in x)
  return f'{fields.get("vendor_id", "?")} {fields.get("model name", "?").strip()}'


def unlock(folder):
  """The preloaded library's path; None on Intel's processors or without a compiler."""
  compiler = shutil.which('cc') or shutil.which('gcc')
  if compiler is None or processor().startswith('GenuineIntel'):
    return None
  source, library = folder / 'unlock.c', folder / 'unlock.so'
  source.write_text(UNLOCK)
  subprocess.run([compiler, '-shared', '-fPIC', '-o', library, source], check=True)
  return str(library)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--cases', default='fixed,mixture')
  parser.add_argument(
    '--devices', type=int, default=2, help='devices that mmjax makes of the CPU'
  )
  parser.add_argument('--threads', type=int, default=2, help='1 = all on one core')
  parser.add_argument(
    '--only', help='contestants, e.g. mmjax,torch-trained; default all', default=''
  )
  parser.add_argument('--serve', help=argparse.SUPPRESS)
  parser.add_argument('--case', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.serve:
    serve(args.serve, args.case, args.devices, args.threads)
    return
  if args.threads == 1:
    args.devices = 1
  report = {
    'benchmark': 'train_step',
    'processor': processor(),
    'devices': args.devices,
    'threads': args.threads,
    'model': MODEL,
    'same_loss': compare(),
  }
  with tempfile.TemporaryDirectory() as folder:
    library = unlock(pathlib.Path(folder))
    for case in args.cases.split(','):
      names = args.only.split(',') if args.only else CONTESTANTS
      running = {n: Process(n, case, args) for n in names}
      if library:
        for n in {'torch', 'torch-trained'} & set(names):
          running[f'{n} unlocked'] = Process(n, case, args, library)
      for i in range(args.rounds):
        for name, process in running.items():
          seconds = process.round()
          where = f'{case}, round {i + 1} of {args.rounds}'
          print(f'{where}: {name} {seconds:.2f} s', file=sys.stderr, flush=True)
          time.sleep(0.5)  # idle threads of the last one stop spinning
      results = {n: p.result() for n, p in running.items()}
      for r in results.values():
        if 'mmjax' in results:
          ours = results['mmjax']['useful_per_second']
          r['mmjax_is_faster'] = round(ours / r['useful_per_second'], 2)
      report[case] = results
  print(json.dumps(report))


if __name__ == '__main__':
  main()
