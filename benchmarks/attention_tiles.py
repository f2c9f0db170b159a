"""Which share of attention's tiles the kernel visits, on rows packed by the pack plan.

  python benchmarks/attention_tiles.py                  # a JSON line per attention
  python benchmarks/attention_tiles.py --tile=256,512 --rows=64

The documents' lengths are those of benchmarks/packing.py (corpora's published means,
shapes assumed), the rows are the plan's. Attentions of a mixture:

  self      text is causal, the slots of an image see each other
  cross     to the 64 latents of each image (Flamingo's), the latest one only
  encoder   patches of a bank, each image by itself

Shares are of all T x S pairs: `visited` by the kernel, `ideal` what tags let somebody
see, `meeting` whole tiles in which somebody sees somebody (no kernel of such tiles can
do with less), `causal_segments` the tiles that splash attention computes: it skips by
a mask that is fixed when it is compiled (the causal one for self, none else), and
segments only hide. For images in the stream even that mask isn't exact.
"""

import argparse
import json

import jax
import numpy as np
import packing

from mmjax.batch import BankBudget, Budget, KeyTags, QueryTags, visible
from mmjax.data.plan import Lengths, PackPlan
from mmjax.ops.kernels.tiles import SKIPPED, Tiles, meetings

LATENTS = 64


def attentions(name, count):
  """(attention, query tags, key tags) of some rows, [count, T] and [count, S]."""
  stream, patches, items = packing.MIXTURES[name]
  needs = packing.needs_of(name, 20_000)
  budget = Budget(stream, stream, {'image': BankBudget(patches, items, 768)})
  plan = PackPlan(Lengths(packing.NAMES, needs), budget)
  segments, order, first_image = np.zeros((3, count, stream), np.int32)
  last = np.full((count, stream), -1, np.int32)
  item_tags = np.zeros((2, count, items), np.int32)
  owner = np.zeros((count, patches), np.int32)
  for b in range(count):
    at = item = patch = 0
    for segment, document in enumerate(plan.row(b), 1):
      slots, text, of_patches, images = needs[document]
      size = of_patches // images
      # Images stand evenly in the text: as their patches, or as a marker.
      width = size if name == 'captions' else 1
      rng = np.random.default_rng(document)
      places = np.sort(rng.integers(0, text + 1, images))
      rank, latest, seen = [], [], 0
      for i in range(images + 1):
        until = places[i] if i < images else text
        words = until - (places[i - 1] if i else 0)
        rank += range(seen, seen + words)
        latest += [i - 1] * words
        seen += words
        if i < images:
          rank += [seen] * width
          latest += [i] * width
          seen += 1
      rank, latest = np.array(rank[:slots]), np.array(latest[:slots])
      here = slice(at, at + len(rank))
      segments[b, here], order[b, here], last[b, here] = segment, rank, rank
      first_image[b, here] = latest
      at += len(rank)
      item_tags[0, b, item : item + images] = segment
      item_tags[1, b, item : item + images] = np.arange(images)
      for i in range(images):
        owner[b, patch : patch + size] = item + i + 1
        patch += size
      item += images
  zero = np.zeros_like(order)
  yield 'self', QueryTags(segments, zero, last), KeyTags(segments, order)
  if name != 'captions':
    keys = KeyTags(*(np.repeat(x, LATENTS, 1) for x in item_tags))
    yield (
      'cross',
      QueryTags(segments, first_image, np.where(segments, first_image, -1)),
      keys,
    )
  none = np.zeros_like(owner)
  yield 'encoder', QueryTags(owner, none, np.where(owner, 0, -1)), KeyTags(owner, none)


def fill(tags, size, value):
  more = -tags.segment_ids.shape[1] % size
  return jax.tree.map(
    lambda x: np.pad(x, ((0, 0), (0, more)), constant_values=value), tags
  )


def measure(query, key, tiles):
  B, T = query.segment_ids.shape
  S = key.segment_ids.shape[1]
  padded = fill(query, tiles.queries, -1), fill(key, tiles.keys, -2)
  states = np.asarray(meetings(*padded, tiles))
  meeting = pairs = 0
  for b in range(B):  # all pairs of one row at a time
    one = jax.tree.map(lambda x, b=b: x[b : b + 1], padded)
    mask = np.asarray(visible(*one))[0]
    pairs += mask.sum()
    _, n, m = states.shape
    met = mask.reshape(n, tiles.queries, m, tiles.keys).any((1, 3))
    meeting += met.sum()
    if (met & (states[b] == SKIPPED)).any():
      raise ValueError('a tile was skipped that somebody sees into')
  ends = (np.arange(n) + 1) * tiles.queries
  causal = (np.arange(m) * tiles.keys < ends[:, None]).mean()
  area = tiles.queries * tiles.keys / (B * T * S)
  return {
    'T': T, 'S': S, 'tile': list(tiles),
    'visited': round(float((states > SKIPPED).sum() * area), 4),
    'meeting': round(float(meeting * area), 4),
    'ideal': round(float(pairs / (B * T * S)), 4),
    'causal': round(float(causal * n * m * area * B), 4),
    'all': round(float(n * m * area * B), 4),
  }  # fmt: skip


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--mixtures', default=','.join(packing.MIXTURES))
  parser.add_argument('--rows', type=int, default=16)
  parser.add_argument('--tile', default='512,512')
  args = parser.parse_args()
  tiles = Tiles(*map(int, args.tile.split(',')))
  for name in args.mixtures.split(','):
    for attention, query, key in attentions(name, args.rows):
      line = {'mixture': name, 'attention': attention, **measure(query, key, tiles)}
      causal, everything = line.pop('causal'), line.pop('all')
      line['causal_segments'] = causal if attention == 'self' else everything
      print(json.dumps(line), flush=True)


if __name__ == '__main__':
  main()
