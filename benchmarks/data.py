"""Loading speed beside torch's DataLoader, webdataset and the bare decoder.

  python benchmarks/data.py --photos=FOLDER   # needs the extras `parity` and `test`,
                                              # and webdataset

The photos of the folder (any, of 0.2 Mpix or more; without a folder, coloured noise)
are cut and scaled at random, always the same way, into 480 JPEGs (quality 90, 0.28
Mpix in the mean) and 160 PNGs (0.07 Mpix), each with a caption. Two cases:

  fixed    to 224 x 224
  native   to patches of 16 at the image's own aspect ratio, at most 576 (0.15 Mpix)

  ceiling     a plain loop to the same pixels as mmjax, bit by bit, and no more:
              libjpeg-turbo, scaled, and libspng, then the resize by SIMD
  mmjax       the Pipeline, from a prepared dataset to packed batches, resample='fast'
  ceiling-area, mmjax-area  both with OpenCV's area resize (what grows: Pillow's)
  mmjax-bicubic  with Pillow's filter, which all below have too
  dataloader  torch: files, Pillow decode and resize, stacked (padded, if native)
  webdataset  the same from a tar

Each has 1 or 2 processes that decode ('mmjax-thread': threads of the main process).
A document is an image and its caption, so images/s are documents/s. Contestants live in
processes of their own; rounds alternate; medians are reported, one JSON line per case;
`of_ceiling` is the median over rounds of the ratio in a round. `cpu_ms` is the time of
all its processes for an image: it says more than the clock where the machine has other
work.

  python benchmarks/data.py --memory          # resident set over 100,000 documents, of
                                              # all processes, without workers and with
"""

import argparse
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import statistics
import sys
import tarfile
import tempfile
import time

import numpy as np
import PIL.Image
from contestant import Contestant, environment, take_turns

PATCH, SIDE, MOST = 16, 224, 576
BATCH = 32
JPEGS, PNGS = 480, 160
# Batches of each worker that are made while a contestant waits for its round, and more.
WAITING = {'ceiling': 0, 'mmjax': 10, 'dataloader': 4, 'webdataset': 4}
CAPTION = 'a photo of things on a table, number {}, taken in the afternoon'
NAMES = ('ceiling', 'mmjax', 'mmjax-thread', 'ceiling-area', 'mmjax-area',
         'mmjax-bicubic', 'dataloader', 'webdataset')  # fmt: skip


def photos(folder):
  """Images; without a folder tinted noise, smooth as lenses draw."""
  if folder:
    for path in sorted(pathlib.Path(folder).rglob('*.jpg')):
      image = PIL.Image.open(path)
      if image.width * image.height >= 200_000 and image.mode == 'RGB':
        yield image.convert('RGB')
    return
  rng = np.random.default_rng(0)
  for _ in range(8):
    y, x = np.meshgrid(np.fft.fftfreq(600), np.fft.rfftfreq(800), indexing='ij')
    waves = np.fft.rfft2(rng.normal(size=(600, 800))) / (np.hypot(y, x) + 1e-3) ** 1.3
    image = np.fft.irfft2(waves)[..., None] * rng.uniform(0.5, 1, 3)
    image = 128 + 40 * (image - image.mean()) / image.std()
    yield PIL.Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


def make_files(folder, out, jpegs=JPEGS, pngs=PNGS):
  """Writes the files, a tar of them and a prepared dataset."""
  from mmjax.data import tokenizer
  from mmjax.data.document import Document, Image, Text
  from mmjax.data.writer import Writer

  rng, found = np.random.default_rng(0), list(itertools.islice(photos(folder), 64))
  out = pathlib.Path(out)
  (out / 'files').mkdir()
  # PNGs stand among the JPEGs, not behind them.
  forms = rng.permutation(['jpg'] * jpegs + ['png'] * pngs)
  with Writer(out / 'dataset', tokenizer.ByteTokenizer()) as writer:
    for i, form in enumerate(forms):
      image = found[i % len(found)]
      w, h = (np.array(image.size) * rng.uniform(0.7, 1, 2)).astype(int)
      x, y = (rng.uniform(size=2) * (np.array(image.size) - (w, h))).astype(int)
      area = (280_000 if form == 'jpg' else 70_000) * rng.uniform(0.6, 1.4)
      scale = np.sqrt(area / (w * h))
      size = (max(1, round(w * scale)), max(1, round(h * scale)))
      image = image.crop((x, y, x + w, y + h)).resize(size, PIL.Image.BICUBIC)
      file = io.BytesIO()
      image.save(file, 'JPEG' if form == 'jpg' else 'PNG', quality=90)
      name = out / 'files' / f'{i:05d}.{form}'
      name.write_bytes(file.getvalue())
      text = CAPTION.format(i)
      name.with_suffix('.txt').write_text(text)
      writer.add('train', Document((Image(file.getvalue()), Text(text, True)), str(i)))
  with tarfile.open(out / 'files.tar', 'w') as tar:
    for path in sorted((out / 'files').iterdir()):
      tar.add(path, path.name)


