"""Is anything slower than it was? Minutes of one core, for whoever changes what is hot.

  python benchmarks/check.py             # exit code 1, a line per case that lost > 15 %
  python benchmarks/check.py --record    # what is now is what shall be: check.json

Each case is a ratio, its seconds / those of a plain reference of equal work in the same
process, so what the machine is and does besides cancels out as far as it can:

  unified, flamingo, dual   a train step / products of matrices of as many FLOPs
  attention                 forward and backward / products of as many FLOPs
  decode                    a token of `generate` / products of a vector with as many
                            weights as the model has
  packing                   a document in a plan of 4,000 / first-fit, a loop in NumPy
  images                    a JPEG to patches / simplejpeg, Pillow's resize, reshape

Everything runs on one core, and seconds are those of the processor: other processes cost
caches, not time. The two take turns; of each turn the ratio, of all turns the median. A
case that lost is measured once more, twice as long, and fails only if it lost again.

A ratio holds for a kind of processor (the products of one are quick in bfloat16, the
caches of another are small), so check.json has them by its name. A machine that isn't
there is told so (exit code 2), and can say what it compares with: --against NAME.
"""

import argparse
import dataclasses
import io
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

# One core for all threads, before anything starts some.
if __name__ == '__main__' and hasattr(os, 'sched_setaffinity'):
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import numpy as np  # noqa: E402
from contestant import processor  # noqa: E402

FILE = pathlib.Path(__file__).with_suffix('.json')
LOSS = 0.15
TURN = 0.1  # seconds that one side of a turn takes at least


@dataclasses.dataclass(frozen=True)
class Case:
  """Two ways of as much work; `share` = what a run of ours is of one of the reference."""

  name: str
  ours: Callable[[], None]
  reference: Callable[[], None]
  share: float = 1.0


def ratio(case, turns, clock=time.process_time):
  """The median over turns of seconds of ours / seconds of the reference."""
  counts = {}
  for run in (case.ours, case.reference):
    run()  # compiles
    began, count = clock(), 0
    while clock() - began < TURN:  # until memory and caches are what they will be
      run()
      count += 1
    counts[run] = count
  found = []
  for turn in range(turns):
    seconds = {}
    order = (case.ours, case.reference)
    for run in order if turn % 2 else order[::-1]:
      began = clock()
      for _ in range(counts[run]):
        run()
      seconds[run] = (clock() - began) / counts[run]
    found.append(seconds[case.ours] / seconds[case.reference] / case.share)
  return statistics.median(found)


def judge(cases, recorded, turns=7, clock=time.process_time):
  """({name: ratio}, lines of what lost more than `LOSS`).

  Args:
    cases: an iterable of `Case`s; each is measured before the next is made.
    recorded: {name: ratio}; a case that isn't there has lost.
  """
  ratios, lost = {}, []
  for case in cases:
    now, then = ratio(case, turns, clock), recorded.get(case.name)
    if then is not None and now > (1 + LOSS) * then:
      now = min(now, ratio(case, 2 * turns, clock))
    ratios[case.name] = round(now, 4)
    if then is None:
      lost.append(f'{case.name}: {now:.3f} x its reference, and nothing is recorded')
    elif now > (1 + LOSS) * then:
      lost.append(
        f'{case.name}: {now:.3f} x its reference, it was {then:.3f}:'
        f' {now / then - 1:.0%} slower'
      )
  return ratios, lost


def products(flops, n=512):
  """(products of n x n matrices, one after the other; their share of `flops`)."""
  import jax
  import jax.numpy as jnp

  trips = max(1, round(flops / (2 * n**3)))
  w = jnp.eye(n) + 0.01 * jax.random.normal(jax.random.key(0), (n, n)) / n
  chain = jax.jit(lambda x: jax.lax.fori_loop(0, trips, lambda _, x: x @ w, x))
  x = jnp.ones((n, n))
  return lambda: chain(x).block_until_ready(), flops / (2 * n**3 * trips)


