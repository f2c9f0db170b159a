"""What its images gain a text: the loss of each token with the right and other images.

  right      ... <this page's figure> the radius of the blur     loss of every token
  shuffled   ... <another page's one> the radius of the blur     the same tokens again
  blank      ... <plain grey>         the radius of the blur

Tokens, tags and sizes of the items are the same three times, only pixels differ. The
gain of a token is its loss with the shuffled images minus that with the right ones:
above 0, it was the picture that told. A model that doesn't look has exactly 0. Tokens
before the first image can't gain and are left out; the interval is over pages, as the
pieces of one page are not independent.
"""

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmjax import sharding
from mmjax.batch import FOREVER, Budget, PackedBatch, QueryTags, visible
from mmjax.data import example, media, pack
from mmjax.data.document import BadDocument, Document, Image
from mmjax.data.plan import Lengths, PackPlan
from mmjax.eval import metrics, prompts
from mmjax.ops.losses import previous_slots, token_losses

_GREY = 128
CONDITIONS = ('', '_shuffled', '_blank')
_SUMS = ('loss', 'loss_shuffled', 'loss_blank')


class Tokens(NamedTuple):
  """The trained tokens of one document, n of them.

  places: i32[n] its slot in the document; seen: bool[n] may see an image;
  losses: f32[3, n] with the right, the shuffled and the blank images.
  """

  places: np.ndarray
  seen: np.ndarray
  losses: np.ndarray


@dataclasses.dataclass(frozen=True)
class GainResult:
  """What one evaluation found.

  metrics: by token that may see an image 'gain/loss', 'gain/loss_shuffled',
    'gain/loss_blank', 'gain/perplexity', and 'gain/shuffled_minus_right' and
    'gain/blank_minus_right' (each with '_low', '_high'); by trained token
    'gain/loss_all', 'gain/perplexity_all'; 'gain/tokens', 'gain/tokens_all',
    'gain/documents', 'gain/seconds', and 'gain/left_out' if any are (too long for
    the budget, or unreadable).
  predictions: a record per document: index (in the dataset), document (its id),
    shuffled_from (a document index), tokens (that may see an image) and the sums of
    their losses: loss, loss_shuffled, loss_blank; tokens_all, loss_all.
  tokens: by document index.
  show: from a document index to its `example.Example`; pictures: to its images.
  decode: from ids to text.
  """

  metrics: dict[str, float]
  predictions: list[dict[str, Any]]
  tokens: dict[int, Tokens]
  show: Callable[[int], example.Example]
  pictures: Callable[[int], list[np.ndarray]]
  decode: Callable[[list[int]], str]

  def verdict(self) -> tuple[bool, str]:
    """(do the images help?, the verdict in plain words)."""
    gain, low, high = (
      self.metrics[f'gain/shuffled_minus_right{end}'] for end in ('', '_low', '_high')
    )
    much = f'{gain:+.4f} nats per token over shuffled images'
    interval = f'95\u00a0% interval {low:+.4f} to {high:+.4f}'
    if low > 0:
      return True, f'Its images help: {much} ({interval}).'
    if high < 0:
      return False, f'Worse with its own images: {much} ({interval}).'
    return False, f'No sign that its images help: {much} ({interval}).'

  def table(self, name: str) -> str:
    """A few lines to print."""
    found = self.metrics
    head = (name, 'documents', 'tokens', 'right', 'shuffled', 'blank')
    losses = (f'{found[f"gain/loss{c}"]:.4f}' for c in CONDITIONS)
    row = ('loss', f'{found["gain/documents"]:,.0f}', f'{found["gain/tokens"]:,.0f}')
    lines = [f'{r[0]:6}' + ''.join(f'{c:>11}' for c in r[1:]) for r in
             (head, (*row, *losses))]  # fmt: skip
    lines.append(f'perplexity {found["gain/perplexity"]:.3f}')
    lines.append(self.verdict()[1].replace('\u00a0', ' '))
    return '\n'.join(lines)

  def same_as(self, before: Sequence[Mapping[str, Any]]) -> str:
    """In words: do the losses repeat those of earlier `predictions`?"""
    old = {r['index']: r for r in before}
    both = [(r, old[r['index']]) for r in self.predictions if r['index'] in old]
    # With another limit, other images stand in for a document's own.
    both = [(r, o) for r, o in both if r['shuffled_from'] == o['shuffled_from']]
    differ = sum(any(r[k] != o[k] for k in _SUMS) for r, o in both)
    what = f'{differ:,} of them differ' if differ else 'identical losses'
    return f'{len(both):,} documents in common, {what}'

  def page(self, step: int, name: str) -> str:
    """The page to look at, as a string of HTML."""
    from mmjax.eval import gain_page

    return gain_page.page(step, name, self)


