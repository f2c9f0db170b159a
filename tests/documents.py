"""Small random documents and the plainest packer there is, to test models with.

A document is a list of spans: ('text', ids, trained[, branch]) or
('image', values[r, c, C]); what names no branch is of the one before.
"""

import numpy as np

from mmjax.batch import PLACEHOLDER, BankBudget, Budget


def random_document(rng, spans, vocab=40, channels=6, max_text=5):
  """A document of random spans, e.g. spans='tit': text, image, text."""
  document = []
  for letter in spans:
    if letter == 't':
      ids = rng.integers(1, vocab, rng.integers(1, max_text + 1))
      document.append(('text', ids, bool(rng.integers(2))))
    else:
      grid = rng.integers(1, 4, 2)
      document.append(('image', rng.integers(0, 256, (*grid, channels))))
  return document


def length(document, markers=0):
  media = int(markers)
  return sum(
    len(s[1]) if s[0] == 'text' else media or s[1][..., 0].size for s in document
  )


def patches(document):
  return sum(s[1][..., 0].size for s in document if s[0] == 'image')


def pack(rows, T=48, P=48, I=8, channels=6, markers=False):
  """A batch of NumPy arrays from rows (lists) of documents; one shape for all tests.

  An image takes a slot of the stream per patch, or as many as `markers` says.
  """
  batch = Budget(T, T, {'image': BankBudget(P, I, channels)}).empty(len(rows))
  for b, row in enumerate(rows):
    t = p = i = 0
    for segment, document in enumerate(row, 1):
      order = position = branch = fork = 0
      begin = t  # of the branch
      for kind, values, *rest in document:
        if rest[1:] != [branch] * len(rest[1:]):
          if branch:
            batch.stream.until[b, begin:t], position = order - 1, fork
          branch, begin, fork = rest[1], t, position
        n = length([(kind, values)], markers)
        here, s = (b, slice(t, t + n)), batch.stream
        s.segment_ids[here] = segment
        if kind == 'text':
          s.tokens[here] = values
          s.order[here] = s.last[here] = order + np.arange(n)
          s.positions[here] = position + np.arange(n)[:, None]
          s.weights[here] = float(rest[0])
          order, position = order + n, position + n
        else:
          r, c, C = values.shape
          bank, there = batch.bank['image'], (b, slice(p, p + r * c))
          s.tokens[here] = PLACEHOLDER['image']
          s.order[here] = s.last[here] = order
          grid = np.stack(np.meshgrid([0], range(r), range(c), indexing='ij'), -1)
          latents = np.arange(n)[:, None] * np.array([[0, 0, 1]])
          s.positions[here] = position + (latents if markers else grid.reshape(-1, 3))
          s.source[here] = (i * n if markers else p) + np.arange(n)
          bank.values[there] = values.reshape(r * c, C)
          bank.items[there] = i + 1
          bank.positions[there] = grid.reshape(-1, 3)
          bank.item_segments[b, i], bank.item_order[b, i] = segment, order
          position += n if markers else max(r, c)
          order, p, i = order + 1, p + r * c, i + 1
        t += n
      if branch:
        batch.stream.until[b, begin:t] = order - 1
      if document and document[0][0] == 'text':
        batch.stream.weights[b, t - length(document, markers)] = 0
  return batch