def grid(case, height, width):
  """Rows and columns of patches, as the rule has them."""
  return rule(case).grid(height, width)[1:]


def rule(case, resample='bicubic'):
  from mmjax.data.media import ImageRule

  if case == 'fixed':
    return ImageRule(PATCH, 'fixed', SIDE, resample=resample)
  return ImageRule(PATCH, 'native', max_patches=MOST, resample=resample)


# The ceiling.


def bare(path, case, resample):
  import pyspng
  import simplejpeg

  data = path.read_bytes()
  if path.suffix == '.png':
    image = pyspng.load(data, 'RGB')
    rows, cols = grid(case, *image.shape[:2])
  else:
    h, w = simplejpeg.decode_jpeg_header(data)[:2]
    rows, cols = grid(case, h, w)
    half = -(-h // 2), -(-w // 2)
    if half[0] >= rows * PATCH and half[1] >= cols * PATCH:
      h, w = half
    image = simplejpeg.decode_jpeg(data, min_height=h, min_width=w)
  size = (cols * PATCH, rows * PATCH)
  if size == image.shape[1::-1]:
    return image
  return (by_area if resample == 'area' else by_simd)(image, size)


def by_area(image, size):
  import cv2

  cv2.setNumThreads(1)
  if size[0] <= image.shape[1] and size[1] <= len(image):
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)
  return np.asarray(PIL.Image.fromarray(image).resize(size, PIL.Image.BICUBIC))


def by_simd(image, size):
  import cykooz_resizer as simd

  cubic = simd.ResizeAlg.convolution(simd.FilterType.catmull_rom)
  source = simd.ImageData(*image.shape[1::-1], simd.PixelType.U8x3, image.tobytes())
  made = simd.ImageData(*size, simd.PixelType.U8x3)
  simd.Resizer().resize(source, made, simd.ResizeOptions(cubic))
  return np.frombuffer(made.get_buffer(), np.uint8).reshape(size[1], size[0], 3)


def bare_loop(paths, case, resample):
  for path in paths:
    bare(path, case, resample)
  return len(paths)


def ceiling(out, case, workers, resample):
  paths = sorted(p for p in (out / 'files').iterdir() if p.suffix != '.txt')
  same_pixels(paths[:BATCH], case, resample)
  if workers == 1:
    while True:
      yield bare_loop(paths[:BATCH], case, resample)
      paths = paths[BATCH:] + paths[:BATCH]
  with multiprocessing.get_context('spawn').Pool(workers) as pool:
    while True:
      parts = [(paths[i::workers], case, resample) for i in range(workers)]
      yield sum(pool.starmap(bare_loop, parts))


def same_pixels(paths, case, resample):
  """Refuses to compare with a loop that does other work than mmjax does."""
  from mmjax.data.document import Image
  from mmjax.data.media import patchify

  for path in paths:
    _, want = rule(case, resample).patches_of(Image(path.read_bytes()))
    if not np.array_equal(patchify(bare(path, case, resample), PATCH), want):
      raise SystemExit(f'{path}: the plain loop has other pixels than mmjax')


# mmjax.


def item_slots(item):
  return item.grid


