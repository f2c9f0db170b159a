"""What grows how fast: exponents of cost against length, documents, images and chips.

  python benchmarks/growth.py --only count,clock         # minutes, no TPU compiler
  python benchmarks/growth.py | tee growth.jsonl         # also `chips`: needs jax[tpu]
  python benchmarks/growth.py --table growth.jsonl --plot docs/growth.png

A line is a series: x, y, the exponent of y ~ x^e fitted to all points, that of its last
three points (`end`), and the one of its theory. `ok`: the end grows no faster than theory
says, but for 0.1 (counts) or 0.25 (clock).

  count   products of the jaxpr; pairs of slots in tiles that the kernel visits; nothing
          runs
  clock   seconds of the processor, one core, of what runs here
  chips   FLOPs, bytes and HBM of one v5e chip, libtpu's program of a whole train step

Theory, with T slots, documents of d slots, I images, n chips:

  attention, one document     T^2: every slot sees all before it
  attention, documents of d   T d: a tile is visited only where documents meet; on the
                              plain path, only with `reach`
  attention, T / d documents  1 / number, until a document is as small as a tile: then 0
  rest of the step, memory    T: no array of T x T is ever there
  encoder, images             I by the kernel; I^2 by the plain path, which looks at the
                              whole bank of a row
  pack plan                   documents
  a chip's FLOPs, bytes, HBM  0 at fixed rows per chip; parameters are split over 8 chips
                              and copied from there on
"""

import argparse
import functools
import json
import os
import pathlib
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import numpy as np

HEADS, WIDTH, EACH, TILE = 4, 64, 512, 512
LENGTHS = tuple(2**i for i in range(9, 16))
SLACK = {'count': 0.1, 'clock': 0.25, 'chips': 0.1}
# By chips: (topology, slices). A program for several slices is another one: it holds
# what is on its way between them as well. So these have a series of their own.
PODS = {
  'chips': {8: ('v5e:2x4', 1), 64: ('v5e:8x8', 1), 256: ('v5e:16x16', 1)},
  'chips, in slices of 256': {256 * n: ('v5e:16x16', n) for n in (2, 4, 8)},
}


def exponent(xs, ys):
  """The slope of log y over log x, least squares."""
  return float(np.polyfit(np.log(xs), np.log(np.maximum(ys, 1e-30)), 1)[0])


def line(kind, name, x, theory, points):
  """What is printed of a series; points: {x: y}."""
  xs, ys = map(list, zip(*points.items()))
  end = exponent(xs[-3:], ys[-3:])
  return {
    'benchmark': 'growth', 'kind': kind, 'name': name, 'x': x, 'xs': xs, 'ys': ys,
    'theory': theory, 'exponent': round(exponent(xs, ys), 2), 'end': round(end, 2),
    'ok': end <= theory + SLACK[kind],
  }  # fmt: skip


def tags_of(T, each):
  """Causal documents of `each` slots that fill a row of T."""
  from mmjax.batch import KeyTags, QueryTags

  at = np.arange(T, dtype=np.int32)[None]
  segment, rank = at // each + 1, at % each
  return QueryTags(segment, 0 * rank, rank), KeyTags(segment, rank)


def items_of(count, each):
  """An encoder's tags: `count` items of `each` patches, of which all see all."""
  from mmjax.batch import KeyTags, QueryTags

  item = np.arange(count * each, dtype=np.int32)[None] // each + 1
  return QueryTags(item, 0 * item, 0 * item), KeyTags(item, 0 * item)


def visited(tags):
  """Pairs of slots in tiles that the kernel computes."""
  from mmjax.ops.kernels.tiles import SKIPPED, Tiles, meetings

  states = np.asarray(meetings(*tags, Tiles(TILE, TILE)))
  return int((states > SKIPPED).sum()) * TILE * TILE


def attention(T, reach=None):
  """(the gradient of plain attention, its q, k and v)."""
  import jax
  import jax.numpy as jnp

  from mmjax.ops.attention import attend

  tags = tags_of(T, T if reach is None else EACH)

  def loss(*qkv):
    return jnp.sum(attend(*qkv, *tags, reach=reach, implementation='xla'))

  x = jax.ShapeDtypeStruct((1, T, HEADS, WIDTH), jnp.float32)
  return jax.grad(loss, (0, 1, 2)), (x, x, x)