_TOWER = dict(embed_dim=256, num_layers=2, num_heads=4, mlp_dim=768)
_LM = dict(_TOWER, num_kv_heads=4, head_dim=64, scan=False)
_VIT = dict(_TOWER, name='vit', position_grid=(8, 8), scan=False)
MODELS = {
  'unified': dict(name='unified', **_LM),
  'flamingo': dict(
    name='flamingo',
    lm=dict(name='unified', **_LM),
    vision=_VIT,
    resampler=dict(embed_dim=256, num_layers=1, num_heads=4, num_latents=32),
    cross_every=2,
  ),
  'dual': dict(
    name='dual',
    embed_dim=256,
    vision=dict(_VIT, pool='mean'),
    text=dict(_LM, name='encoder', max_positions=256, num_types=0, post_norm=False),
  ),
}
ROWS, VOCABULARY = 2, 2048


def parts_of(name):
  """(config, parts) of a model."""
  import jax
  from ml_collections import ConfigDict

  from mmjax.train import build, config

  given = dict(
    data=dict(
      source='none', path='none', rows=ROWS, vocab_size=VOCABULARY,
      image=dict(patch=16, resize='fixed', size=128),
      budget=dict(stream=256, targets=128, image=dict(patches=128, items=2)),
    ),
    model=MODELS[name],
    optim=dict(name='adamw', learning_rate=1e-3, weight_decay=0.1, clip_norm=1.0),
    sharding=dict(max_replicated=1.0),
    train=dict(task='contrastive' if name == 'dual' else 'next_token'),
  )  # fmt: skip
  config_ = config.resolve(ConfigDict(given))
  return config_, build.build(config_, VOCABULARY, jax.devices()[:1])


def batch_of(parts):
  """Two documents of an image and text in each row."""
  import step_documents

  from mmjax.data.pack import pack

  rng = np.random.default_rng(0)
  how = dict(side=128, slots=parts.model.slots, vocab_size=VOCABULARY)
  rows = [
    [step_documents.example(rng, 1, 61, **how) for _ in range(2)] for _ in range(ROWS)
  ]
  return pack(rows, parts.budget)


def filled(shapes):
  """Arrays of these shapes, small numbers > 0: to draw them takes long to compile."""
  import jax

  rng = np.random.default_rng(0)

  def fill(x):
    real = jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
    array = rng.random(x.shape) / 50 if real else np.zeros(x.shape)
    return jax.device_put(array.astype(x.dtype), x.sharding)

  return jax.tree.map(fill, shapes)


def train_step(name):
  import jax

  from mmjax import sharding
  from mmjax.plan.flops import flops
  from mmjax.train import build

  config, parts = parts_of(name)
  with sharding.use(parts.mesh, parts.rules):
    state = filled(parts.abstract)
    step = build.step_of(config, parts)
    batch = sharding.place_batch(batch_of(parts), ROWS, parts.mesh, parts.rules)
  pure = parts.step(build.step_rng(config))
  reference, share = products(flops(pure, parts.abstract, parts.batch_shapes(ROWS)))

  def ours():
    nonlocal state
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))

  return Case(name, ours, reference, share)


def attention():
  import jax
  import jax.numpy as jnp

  from mmjax.batch import KeyTags, QueryTags
  from mmjax.ops.attention import attend
  from mmjax.plan.flops import flops

  T = 1024
  segment = jnp.arange(T)[None] // (T // 4) + 1
  rank = jnp.arange(T)[None] % (T // 4)
  tags = QueryTags(segment, 0 * rank, rank), KeyTags(segment, rank)
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, T, 4, 64))
  gradient = jax.grad(lambda *qkv: jnp.sum(attend(*qkv, *tags, chunk=256)), (0, 1, 2))
  reference, share = products(flops(gradient, q, k, v))
  run = jax.jit(gradient)
  return Case('attention', lambda: jax.block_until_ready(run(q, k, v)), reference, share)