def mmjax(out, case, workers, threads, resample):
  from mmjax.batch import BankBudget, Budget
  from mmjax.data.pipeline import Pipeline
  from mmjax.data.store import Dataset

  each = (SIDE // PATCH) ** 2 if case == 'fixed' else MOST
  text, images = 80, 4
  budget = Budget(
    images * (each + text), images * text,
    {'image': BankBudget(images * each, images, PATCH * PATCH * 3)},
  )  # fmt: skip
  pipeline = Pipeline(
    Dataset(out / 'dataset', 'train'), budget=budget, rows=BATCH // images,
    rules={'image': rule(case, resample)}, slots=item_slots,
    workers=workers, threads=threads,
  )  # fmt: skip
  for step in pipeline.iterate():
    yield int(step.stats['documents'])  # of an image each


# torch.


def pillow(data, case):
  image = PIL.Image.open(data).convert('RGB')
  rows, cols = grid(case, image.height, image.width)
  return np.asarray(image.resize((cols * PATCH, rows * PATCH), PIL.Image.BICUBIC))


def collate(samples):
  """Stacked, or cut into patches and padded to the longest."""
  import torch

  images, texts = zip(*samples)
  if len({image.shape for image in images}) > 1:
    cut = [
      image.reshape(len(image) // PATCH, PATCH, -1, PATCH, 3)
      .transpose(0, 2, 1, 3, 4)
      .reshape(-1, PATCH * PATCH * 3)
      for image in images
    ]
    padded = np.zeros((len(cut), max(map(len, cut)), PATCH * PATCH * 3), np.uint8)
    for row, patches in zip(padded, cut):
      row[: len(patches)] = patches
    return torch.from_numpy(padded), texts
  return torch.from_numpy(np.stack(images)), texts


class Files:
  def __init__(self, out, case):
    self.paths = sorted(p for p in (out / 'files').iterdir() if p.suffix != '.txt')
    self.case = case

  def __len__(self):
    return len(self.paths)

  def __getitem__(self, i):
    path = self.paths[i]
    return pillow(path, self.case), list(path.with_suffix('.txt').read_bytes())


class Sample:
  """A webdataset sample to image and text."""

  def __init__(self, case):
    self.case = case

  def __call__(self, sample):
    data = sample.get('jpg') or sample['png']
    return pillow(io.BytesIO(data), self.case), list(sample['txt'])


def dataloader(out, case, workers, name):
  import torch.utils.data

  torch.set_num_threads(1)
  options = dict(num_workers=workers, collate_fn=collate)
  if name == 'webdataset':
    import webdataset

    shards = [str(out / 'files.tar')] * workers  # one each
    data = webdataset.WebDataset(shards, shardshuffle=False).shuffle(100)
    data = data.map(Sample(case)).batched(BATCH, collation_fn=None)
    loader = torch.utils.data.DataLoader(
      data.repeat(), batch_size=None, **{**options, 'collate_fn': collate}
    )
  else:
    loader = torch.utils.data.DataLoader(
      Files(out, case), BATCH, shuffle=True, persistent_workers=True, **options
    )
  while True:
    for images, _ in loader:
      yield len(images)


# Running.


def contestant(name, out, case, workers):
  name, _, kind = name.partition('-')
  resample = kind if kind in ('area', 'bicubic') else 'fast'
  if name == 'ceiling':
    return ceiling(out, case, workers, resample)
  if name == 'mmjax' and kind == 'thread':
    return mmjax(out, case, 0, workers, resample)
  if name == 'mmjax':
    return mmjax(out, case, workers, 1, resample)
  return dataloader(out, case, workers, name)


def cpu_seconds():
  """Of this process and all that it has started."""
  import psutil

  this = psutil.Process()
  times = [p.cpu_times() for p in (this, *this.children(recursive=True))]
  return sum(t.user + t.system for t in times)


def serve(name, out, case, workers, images):
  batches = contestant(name, pathlib.Path(out), case, workers)
  next(batches)
  print('{}', flush=True)
  for _ in sys.stdin:
    for _ in range(WAITING[name.partition('-')[0]] * workers):
      next(batches)
    start, cpu, count = time.perf_counter(), cpu_seconds(), 0
    while count < images * workers:
      count += next(batches)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    print(json.dumps([count / seconds, 1000 * cpu / count]), flush=True)
  os._exit(0)  # and all that waits for a next round


class Process(Contestant):
  def __init__(self, name, workers, out, case, images):
    command = [sys.executable, __file__, '--serve', name, '--case', case]
    command += ['--out', str(out), '--workers', str(workers), '--images', str(images)]
    super().__init__(command, environment(1))

  def result(self):
    self.close()
    speeds = [r[0] for r in self.rounds]
    return {
      'images_per_second': round(statistics.median(speeds)),
      'range': [round(min(speeds)), round(max(speeds))],
      'cpu_ms': round(statistics.median(r[1] for r in self.rounds), 3),
    }


def run(case, out, args):
  running = {}
  for name in args.only.split(',') if args.only else NAMES:
    for workers in (1, 2):
      running[f'{name} {workers}'] = Process(name, workers, out, case, args.images)
  take_turns(running, args.rounds, case, '{:.0f} images/s'.format)
  results = {name: process.result() for name, process in running.items()}
  for name, r in results.items():
    top = running.get(f'ceiling{"-area" * ("area" in name)} {name[-1]}')
    if top:
      pairs = list(zip(running[name].rounds, top.rounds))
      r['of_ceiling'] = round(statistics.median(a[0] / b[0] for a, b in pairs), 2)
      r['of_ceiling_by_cpu'] = round(statistics.median(b[1] / a[1] for a, b in pairs), 2)
  return results


def resident():
  """MB of this process and its children; what they share counts for each."""
  import psutil

  this = psutil.Process()
  processes = (this, *this.children(recursive=True))
  return round(sum(p.memory_info().rss for p in processes) / 1e6, 1)


def memory(workers, documents=100_000, first=10_000, size=10_000):
  """Resident MB after `first` and after all documents, through the pipeline."""

  from mmjax.batch import BankBudget, Budget
  from mmjax.data import tokenizer
  from mmjax.data.document import Document, Image, Text
  from mmjax.data.media import ImageRule
  from mmjax.data.pipeline import Pipeline
  from mmjax.data.store import Dataset
  from mmjax.data.writer import Writer

  rng, rows = np.random.default_rng(0), 16
  with tempfile.TemporaryDirectory() as out:
    path = pathlib.Path(out) / 'dataset'
    with Writer(path, tokenizer.ByteTokenizer()) as writer:
      for i in range(size):
        sides = rng.integers(16, 48, 2)
        image = rng.integers(0, 256, (*sides, 3), np.uint8)
        spans = (Image(image), Text(CAPTION.format(i), True))
        writer.add('train', Document(spans, str(i)))
    pipeline = Pipeline(
      Dataset(path, 'train'), budget=Budget(512, 512, {'image': BankBudget(32, 8, 192)}),
      rows=rows, rules={'image': ImageRule(8, size=16, resample='area')},
      slots=item_slots, augment=('mirror', 'crop', 'colour'), workers=workers,
    )  # fmt: skip
    seen, found = 0, {}
    steps = pipeline.iterate()
    for step in steps:
      seen += int(step.stats['documents'])
      for mark in (first, documents):
        if seen >= mark and mark not in found:
          found[mark] = resident()
      if seen >= documents:
        break
    steps.close()
  return {str(mark): megabytes for mark, megabytes in found.items()}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--photos', help='a folder with photos')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--cases', default='fixed,native')
  parser.add_argument('--images', type=int, default=320, help='of a round and worker')
  parser.add_argument('--only', default='', help='contestants; default all')
  parser.add_argument('--memory', action='store_true')
  for hidden in ('--serve', '--case', '--out'):
    parser.add_argument(hidden, help=argparse.SUPPRESS)
  parser.add_argument('--workers', type=int, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.serve:
    serve(args.serve, args.out, args.case, args.workers, args.images)
  elif args.memory:
    for workers in (0, 1):
      facts = {'benchmark': 'data', 'case': 'memory', 'workers': workers}
      print(json.dumps({**facts, 'resident_mb': memory(workers)}), flush=True)
  else:
    with tempfile.TemporaryDirectory() as out:
      make_files(args.photos, out)
      for case in args.cases.split(','):
        results = run(case, pathlib.Path(out), args)
        print(json.dumps({'benchmark': 'data', 'case': case, **results}), flush=True)


if __name__ == '__main__':
  main()