def config_of(model, stream, patches=64, items=4, rows=1, chips=None, width=256):
  """Two layers of a width; on chips bfloat16, scanned, parameters split over 8."""
  from ml_collections import ConfigDict

  from mmjax.train import config

  how = dict(scan=bool(chips), dtype='bfloat16' if chips else 'float32')
  tower = dict(embed_dim=width, num_layers=2, num_heads=HEADS, mlp_dim=3 * width, **how)
  lm = dict(tower, name='unified', num_kv_heads=HEADS, head_dim=WIDTH, remat='full')
  if model == 'flamingo':
    vision = dict(tower, name='vit', position_grid=(8, 8))
    resampler = dict(embed_dim=256, num_layers=1, num_heads=HEADS, num_latents=64,
                     dtype=how['dtype'])  # fmt: skip
    lm = dict(name=model, lm=lm, vision=vision, resampler=resampler, cross_every=2)
  given = dict(
    data=dict(
      source='none', path='none', rows=rows, vocab_size=4096,
      image=dict(patch=16, resize='fixed', size=128),
      budget=dict(stream=stream, targets=stream,
                  image=dict(patches=patches, items=items)),
    ),
    model=lm,
    optim=dict(name='adamw', learning_rate=1e-3),
    sharding=dict(preset='dp', max_replicated=1.0),
  )  # fmt: skip
  if chips:
    given['optim']['grad_dtype'] = 'bfloat16'
    split = dict(data=-1, fsdp=min(chips, 8))
    given['sharding'] = dict(preset='fsdp', max_replicated=1.0, mesh=split)
  made = config.resolve(ConfigDict(given))
  config.check(made)
  return made


def step_flops(config):
  """Products of a train step."""
  import jax

  from mmjax.plan.flops import flops
  from mmjax.train import build

  parts = build.build(config, config.data.vocab_size, jax.devices()[:1])
  shapes = parts.batch_shapes(config.data.rows)
  return flops(parts.step(build.step_rng(config)), parts.abstract, shapes)


