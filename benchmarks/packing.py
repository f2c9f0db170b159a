"""How full rows get, and what it costs to know: our plan beside the usual ways.

  python benchmarks/packing.py                   # 100,000 documents, one line each
  python benchmarks/packing.py --documents=10000000 --only=plan
  python benchmarks/packing.py --table report.json

Lengths are simulated: means as the corpora's papers give them, shapes assumed
(lognormal text, a geometric number of images). A document is a vector of needs:

  mmc4      435 tokens, 5.8 images of 256 patches; a marker per image (Flamingo)
  obelics   818 tokens, 2.5 images of 64 to 256 patches; a marker per image
  captions  15 tokens, 1 image of 64 to 256 patches that stand in the stream (Fuyu)

Budgets are chosen as a user would: the stream holds four documents or more; patches
are what the stream then needs on the average and 2 to 3 % more (in whole images
where all are equal), so that the stream is what runs out; markers of images cost
nothing and are never scarce. Documents over a budget are dropped, by all alike.

  plan       mmjax.data.plan
  first-fit  in the order they come, into the first of 64 open rows that has room
  grain/...  Grain's own packers over features of these lengths
  padded     one document a row, cut at the stream's and the images' average needs
             times the slack (as open_flamingo pads: 256 tokens and 6 images for MMC4)

Each contestant is a process of its own, which has this processor for itself: seconds
are of the processor. Peak memory is above what imports and lengths take.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import numpy as np

NAMES = ('stream', 'targets', 'image/patches', 'image/items')
MIXTURES = {
  # stream, patches, items
  'mmc4': (4096, 56 * 256, 128),
  'obelics': (8192, 3840, 128),
  'captions': (2048, 1888, 64),
}
PADDED = {'mmc4': (256, 6), 'obelics': (1024, 4), 'captions': (256, 1)}
CONTESTANTS = (
  'plan', 'first-fit', 'grain/FirstFit', 'grain/BestFit', 'grain/ConcatThenSplit',
  'padded',
)  # fmt: skip
COLUMNS = {
  'stream': 'fill of stream',
  'patches': 'fill of patches',
  'dropped': 'documents dropped or cut',
  'seconds': 'seconds of planning',
  'peak_mb': 'MB at the peak',
  'row_us': 'µs a row',
  'open_seconds': 'seconds to open step 10,000,000',
}


def needs_of(name, documents):
  """i32[documents, 4] in the order of NAMES."""
  rng = np.random.default_rng(0)
  if name == 'captions':
    text = (rng.poisson(14, documents) + 1).astype(np.int32)
    images = np.ones(documents, np.int32)
  else:
    mean, sigma, each = {'mmc4': (435, 0.8, 5.8), 'obelics': (818, 1.0, 2.5)}[name]
    text = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, documents)
    text = np.maximum(text, 8).astype(np.int32)
    images = rng.geometric(1 / each, documents).astype(np.int32)
  if name == 'mmc4':
    patches = 256 * images
  else:
    sides = rng.integers(8, 17, (2, int(images.sum())), np.int32)
    starts = np.cumsum(images) - images
    patches = np.add.reduceat(sides[0] * sides[1], starts).astype(np.int32)
  in_stream = patches if name == 'captions' else images
  return np.stack([text + in_stream, text, patches, images], axis=1)


def room_of(name):
  stream, patches, items = MIXTURES[name]
  return np.array([stream, stream, patches, items])


def fill(used, rows, room):
  used = np.asarray(used, np.float64) / max(rows, 1) / room
  return {'stream': round(float(used[0]), 4), 'patches': round(float(used[2]), 4)}


def plan(name, needs):
  from mmjax.batch import BankBudget, Budget
  from mmjax.data.plan import Lengths, PackPlan

  stream, patches, items = MIXTURES[name]
  budget = Budget(stream, stream, {'image': BankBudget(patches, items, 768)})
  lengths = Lengths(NAMES, needs)

  def run():
    return PackPlan(lengths, budget)

  def after(made):
    rows = 64
    began = time.monotonic()
    made.row(10_000_000 * rows)
    opened = time.monotonic() - began
    many = 20_000
    began = time.process_time()
    for r in range(many):
      made.row(r)
    each = (time.process_time() - began) / many
    dropped = sum(made.dropped.values())
    return {
      'stream': round(made.fill['stream'], 4),
      'patches': round(made.fill['image'], 4),
      'dropped': dropped,
      'row_us': round(1e6 * each, 1),
      'open_seconds': round(opened, 3),
    }

  return run, after


def usable(name, needs):
  ok = (needs <= room_of(name)).all(axis=1)
  return needs[ok], int((~ok).sum())


def first_fit(name, needs):
  kept, dropped = usable(name, needs)
  room = room_of(name)

  def run():
    free, rows = np.repeat(room[None], 64, axis=0), 64
    for need in kept:
      fits = (free >= need).all(axis=1)
      i = int(fits.argmax())
      if not fits[i]:  # the oldest goes
        free = np.concatenate([free[1:], room[None]])
        i, rows = 63, rows + 1
      free[i] -= need
    return rows

  return run, lambda rows: {**fill(kept.sum(0, np.int64), rows, room), 'dropped': dropped}


def grain_packer(kind):
  def contestant(name, needs):
    import grain
    from grain.experimental import (
      BestFitPackIterDataset,
      ConcatThenSplitIterDataset,
      FirstFitPackIterDataset,
    )

    kept, dropped = usable(name, needs)
    room = room_of(name)
    # Grain packs features that are arrays, one slot each: of one byte here.
    features = {'stream': 0, 'patches': 2}
    limit = {k: int(room[i]) for k, i in features.items()}

    def arrays(need):
      return {k: np.ones(int(need[i]), np.uint8) for k, i in features.items()}

    source = (
      grain.MapDataset.source(kept)
      .map(arrays)
      .to_iter_dataset(grain.ReadOptions(num_threads=0))
    )
    if kind == 'ConcatThenSplit':
      made = ConcatThenSplitIterDataset(source, length_struct=limit)
    else:
      cls = {'FirstFit': FirstFitPackIterDataset, 'BestFit': BestFitPackIterDataset}[kind]
      made = cls(
        source, length_struct=limit, num_packing_bins=64, shuffle_bins=False,
        meta_features=(),
      )  # fmt: skip

    def run():
      rows, used = 0, np.zeros(4)
      for row in made:
        values = row[0] if isinstance(row, tuple) else row
        rows += 1
        for k, i in features.items():
          used[i] += np.count_nonzero(values[k])
      return rows, used

    def after(out):
      rows, used = out
      return {**fill(used, rows, room), 'dropped': dropped}

    return run, after

  return contestant


def padded(name, needs):
  tokens, images = PADDED[name]

  def run():
    share = np.minimum(images / needs[:, 3], 1)
    used = np.minimum(needs[:, 0], tokens).sum(), (needs[:, 2] * share).sum()
    per_image = needs[:, 2].max() if name == 'captions' else 256
    cut = (needs[:, 0] > tokens) | (needs[:, 3] > images)
    return used, per_image * images, int(cut.sum())

  def after(out):
    used, patches, cut = out
    rows = len(needs)
    return {
      'stream': round(float(used[0] / rows / tokens), 4),
      'patches': round(float(used[1] / rows / patches), 4),
      'dropped': cut,
    }

  return run, after


def peak_mb():
  """The most memory since `reset`, of this process."""
  text = pathlib.Path('/proc/self/status').read_text()
  return int(text.split('VmHWM:')[1].split()[0]) / 1024


def contest(contestant, name, documents):
  """One contestant in this process, as a dict."""
  needs = needs_of(name, documents)
  kind = contestant.removeprefix('grain/')
  makers = {'plan': plan, 'first-fit': first_fit, 'padded': padded}
  run, after = (makers.get(contestant) or grain_packer(kind))(name, needs)
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew
  before, began = peak_mb(), time.process_time()
  made = run()
  seconds, peak = time.process_time() - began, peak_mb() - before
  return {'seconds': round(seconds, 2), 'peak_mb': round(peak), **after(made)}


def table(reports):
  lines = []
  for report in reports:
    lines += ['', f'{report["mixture"]}: {report["documents"]:,} documents, rows of'
              f' {report["budget"]}', '']  # fmt: skip
    lines.append('| | ' + ' | '.join(COLUMNS.values()) + ' |')
    lines.append('|' + '---|' * (1 + len(COLUMNS)))
    for name, one in report['results'].items():
      lines.append(
        '| ' + ' | '.join([name, *(str(one.get(c, '')) for c in COLUMNS)]) + ' |'
      )
  return '\n'.join(lines[1:])


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--documents', type=int, default=100_000)
  parser.add_argument('--only', default=','.join(CONTESTANTS))
  parser.add_argument('--mixtures', default=','.join(MIXTURES))
  parser.add_argument('--table', help='print the report of an earlier run as a table')
  parser.add_argument('--one', nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.table:
    lines = pathlib.Path(args.table).read_text().splitlines()
    print(table([json.loads(line) for line in lines if line.startswith('{')]))
    return
  if args.one:
    print(json.dumps(contest(*args.one, args.documents)))
    return
  for name in args.mixtures.split(','):
    results = {}
    for contestant in args.only.split(','):
      command = [sys.executable, __file__, f'--documents={args.documents}']
      out = subprocess.run(
        [*command, '--one', contestant, name], capture_output=True, text=True
      )
      if out.returncode:
        print(f'{contestant}, {name}: {out.stderr.splitlines()[-1:]}', file=sys.stderr)
        continue
      results[contestant] = json.loads(out.stdout.splitlines()[-1])
    budget = '{} slots, {} patches, {} images'.format(*MIXTURES[name])
    report = {'benchmark': 'packing', 'mixture': name, 'documents': args.documents}
    print(json.dumps({**report, 'budget': budget, 'results': results}), flush=True)


if __name__ == '__main__':
  main()