def decode():
  import jax
  import jax.numpy as jnp

  from mmjax.generate import make_generate

  count = 32
  _, parts = parts_of('unified')
  params = filled(parts.abstract.params)
  batch = jax.tree.map(lambda x: x[:1], batch_of(parts))
  write = make_generate(parts.model, count, end_id=-1)
  size = sum(x.size for x in jax.tree.leaves(params))
  # Of [D, F] kernels, as in the model.
  w = jax.random.normal(jax.random.key(0), (round(size / 256 / 768), 256, 768))

  @jax.jit
  def chain(x, w):
    def token(_, x):
      return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, w)[0]

    return jax.lax.fori_loop(0, count, token, x)

  x = jnp.ones((1, 256))
  return Case(
    'decode',
    lambda: write(params, batch).block_until_ready(),
    lambda: chain(x, w).block_until_ready(),
  )


def packing():
  from mmjax.batch import BankBudget, Budget
  from mmjax.data.plan import Lengths, PackPlan

  rng = np.random.default_rng(0)
  many, few, room = 4_000, 1_000, np.array([2048, 2048, 1888, 64])
  text = rng.poisson(14, many) + 1
  patches = rng.integers(64, 257, many)
  needs = np.stack([text + patches, text, patches, np.ones(many, int)], 1).astype(
    np.int32
  )
  lengths = Lengths(('stream', 'targets', 'image/patches', 'image/items'), needs)
  budget = Budget(2048, 2048, {'image': BankBudget(1888, 64, 768)})

  def first_fit():
    free = np.repeat(room[None], 64, axis=0)
    for need in needs[:few]:
      fits = (free >= need).all(axis=1)
      i = int(fits.argmax())
      if not fits[i]:
        free = np.concatenate([free[1:], room[None]])
        i = 63
      free[i] -= need

  return Case('packing', lambda: PackPlan(lengths, budget), first_fit, many / few)


def images():
  import PIL.Image
  import simplejpeg

  from mmjax.data.document import Image
  from mmjax.data.media import ImageRule

  rng = np.random.default_rng(0)
  coarse = PIL.Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
  file = io.BytesIO()
  coarse.resize((640, 480), PIL.Image.Resampling.BICUBIC).save(file, 'JPEG', quality=90)
  data, rule = file.getvalue(), ImageRule(patch=16, resize='fixed', size=224)
  bicubic = PIL.Image.Resampling.BICUBIC

  def plain():
    pixels = PIL.Image.fromarray(simplejpeg.decode_jpeg(data)).resize((224, 224), bicubic)
    cut = np.asarray(pixels).reshape(14, 16, 14, 16, 3).transpose(0, 2, 1, 3, 4)
    return cut.reshape(196, 768)

  return Case('images', lambda: rule.patches_of(Image(data)), plain)


CASES = {
  **{name: (lambda name=name: train_step(name)) for name in MODELS},
  'attention': attention,
  'decode': decode,
  'packing': packing,
  'images': images,
}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--record', action='store_true', help='write check.json')
  parser.add_argument('--only', help='some cases, e.g. unified,decode')
  parser.add_argument('--against', help='the processor to compare with; default: this')
  parser.add_argument('--turns', type=int, default=7)
  args = parser.parse_args()
  names = args.only.split(',') if args.only else list(CASES)
  if unknown := set(names) - set(CASES):
    parser.error(f'no case {min(unknown)!r} (choices: {", ".join(CASES)})')
  kept = json.loads(FILE.read_text()) if FILE.exists() else {}
  _, here = processor()
  where = args.against or here
  if where not in kept and not args.record:
    print(f'no ratios of {where!r} (there are: {", ".join(kept)}); --record makes some')
    return 2
  began = time.monotonic()
  cases = (CASES[name]() for name in names)
  ratios, lost = judge(cases, {} if args.record else kept[where], args.turns)
  seconds = round(time.monotonic() - began)
  line = {'benchmark': 'check', 'processor': here, 'seconds': seconds}
  print(json.dumps(line | {'ratios': ratios}), flush=True)
  if args.record:
    kept[where] = kept.get(where, {}) | ratios
    FILE.write_text(json.dumps(kept, indent=1) + '\n')
    return 0
  print('\n'.join(lost), end='\n' if lost else '')
  return 1 if lost else 0


if __name__ == '__main__':
  sys.exit(main())
