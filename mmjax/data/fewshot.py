"""Few-shot documents: k support documents with their answers, then the document asked.

  dataset[7]               [image] what shape?  circle<end>

  FewShot(...)[7], k = 2   [image] is it red?  no<end>        of document 3, a branch
                           [image] what color?  blue<end>     of document 5, another
                           [image] what shape?  circle<end>   7 itself, all branches

Supports stand in the trunk, so every branch of the document sees them; of a support
with branches one is taken. They aren't trained unless asked for, but read the same,
end tokens and all (Flamingo, 2204.14198, section 3.3; Brown et al., 2005.14165).

Which ones: `random_supports`, a function of seed and document; `nearest_supports`, by
the cosine of embeddings, the nearest last (RICES; Yang et al., 2109.05014); or any
array from elsewhere. The document itself is never among its supports.

A `FewShot` is a dataset like others, with an index of its own, so a pack plan and a
pipeline take it as they take the one it is made of.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.data.document import BadDocument, Document, Span, Text
from mmjax.data.store import Index
from mmjax.data.text import tokenised

_BLOCK = 1024  # documents whose similarities are computed at once


def random_supports(count: int, pool: int, k: int, seed: int, same: bool) -> np.ndarray:
  """k different supports for each document, i32[count, k].

  Args:
    count: of documents.
    pool: of documents to choose from.
    seed: row i is a function of (seed, i, pool) alone.
    same: the pool is the documents themselves, of which none supports itself.

  Raises:
    ValueError: too few to choose from.
  """
  _check_enough(pool, k, same)
  taken = np.arange(count)[:, None] if same else np.empty((count, 0), np.int64)
  chosen = np.empty((count, k), np.int32)
  for j in range(k):
    left = pool - taken.shape[1]
    place = _random(count, seed, j) % max(left, 1)
    # The place-th of those that aren't taken yet.
    for column in taken.T:
      place += place >= column
    chosen[:, j] = place
    taken = np.sort(np.column_stack([taken, place]), axis=1)
  return chosen


def nearest_supports(
  documents: np.ndarray, pool: np.ndarray, k: int, same: bool
) -> np.ndarray:
  """The k of the pool with the largest cosine to each document, i32[M, k].

  The nearest stands last; of equally near ones, the first of the pool is nearer.

  Args:
    documents: f32[M, D] an embedding of each.
    pool: f32[N, D] of those to choose from.
    same: as for `random_supports`.

  Raises:
    ValueError: other shapes, embeddings that aren't finite, too few to choose from.
  """
  for name, array in (('documents', documents), ('pool', pool)):
    if array.ndim != 2 or array.shape[1:] != pool.shape[1:]:
      raise ValueError(
        f'embeddings of the {name} are {list(array.shape)}, of the pool'
        f' {list(pool.shape)}; both must be [count, D]'
      )
    if not np.isfinite(array).all():
      raise ValueError(f'embeddings of the {name} are not all finite')
  if same and len(documents) != len(pool):
    raise ValueError(f'{len(documents)} documents cannot be a pool of {len(pool)}')
  _check_enough(len(pool), k, same)
  pool = _unit(pool)
  chosen = np.empty((len(documents), k), np.int32)
  for start in range(0, len(documents), _BLOCK):
    near = _unit(documents[start : start + _BLOCK]) @ pool.T
    rows = np.arange(len(near))
    if same:
      near[rows, start + rows] = -np.inf
    best = np.argsort(-near, axis=1, kind='stable')[:, :k]
    chosen[start : start + _BLOCK] = best[:, ::-1]
  return chosen


def _unit(array):
  array = array.astype(np.float32)
  return array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12)


def _check_enough(pool, k, same):
  if not 0 <= k <= pool - same:
    raise ValueError(f'{k} supports out of {pool - same} documents')


def embeddings(path: str | os.PathLike, count: int) -> np.ndarray:
  """f[count, D] of an .npy file, a row for each document.

  Raises:
    ValueError: no such file, or another number of rows.
  """
  try:
    found = np.load(path, allow_pickle=False)
  except (OSError, ValueError) as error:
    raise ValueError(f'embeddings {path}: {error}') from None
  if found.ndim != 2 or len(found) != count:
    raise ValueError(f'embeddings {path} are {list(found.shape)}, not [{count}, D]')
  return found


def support(
  document: Document, choice: int, end: str, trained: bool = False
) -> tuple[Span, ...]:
  """A document as it stands before another: the trunk, and one of its branches in it.

  Args:
    document: the support.
    choice: any integer >= 0; which of the branches, counted round.
    end: the end token's name, which closes what isn't trained any more.
    trained: the loss counts its answers.
  """
  kept = _branches(document, choice)
  spans: list[Span] = []
  for span in document.spans:
    if span.branch not in kept:
      continue
    spans.append(dataclasses.replace(span, branch=0))
    if isinstance(span, Text) and span.trained and not trained:
      # Read apart from a template's words before it, as if it were trained.
      answer = dataclasses.replace(spans.pop(), trained=False)
      spans += [Text(''), answer, Text(end, special=True)]
  # Nor are templates of two documents read as one text.
  return (*spans, Text(''))


class FewShot:
  """Documents with k supports in front: `[i] -> Document`, `len`, `.index`.

  Supports that can't be read are an error of the documents they stand in.

  Args:
    dataset: whose documents are asked; `store.Dataset`, or `[i]`, `len`, `.index` and
      `.tokenizer`.
    supports: i32[len(dataset), k] the places of each document's supports in `pool`.
    pool: the dataset they come from; `dataset` itself by default.
    trained: whether the loss counts the answers of supports.
    seed: of the branches taken.

  Raises:
    ValueError: supports of another shape, outside the pool, or of a document itself;
      a pool of another tokenizer.
  """

  def __init__(
    self,
    dataset: Any,
    supports: np.ndarray,
    pool: Any = None,
    *,
    trained: bool = False,
    seed: int = 0,
  ):
    self.dataset, self.pool = dataset, dataset if pool is None else pool
    self.tokenizer, self.trained = dataset.tokenizer, trained
    if self.pool.tokenizer.hash != dataset.tokenizer.hash:
      raise ValueError('few-shot supports are of another tokenizer than the documents')
    if supports.ndim != 2 or len(supports) != len(dataset):
      raise ValueError(f'supports are {list(supports.shape)}, not [{len(dataset)}, k]')
    if supports.size and not 0 <= supports.min() <= supports.max() < len(self.pool):
      raise ValueError(f'supports must be places in a pool of {len(self.pool)}')
    if pool is None and (supports == np.arange(len(dataset))[:, None]).any():
      raise ValueError('a document is its own support')
    self.supports = supports.astype(np.int32)
    k = supports.shape[1]
    choices = [_random(len(supports), seed, k + j) for j in range(k)]
    self._choices = np.stack(choices, axis=1) if k else self.supports

  def __len__(self) -> int:
    return len(self.dataset)

  def __getitem__(self, i: int) -> Document:
    """Document i behind its supports; `meta` is its own.

    Raises:
      IndexError, BadDocument: as those of the datasets.
    """
    document, spans = self.dataset[i], self.before(i)
    meta = document.meta
    if 'types' in meta:
      asked = sum(isinstance(s, Text) and s.trained for s in spans)
      meta = {**meta, 'types': [*[''] * asked, *meta['types']]}
    return Document((*spans, *document.spans), document.id, meta)

  def before(self, i: int) -> tuple[Span, ...]:
    """What stands before document i.

    Raises:
      IndexError, BadDocument: as those of the pool.
    """
    spans: list[Span] = []
    for place, choice in self._pairs(i):
      spans += support(self.pool[place], choice, self.tokenizer.end_name, self.trained)
    return tuple(spans)

  @functools.cached_property
  def index(self) -> Index:
    """Sums over supports and document, without decoding a picture.

    Reads every record of the dataset and every support once, for what their branches
    and trained texts take.
    """
    if not self.supports.size:
      return self.dataset.index
    supports, own = self._supports(), self.dataset.index
    N = len(self)
    text_tokens, targets = own.text_tokens.copy(), own.targets.copy()
    counts, kinds, sizes = np.zeros(N, np.int64), [], []
    for i in range(N):
      parts = [supports[pair] for pair in self._pairs(i)]
      # Something stands before the document now, so all it trains counts; but the
      # very first slot never does.
      with contextlib.suppress(BadDocument):
        targets[i] = _lengths(self.dataset[i].spans, self.tokenizer).trained
      targets[i] += sum(part.trained for part in parts) - parts[0].lone
      text_tokens[i] += sum(part.tokens for part in parts)
      items = slice(own.item_offsets[i], own.item_offsets[i + 1])
      kinds += [*(part.kinds for part in parts), own.item_kind[items]]
      sizes += [*(part.sizes for part in parts), own.item_size[items]]
      counts[i] = sum(len(part.kinds) for part in parts) + items.stop - items.start
    return Index(
      text_tokens=text_tokens,
      targets=targets,
      item_offsets=np.concatenate([[0], np.cumsum(counts)]),
      item_kind=np.concatenate(kinds),
      item_size=np.concatenate(sizes),
    )

  def _pairs(self, i):
    return zip(self.supports[i].tolist(), self._choices[i].tolist())

  def _supports(self) -> dict[tuple[int, int], '_Lengths']:
    """The lengths of each support, by place and choice; each is read once."""
    choices: dict[int, set[int]] = {}
    for place, choice in zip(self.supports.flat, self._choices.flat):
      choices.setdefault(int(place), set()).add(int(choice))
    found, index = {}, self.pool.index
    for place, some in sorted(choices.items()):
      first, end = index.item_offsets[place : place + 2]
      known: dict[int, _Lengths] = {}  # by branch
      try:
        document = self.pool[place]
        count = max(len({s.branch for s in document.spans} - {0}), 1)
      except BadDocument:  # so are then the documents that it stands in
        found |= dict.fromkeys(((place, c) for c in some), _NOTHING)
        continue
      # Which of the document's items each choice keeps.
      items = [s for s in document.spans if not isinstance(s, Text)]
      for choice in some:
        if choice % count not in known:
          branches = _branches(document, choice)
          kept = [first + n for n, s in enumerate(items) if s.branch in branches]
          kept = [n for n in kept if n < end]
          spans = support(document, choice, self.tokenizer.end_name, self.trained)
          lengths = _lengths(spans, self.tokenizer)
          known[choice % count] = dataclasses.replace(
            lengths, kinds=index.item_kind[kept], sizes=index.item_size[kept]
          )
        found[place, choice] = known[choice % count]
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Lengths:
  """Text tokens, those trained, whether a trained one comes first; the items."""

  tokens: int
  trained: int
  lone: bool
  kinds: np.ndarray
  sizes: np.ndarray


_NO_KINDS, _NO_SIZES = np.zeros(0, np.uint8), np.zeros((0, 3), np.int32)
_NOTHING = _Lengths(0, 0, False, _NO_KINDS, _NO_SIZES)


def _lengths(spans: Sequence[Span], tokenizer: Any) -> _Lengths:
  tokens = trained = 0
  lone, begun = False, False
  for span, ids in tokenised(Document(tuple(spans)), tokenizer):
    if ids is not None:
      lone |= not begun and span.trained
      tokens += len(ids)
      trained += len(ids) * span.trained
    begun |= ids is None or bool(ids)
  return _Lengths(tokens, trained, lone, _NO_KINDS, _NO_SIZES)


def _branches(document: Document, choice: int) -> set[int]:
  """The trunk and the branch that a choice takes."""
  branches = sorted({s.branch for s in document.spans} - {0})
  return {0, branches[choice % len(branches)]} if branches else {0}


def _random(count: int, seed: int, stream: int) -> np.ndarray:
  """i64[count] >= 0; number i is a function of (seed, stream, i)."""
  key = np.array([seed, stream], np.uint64)
  return np.random.Generator(np.random.Philox(key=key)).integers(2**62, size=count)


def build(
  dataset: Any,
  k: int,
  pool: Any = None,
  *,
  seed: int = 0,
  trained: bool = False,
  files: Sequence[str] = (),
) -> FewShot:
  """The dataset with k supports, random ones or, given embeddings, the nearest.

  Args:
    dataset: whose documents are asked.
    k: supports of each.
    pool: where they come from; the dataset itself by default.
    seed, trained: see `FewShot`.
    files: .npy files of embeddings f[count, D], a row per document: of the dataset and,
      where there is one, of the pool; none = supports at random.

  Raises:
    ValueError: too few to choose from, embeddings of one of the two alone, or that
      don't fit.
  """
  same = pool is None
  other = dataset if same else pool
  if not files:
    supports = random_supports(len(dataset), len(other), k, seed, same)
  elif len(files) != 2 - same:
    raise ValueError('nearest supports need embeddings of the dataset and of the pool')
  else:
    asked = embeddings(files[0], len(dataset))
    known = asked if same else embeddings(files[1], len(other))
    supports = nearest_supports(asked, known, k, same)
  return FewShot(dataset, supports, pool, trained=trained, seed=seed)