@dataclasses.dataclass(eq=False)
class Gain:
  """Evaluates what a model's loss gains from the images of interleaved documents.

  Fields:
    dataset: `[i] -> Document`, `len`, `.index`, `.tokenizer`.
    model: `apply(variables, batch)` gives hidden states, its method 'logits' logits;
      has `slots(item)`.
    mesh, rules: where and how to place the batches.
    media_rules: how each kind of media becomes patches, as in training.
    budget: shape of a row, as in training; a document that needs more is left out.
    rows: rows of a batch over all processes; must divide over the mesh.
    every: steps between evaluations in training; 0 = only at the end.
    limit: how many documents a scheduled evaluation reads; None = all.
  """

  dataset: Any
  model: Any
  mesh: Mesh
  rules: sharding.Rules
  media_rules: Mapping[str, Any]
  budget: Budget
  image_attention: str = 'block'
  prompt_attention: str = 'causal'
  image_positions: str = 'grid'
  rows: int = 8
  every: int = 0
  limit: int | None = None

  def __post_init__(self):
    for name in ('rows', 'limit'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'eval.gain.{name} = {value}; it must be positive')
    if 'image' not in self.media_rules:
      raise ValueError('eval.gain needs images: config.data.budget has none')

  def run(self, params: Any, step: int = 0, *, full: bool = False) -> GainResult:
    """Computes all losses three times.

    Args:
      params: the model's parameters, placed as in training.
      step: goes into nothing but errors.
      full: read all documents, whatever `limit` says.

    Raises:
      ValueError: no document fits the budget, none has a token that may see an image,
        or all are of one page; or the rows don't divide over the mesh.
    """
    start = time.perf_counter()
    chosen = prompts.spread(len(self.dataset), None if full else self.limit)
    names = [self._name(i) for i in chosen]
    counts = np.diff(self.dataset.index.item_offsets)[chosen]
    partners = donors([_page_of(n) for n in names], counts > 0)
    donor = {i: None if at is None else chosen[at] for i, at in zip(chosen, partners)}
    tokens, dropped = self._losses(params, self._plan(chosen), chosen, donor)
    records = [
      _record(i, name, donor[i], tokens[i])
      for i, name in zip(chosen, names)
      if i in tokens
    ]
    if not sum(r['tokens'] for r in records):
      raise ValueError(
        f'evaluation at step {step}: no token of {len(records)} documents may see an'
        ' image'
      )
    found = summarise(records)
    found['gain/seconds'] = time.perf_counter() - start
    if dropped:
      found['gain/left_out'] = float(dropped)
    decode = self.dataset.tokenizer.decode
    return GainResult(found, records, tokens, self._example, self.pictures, decode)

  def pictures(self, index: int) -> list[np.ndarray]:
    """The images u8[H, W, 3] of a document, as stored."""
    spans = self.dataset[index].spans
    return [media.pixels(s) for s in spans if isinstance(s, Image)]

  def _name(self, index: int) -> str:
    try:
      return self.dataset[index].id or str(index)
    except BadDocument:
      return str(index)

  def _plan(self, chosen: Sequence[int]) -> PackPlan:
    """Rows of places in `chosen`."""
    whole = Lengths.of(self.dataset.index, self.media_rules, self.model.slots)
    refused = {
      reason: np.flatnonzero(np.isin(chosen, documents))
      for reason, documents in whole.refused.items()
    }
    needs = whole.needs[np.asarray(chosen)]
    return PackPlan(Lengths(whole.names, needs, refused), self.budget)

  def _losses(self, params, plan, chosen, donor) -> tuple[dict[int, Tokens], int]:
    """The tokens of each document that could be used, and how many couldn't."""
    index, blocks = sharding.row_block(self.rows, self.mesh, self.rules)
    local = self.rows // blocks
    found: dict[int, Tokens] = {}
    running: collections.deque = collections.deque()

    def read():
      rows, (first, *others) = running.popleft()
      where = {k: np.asarray(v) for k, v in first.items()}
      losses = np.stack([where['losses'], *(np.asarray(o['losses']) for o in others)])
      for r, row in enumerate(rows):
        for segment, i in enumerate(row, 1):
          at = where['used'][r] & (where['segments'][r] == segment)
          if at.any():
            seen = where['seen'][r][at]
            found[i] = Tokens(where['places'][r][at], seen, losses[:, r, at])

    with sharding.use(self.mesh, self.rules):
      for start in range(0, plan.num_rows, self.rows):
        rows = range(start, min(start + self.rows, plan.num_rows))
        rows = [[chosen[place] for place in plan.row(r)] for r in rows]
        rows += [[]] * (self.rows - len(rows))
        mine = rows[index * local : (index + 1) * local]
        loaded = [[self._three(i, donor[i]) for i in row] for row in mine]
        outputs = []
        for condition in range(3):
          packed = [[three[condition] for three in row] for row in loaded]
          batch = pack.pack(packed, self.budget)
          batch = sharding.place_batch(batch, self.rows, self.mesh, self.rules)
          outputs.append(self._step(params, batch))
        running.append((rows, outputs))
        if len(running) > 1:  # load the next while these run
          read()
      while running:
        read()
    return found, len(chosen) - len(found)

  @functools.cached_property
  def _step(self):
    def losses(params, batch: PackedBatch) -> dict[str, jax.Array]:
      variables = {'params': params}
      hidden = self.model.apply(variables, batch)
      head = self.model.apply(variables, method='head')
      found = token_losses(hidden, head, batch.stream, self.budget.targets)
      s = batch.stream
      begins = jnp.diff(s.segment_ids, axis=1, prepend=0) != 0
      slot = jnp.broadcast_to(jnp.arange(begins.shape[1]), begins.shape)
      begin = jax.lax.cummax(jnp.where(begins, slot, 0), axis=1)
      return {
        'losses': found.losses,
        'used': found.used,
        'segments': jnp.take_along_axis(s.segment_ids, found.slots, 1),
        'places': found.slots - jnp.take_along_axis(begin, found.slots, 1),
        'seen': found.used & sees_media(s, found.slots),
      }

    # Whole on every device, so that every process can read all of them.
    return jax.jit(losses, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

  def _example(self, index: int) -> example.Example:
    return self._to_example(self.dataset[index])

  def _to_example(self, document: Document) -> example.Example:
    return example.to_example(
      document,
      tokenizer=self.dataset.tokenizer,
      rules=self.media_rules,
      slots=self.model.slots,
      image_attention=self.image_attention,
      prompt_attention=self.prompt_attention,
      image_positions=self.image_positions,
    )

  def _three(self, index: int, donor: int | None) -> tuple[example.Example, ...]:
    """A document with the right, the donor's and blank images."""
    rule = self.media_rules['image']
    try:
      document = self.dataset[index]
      spans = tuple(
        dataclasses.replace(s, content=media.pixels(s, rule.max_pixels))
        if isinstance(s, Image)
        else s
        for s in document.spans
      )
      right = self._to_example(dataclasses.replace(document, spans=spans))
      own = [s.content for s in spans if isinstance(s, Image)]
      if not own:
        return right, right, right
      others = self.pictures(donor)
      other = [
        rule.patches(others[k % len(others)], rule.grid(*image.shape[:2]))
        for k, image in enumerate(own)
      ]
      return (
        right,
        _with_values(right, np.concatenate(other)),
        _with_values(right, np.full_like(right.media['image'].values, _GREY)),
      )
    except BadDocument:
      # It keeps its place in the row, which other processes count on.
      return (_nothing(),) * 3


def _with_values(one: example.Example, values: np.ndarray) -> example.Example:
  image = dataclasses.replace(one.media['image'], values=values)
  return dataclasses.replace(one, media={**one.media, 'image': image})


def _nothing() -> example.Example:
  """An example of one slot that is not trained."""
  zero = np.zeros(1, np.int32)
  return example.Example(
    tokens=zero,
    order=zero,
    first=zero,
    last=zero,
    until=np.full(1, FOREVER, np.int32),
    positions=np.zeros((1, 3), np.int32),
    weights=np.zeros(1, np.float32),
    source=zero - 1,
    media={},
  )


def sees_media(stream: Any, slots: jax.Array) -> jax.Array:
  """bool[B, K]: whether what predicts the tokens at `slots` i32[B, K] may see media."""
  before = jnp.maximum(jnp.take_along_axis(previous_slots(stream), slots, 1), 0)
  tags = stream.query_tags
  names = ('segment_ids', 'first', 'last', 'order')
  tags = {n: jnp.take_along_axis(getattr(tags, n), before, 1) for n in names}
  seen = visible(QueryTags(**tags), stream.key_tags)
  return jnp.any(seen & (stream.tokens < 0)[:, None], -1)


def donors(pages: Sequence[str], has: Sequence[bool], seed: int = 0) -> list[int | None]:
  """For each document with images, another one with images, of another page.

  All are laid out in a random circle, and each takes the next one that fits.

  Args:
    pages: the page of each document.
    has: whether it has images; the others get None.

  Raises:
    ValueError: all documents with images are of one page.
  """
  circle = np.random.default_rng(seed).permutation(np.flatnonzero(has)).tolist()
  if len({pages[i] for i in circle}) == 1:
    raise ValueError(
      f'eval.gain: all images are of one page, {pages[circle[0]]!r}; there is nothing to'
      ' shuffle them with'
    )
  found: list[int | None] = [None] * len(pages)
  for at, i in enumerate(circle):
    after = (circle[(at + step) % len(circle)] for step in range(1, len(circle)))
    found[i] = next(j for j in after if pages[j] != pages[i])
  return found


def _page_of(name: str) -> str:
  return name.partition('#')[0]


def _record(index: int, name: str, donor: int | None, tokens: Tokens) -> dict[str, Any]:
  sums = tokens.losses[:, tokens.seen].sum(1, dtype=np.float64).tolist()
  return {
    'index': index,
    'document': name,
    'shuffled_from': donor,
    'tokens': int(tokens.seen.sum()),
    **dict(zip(_SUMS, sums)),
    'tokens_all': len(tokens.seen),
    'loss_all': float(tokens.losses[0].sum(dtype=np.float64)),
  }


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """The metrics of some records; see `GainResult.metrics`."""

  def column(name):
    return np.array([r[name] for r in records], np.float64)

  pages = [_page_of(r['document']) for r in records]
  tokens, right = column('tokens'), column('loss')
  found = {f'gain/{k}': float(column(k).sum() / tokens.sum()) for k in _SUMS}
  for name in ('shuffled', 'blank'):
    bounds = metrics.bootstrap_ratio(column(f'loss_{name}') - right, tokens, pages)
    key = f'gain/{name}_minus_right'
    found.update(zip((key, f'{key}_low', f'{key}_high'), bounds))
  everything = column('tokens_all').sum()
  found['gain/loss_all'] = float(column('loss_all').sum() / everything)
  for end in ('', '_all'):
    found[f'gain/perplexity{end}'] = math.exp(found[f'gain/loss{end}'])
  found['gain/tokens'] = float(tokens.sum())
  found['gain/tokens_all'] = float(everything)
  found['gain/documents'] = float(len(records))
  return found