def count():
  from mmjax.plan.flops import flops

  def products(T, reach=None):
    run, args = attention(T, reach)
    return flops(run, *args)

  # A chunk of 512 queries and what is in its reach: whole windows from 2,048 on.
  near, long = functools.partial(products, reach=(EACH, 0)), LENGTHS[2:]
  T = 'T'
  yield 'attention, one document (plain)', T, 2, {t: products(t) for t in LENGTHS}
  yield 'attention, documents of 512 (plain, reach)', T, 1, {t: near(t) for t in long}
  one = {t: visited(tags_of(t, t)) for t in LENGTHS}
  yield 'attention, one document (kernel)', T, 2, one
  many = {t: visited(tags_of(t, EACH)) for t in LENGTHS}
  yield 'attention, documents of 512 (kernel)', T, 1, many
  rest = {t: step_flops(config_of('unified', t)) - _inside(t) for t in LENGTHS}
  yield 'step without attention', T, 1, rest
  counts = [1, 2, 4, 8]
  split = {n: visited(tags_of(32768, 32768 // n)) for n in counts}
  yield 'attention, 32k slots (kernel)', 'documents', -1, split
  images = [2**i for i in range(1, 8)]
  kernel = {n: visited(items_of(n, 256)) for n in images}
  yield 'encoder attention (kernel)', 'images', 1, kernel
  plain = {n: flops(*_encoder(n)) for n in images}
  yield 'encoder attention (plain)', 'images', 2, plain
  step = {n: step_flops(config_of('flamingo', 1024, 64 * n, n)) for n in images[:6]}
  yield 'flamingo step, 64 patches an image (plain)', 'images', 2, step


def _inside(T):
  """Products of attention in the step of `config_of`: two layers, one made anew."""
  from mmjax.plan.flops import flops

  run, args = attention(T)
  forward = 2 * 2 * T * T * HEADS * WIDTH
  return 2 * (flops(run, *args) + forward)


def _encoder(count, each=256):
  import jax
  import jax.numpy as jnp

  from mmjax.ops.attention import attend

  tags = items_of(count, each)
  x = jax.ShapeDtypeStruct((1, count * each, HEADS, WIDTH), jnp.float32)

  def run(q, k, v):
    return attend(q, k, v, *tags, implementation='xla')

  return run, x, x, x


def clock():
  def seconds(run, times=3):
    run()
    took = []
    for _ in range(times):
      began = time.process_time()
      run()
      took.append(time.process_time() - began)
    return round(min(took), 5)

  def attend(T, reach=None):
    import jax

    run, shapes = attention(T, reach)
    made = jax.jit(run)
    args = jax.random.normal(jax.random.key(0), (3, *shapes[0].shape))
    return seconds(lambda: jax.block_until_ready(made(*args)))

  def plan(documents):
    from mmjax.batch import Budget
    from mmjax.data.plan import Lengths, PackPlan

    text = np.random.default_rng(0).poisson(200, documents).astype(np.int32) + 1
    lengths = Lengths(('stream', 'targets'), np.stack([text, text], 1))
    return seconds(lambda: PackPlan(lengths, Budget(2048, 2048, {})), 2)

  lengths = LENGTHS[:5]
  yield 'attention, one document (plain)', 'T', 2, {t: attend(t) for t in lengths}
  near = {t: attend(t, (EACH, 0)) for t in LENGTHS[2:]}
  yield 'attention, documents of 512 (plain, reach)', 'T', 1, near
  many = {n: plan(n) for n in (25_000, 50_000, 100_000, 200_000, 400_000)}
  yield 'pack plan', 'documents', 1, many


def chips():
  from mmjax.plan import CACHE, topology
  from mmjax.plan.compile import plan

  found = {}
  # What is smaller stays in the vector memory, and is no byte of HBM.
  for T in (32768, 65536, 131072):
    config = config_of('unified', T, chips=4, rows=4, width=2048)
    found[T] = plan(config, topology.parse('v5e:2x2'), CACHE).readout
  yield 'step, HBM at the peak', 'T', 1, {t: r.hbm_peak for t, r in found.items()}
  yield 'step, bytes of kernels', 'T', 1, {t: r.hbm_bytes for t, r in found.items()}
  for x, pods in PODS.items():
    found = {}
    for n, (name, slices) in pods.items():
      config = config_of('flamingo', 1024, 256, 4, rows=n, chips=n)
      found[n] = plan(config, topology.parse(name, slices), CACHE).readout
    for what in ('flops', 'hbm_bytes', 'wire_bytes', 'hbm_peak'):
      points = {n: getattr(r, what) for n, r in found.items()}
      yield f'a chip, {what.replace("_", " ")}', x, 0, points


KINDS = {'count': count, 'clock': clock, 'chips': chips}


def table(lines):
  text = ['| of | against | from, to | theory | fitted | at the end |', '|' + '---|' * 6]
  for one in lines:
    name, ends = one['name'], f'{one["xs"][0]:,}, {one["xs"][-1]:,}'
    text.append(
      f'| {one["kind"]}: {name} | {one["x"]} | {ends} | {one["theory"]} |'
      f' {one["exponent"]:.2f} | {one["end"]:.2f}{"" if one["ok"] else " **faster**"} |'
    )
  return '\n'.join(text)


def plot(lines, path):
  """A panel per kind: y / its first against x / its first, theory dashed."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  kinds = [k for k in KINDS if any(one['kind'] == k for one in lines)]
  figure = Figure(figsize=(5 * len(kinds), 5.5), layout='constrained')
  FigureCanvasAgg(figure)
  panels = np.atleast_1d(figure.subplots(1, len(kinds)))
  for axes, kind in zip(panels, kinds):
    for one in (one for one in lines if one['kind'] == kind):
      xs, ys = (np.array(one[k], float) for k in ('xs', 'ys'))
      xs, ys = xs / xs[0], ys / ys[0]
      label = f'{one["name"]}, {one["x"]}: {one["exponent"]:.2f} ({one["theory"]})'
      (drawn,) = axes.loglog(xs, ys, 'o-', ms=3, lw=1, base=2, label=label)
      theory = xs ** one['theory']
      axes.loglog(xs, theory, '--', lw=0.7, base=2, color=drawn.get_color())
    axes.set_title(f'{kind}: fitted exponent (theory, dashed)', fontsize=9)
    axes.set_xlabel('times the first')
    axes.legend(fontsize=6)
    axes.grid(alpha=0.3)
  figure.savefig(path, dpi=110)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--only', default=','.join(KINDS))
  parser.add_argument('--table', help='print the lines of an earlier run as a table')
  parser.add_argument('--plot', help='and draw them')
  args = parser.parse_args()
  if args.table:
    text = pathlib.Path(args.table).read_text().splitlines()
    lines = [json.loads(one) for one in text if one.startswith('{')]
    print(table(lines))
    if args.plot:
      plot(lines, args.plot)
    return
  if hasattr(os, 'sched_setaffinity'):  # one core
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  for kind in args.only.split(','):
    for series in KINDS[kind]():
      print(json.dumps(line(kind, *series)), flush=True)


if __name__ == '__main__':
  main()
