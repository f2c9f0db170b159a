"""Random documents for the benchmark of train steps, and two ways to batch them.

packed   by mmjax' own bin packing; a row holds what its budget says, and a batch so
         many (`ROWS`) that none stays empty, as none would in a run
padded   so many documents a batch, as they come, one a row, each padded to the longest
"""

import numpy as np

from mmjax.batch import BankBudget, Budget
from mmjax.data import binpack
from mmjax.data.document import Document, Image, Text
from mmjax.data.example import to_example
from mmjax.data.media import ImageRule
from mmjax.data.pack import fit_budget, needs_of, pack
from mmjax.data.plan import limits

CHANNELS = 16 * 16 * 3
RESOURCES = 'stream', 'targets', 'image/patches', 'image/items'


def example(rng, images, text, *, side, slots, vocab_size, end_id=0):
  """A document: images of side x side pixels, then `text` tokens, all of them trained."""

  class Words:
    def encode(self, text):
      return list(rng.integers(1, vocab_size - 1, len(text)))

  Words.end_id = end_id
  pictures = [
    Image(rng.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(images)
  ]
  document = Document((*pictures, Text('.' * (text - 1), True)))
  rule = ImageRule(patch=16, resize='fixed', size=side)
  return to_example(document, tokenizer=Words(), rules={'image': rule}, slots=slots)


def budget(stream, targets, patches, items):
  """Of a row: slots, places for targets, and images with their patches."""
  return Budget(stream, targets, {'image': BankBudget(patches, items, CHANNELS)})


def packed(found, room, rows, group=None):
  """Batches of so many rows; with `group`, one for each so many examples.

  Raises:
    ValueError: a group that doesn't fit into one batch.
  """
  batches, most = [], limits(RESOURCES, room)
  for i in range(0, len(found), group or len(found)):
    some = found[i : i + (group or len(found))]
    took = np.array([[needs_of(x).get(r, 0) for r in RESOURCES] for x in some])
    filled = binpack.pack(took, np.ones(len(some), np.int64), most)
    lists = [[some[k] for k in row] for row, _ in filled]
    if group and len(lists) > rows:
      raise ValueError(
        f'a group of {group} documents takes {len(lists)} rows, not {rows}'
      )
    lists += [[]] * (-len(lists) % rows)
    batches += [pack(lists[k : k + rows], room) for k in range(0, len(lists), rows)]
  return batches


def padded(found, rows):
  """Batches of `rows` documents as they come, padded to the longest of them."""
  batches = []
  for i in range(0, len(found), rows):
    group = found[i : i + rows]
    room = fit_budget(group, budget(1, 1, 1, 1), multiple=1)
    batches.append(pack([[x] for x in group], room))
  return batches


def useful(batches):
  """Slots that hold something, of all batches."""
  return int(sum((b.stream.segment_ids > 0).sum() for b in batches))


def pictures(batch, side, mean, std):
  """Pixels f32[B, I, 3, side, side] of a batch's images, which have this size."""
  values = batch.bank['image'].values
  B, P, _ = values.shape
  n = side // 16
  values = values[:, : P // n**2 * n**2]
  x = values.reshape(B, -1, n, n, 16, 16, 3).astype(np.float32)
  x = (x - np.array(mean, np.float32)) / np.array(std, np.float32)
  x = x.transpose(0, 1, 6, 2, 4, 3, 5).reshape(B, -1, 3, side, side)
  return np.ascontiguousarray(x)


def through_files(torch_model, folder):
  """(model, parameters) here with the weights of a model of transformers."""
  from mmjax.interop.huggingface import load

  torch_model.save_pretrained(folder)
  return load(folder)
