"""Visual question answering: each question alone after its images, answered greedily.

From a test document of several turns, every trained text (an answer) becomes a
prompt of its own, so no gold answer of another turn is ever in sight:

  document   <image> question 1, answer 1, question 2, answer 2
  prompts    <image> question 1       and       <image> question 2

and each prompt is asked three times:

  own        with its own images
  shuffled   with the images of another document (never its own)
  blank      with mid-grey images of the same sizes

A model that answers from the words alone scores the same on all three (Goyal et
al., 1612.00837; "hypothesis-only" baselines, 1805.01042). Equal prompts are
answered once: all documents that ask one question of a grey image share it.
"""

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmjax import sharding
from mmjax.batch import BankBudget, Budget
from mmjax.data import example as examples
from mmjax.data import media, pack
from mmjax.data.document import BadDocument, Document, Image, Text, Video, kind_of
from mmjax.eval import metrics

_GREY = 128


@dataclasses.dataclass(frozen=True)
class Result:
  """What one evaluation found.

  metrics: 'vqa/accuracy', 'vqa/accuracy_shuffled', 'vqa/accuracy_blank',
    'vqa/gain' (with '_low', '_high'), 'vqa/accuracy/<type>', 'vqa/count',
    'vqa/seconds', and 'vqa/bad_documents' if there are any.
  predictions: a record per question, in the order of the data: index (of the
    document in the dataset), document (its id), turn, type, question, answer,
    prediction, prediction_shuffled, prediction_blank, shuffled_from (a document
    index, or None), correct.
  published: accuracies to compare with, by name.
  pictures: from a document index to its images u8[H, W, 3]; None for none.
  """

  metrics: dict[str, float]
  predictions: list[dict[str, Any]]
  published: Mapping[str, float] = dataclasses.field(default_factory=dict)
  pictures: Callable[[int], list[np.ndarray]] | None = None


@dataclasses.dataclass(frozen=True)
class Question:
  """One question of a document: the media before it, its text and its answer."""

  media: tuple
  text: str
  answer: str
  turn: int
  type: str


def questions(document: Document) -> list[Question]:
  """All questions of a document, one for each trained text.

  The question is the untrained text right before the answer; an answer without
  one (a caption) is asked with its media alone.
  """
  types = document.meta.get('types', ())
  if isinstance(types, str):
    types = types.split(',')
  found, seen = [], []
  for i, span in enumerate(document.spans):
    if not isinstance(span, Text):
      seen.append(span)
    elif span.trained:
      before = document.spans[i - 1] if i else None
      asked = isinstance(before, Text) and not before.trained
      turn = len(found)
      kind = types[turn] if turn < len(types) else ''
      text = before.text if asked else ''
      found.append(Question(tuple(seen), text, span.text.strip(), turn, kind))
  return found


def derange(groups: Sequence[Any], seed: int = 0) -> list[int | None]:
  """A partner for each entry: another one of the same group, each used once.

  One random cycle through each group, so nobody is their own partner; None for
  an entry that is alone in its group.
  """
  members = collections.defaultdict(list)
  for i, group in enumerate(groups):
    members[group].append(i)
  partner: list[int | None] = [None] * len(groups)
  for ids in members.values():
    if len(ids) > 1:
      cycle = np.random.default_rng(seed).permutation(ids).tolist()
      for i, j in zip(cycle, cycle[1:] + cycle[:1]):
        partner[i] = j
  return partner


def spread(count: int, limit: int | None) -> list[int]:
  """`limit` indices out of `count`, evenly apart; all of them for None."""
  if limit is None or limit >= count:
    return list(range(count))
  return [i * count // limit for i in range(limit)]


@dataclasses.dataclass(eq=False)
class Vqa:
  """Evaluates a model that generates answers.

  Fields:
    dataset: `[i] -> Document`, `len`, `.tokenizer`.
    model: has `slots(item)`; handed to `generate`.
    mesh, rules: where and how to place the batches.
    media_rules: how each kind of media becomes patches, as in training.
    rows: rows of a batch over all processes; must divide over the mesh.
    max_new: tokens generated at most.
    every: steps between evaluations in training; 0 = only at the end.
    limit: how many questions a scheduled evaluation asks; None = all.
    published: accuracies to compare with on the page, by name.
    generate: `(model, params, batch, *, max_new, end_id) -> i32[B, max_new]`.
  """

  dataset: Any
  model: Any
  mesh: Mesh
  rules: sharding.Rules
  media_rules: Mapping[str, Any]
  image_attention: str = 'block'
  rows: int = 128
  max_new: int = 8
  every: int = 0
  limit: int | None = None
  published: Mapping[str, float] = dataclasses.field(default_factory=dict)
  generate: Callable | None = None

  def __post_init__(self):
    processes = jax.process_count()
    if self.rows < 1 or self.rows % processes:
      raise ValueError(
        f'eval.vqa.rows = {self.rows} does not divide over {processes} processes'
      )
    for name in ('max_new', 'limit'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'eval.vqa.{name} = {value}; it must be positive')

  def run(self, params: Any, step: int = 0, *, full: bool = False) -> Result:
    """Answers the questions three times and counts.

    Args:
      params: the model's parameters, placed as in training.
      step: goes into nothing but errors.
      full: ask all questions, whatever `limit` says.

    Raises:
      ValueError: there is not one question; or the rows don't divide over the mesh.
    """
    start = time.perf_counter()
    asked, pool, bad = self._prepared
    if not asked:
      raise ValueError(
        f'evaluation at step {step}: no question in {len(self.dataset)} documents'
        f' (bad: {dict(bad) or "none"})'
      )
    chosen = [asked[i] for i in spread(len(asked), None if full else self.limit)]
    needed = sorted({p for _, prompts in chosen for p in prompts})
    texts = dict(zip(needed, self._answer(params, [pool[p] for p in needed])))
    records = []
    for record, prompts in chosen:
      own, shuffled, blank = (texts[p] for p in prompts)
      records.append(
        {
          **record,
          'prediction': own,
          'prediction_shuffled': shuffled,
          'prediction_blank': blank,
          'correct': metrics.exact(own, record['answer']),
        }
      )
    found = summarise(records)
    found['vqa/seconds'] = time.perf_counter() - start
    if bad:
      found['vqa/bad_documents'] = float(sum(bad.values()))
    return Result(found, records, dict(self.published), self.pictures)

  def pictures(self, index: int) -> list[np.ndarray]:
    """The images u8[H, W, 3] of a document, as stored."""
    spans = self.dataset[index].spans
    return [_decoded(s).content for s in spans if isinstance(s, Image)]

  @functools.cached_property
  def _prepared(self):
    """(questions as (record, three prompts)), the pool of prompts, bad documents)."""
    pool: dict[Any, int] = {}  # key of a prompt -> its place in `built`
    built: list[examples.Example] = []
    shared: dict[Any, dict] = {}  # media arrays, one copy per set of media

    def prompt(media_key, spans, text):
      key = (media_key, text)
      if key not in pool:
        built.append(self._example(spans, text))
        kept = shared.setdefault(media_key, built[-1].media)
        built[-1] = dataclasses.replace(built[-1], media=kept)
        pool[key] = len(built) - 1
      return pool[key]

    good, bad = [], collections.Counter()
    for index in range(len(self.dataset)):
      try:
        document = self.dataset[index]
        spans = tuple(_decoded(s) for s in document.spans)
        found = questions(dataclasses.replace(document, spans=spans))
        own = [prompt((index, len(q.media)), q.media, q.text) for q in found]
        good.append((index, document, own))
      except BadDocument as error:
        bad[error.reason] += 1

    asked = []
    kinds = [frozenset(map(type, _media(d.spans))) for _, d, _ in good]
    for (index, document, own), at, kind in zip(good, derange(kinds), kinds):
      other, donor = good[at][:2] if at is not None and kind else (None, None)
      spans = tuple(_decoded(s) for s in document.spans)
      donated = [_decoded(s) for s in _media(donor.spans)] if donor else None
      for q, first in zip(questions(dataclasses.replace(document, spans=spans)), own):
        grey = tuple(_blank(s) for s in q.media)
        blank = prompt(tuple(_size(s) for s in grey), grey, q.text)
        swapped = _swapped(q.media, donated) if donated else grey
        key = (index, len(q.media), 'shuffled')
        shuffled = prompt(key, swapped, q.text) if donated else blank
        record = dict(index=index, document=document.id or str(index), turn=q.turn)
        record.update(type=q.type, question=q.text.strip(), answer=q.answer)
        record['shuffled_from'] = other
        asked.append((record, (first, shuffled, blank)))
    return asked, built, bad

  def _example(self, spans, text) -> examples.Example:
    """A prompt: the example of an answer of no words, without its end token."""
    answered = examples.to_example(
      Document((*spans, Text(text, trained=False), Text('', trained=True))),
      tokenizer=self.dataset.tokenizer,
      rules=self.media_rules,
      slots=self.model.slots,
      image_attention=self.image_attention,
    )
    arrays = {f.name: getattr(answered, f.name) for f in dataclasses.fields(answered)}
    cut = {k: v[:-1] for k, v in arrays.items() if k != 'media'}
    return examples.Example(**cut, media=answered.media)

  @functools.cached_property
  def _budget(self) -> Budget:
    """The one shape of all batches: fits the longest prompt of the whole set."""
    pool = self._prepared[1]
    longest = max(len(e.tokens) for e in pool)
    bank = {}
    for kind, first in {k: m for e in pool for k, m in e.media.items()}.items():
      of_kind = [e.media[kind] for e in pool if kind in e.media]
      bank[kind] = BankBudget(
        patches=max(len(m.values) for m in of_kind),
        items=max(len(m.item_order) for m in of_kind),
        channels=first.values.shape[1],
        dtype=str(first.values.dtype),
      )
    return Budget(stream=math.ceil(longest / 8) * 8, targets=1, bank=bank)

  @functools.cached_property
  def _step(self):
    generate = self.generate
    if generate is None:
      from mmjax.generate import generate
    end_id = self.dataset.tokenizer.end_id

    def answer(params, batch):
      return generate(self.model, params, batch, max_new=self.max_new, end_id=end_id)

    # Whole on every device, so that every process can read all answers.
    return jax.jit(answer, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

  def _answer(self, params, prompts: Sequence[examples.Example]) -> list[str]:
    """The answers to any number of prompts; the last batch ends in empty rows."""
    local = self.rows // jax.process_count()
    first = jax.process_index() * local
    running, tokens = collections.deque(), []
    with sharding.use(self.mesh, self.rules):
      for start in range(0, len(prompts), self.rows):
        rows = [[e] for e in prompts[start : start + self.rows]]
        rows += [[]] * (self.rows - len(rows))
        batch = pack.pack(rows[first : first + local], self._budget)
        batch = sharding.place_batch(batch, self.rows, self.mesh, self.rules)
        running.append(self._step(params, batch))
        if len(running) > 2:  # pack the next while this one runs, but hold few
          tokens.append(np.asarray(running.popleft()))
    tokens = np.concatenate([*tokens, *map(np.asarray, running)])
    decode = functools.cache(self._decode)
    return [decode(tuple(row)) for row in tokens[: len(prompts)].tolist()]

  def _decode(self, tokens: tuple[int, ...]) -> str:
    end_id = self.dataset.tokenizer.end_id
    if end_id in tokens:
      tokens = tokens[: tokens.index(end_id)]
    return self.dataset.tokenizer.decode(list(tokens)).strip()


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """The metrics of some records; see `Result.metrics`."""
  right = {
    name: [metrics.exact(r[f'prediction{name}'], r['answer']) for r in records]
    for name in ('', '_shuffled', '_blank')
  }
  found = {f'vqa/accuracy{name}': metrics.accuracy(hits) for name, hits in right.items()}
  documents = [str(r['index']) for r in records]
  gain, low, high = metrics.paired_gain(right[''], right['_shuffled'], documents)
  found.update({'vqa/gain': gain, 'vqa/gain_low': low, 'vqa/gain_high': high})
  by_type = metrics.accuracy_by([r['type'] for r in records], right[''])
  found.update({f'vqa/accuracy/{t}': a for t, (_, a) in by_type.items() if t})
  found['vqa/count'] = float(len(records))
  return found


def _media(spans):
  return [s for s in spans if not isinstance(s, Text)]


def _decoded(span):
  return Image(media.pixels(span)) if isinstance(span, Image) else span


def _swapped(own: Sequence, donated: Sequence) -> tuple:
  """The donated media in place of the own ones, kind by kind, around again if short."""
  used, out = collections.Counter(), []
  for span in own:
    same = [s for s in donated if type(s) is type(span)]
    out.append(same[used[type(span)] % len(same)])
    used[type(span)] += 1
  return tuple(out)


def _blank(span):
  if isinstance(span, Image):
    return Image(np.full_like(span.content, _GREY))
  if isinstance(span, Video):
    return dataclasses.replace(span, frames=np.full_like(span.frames, _GREY))
  return dataclasses.replace(span, wave=np.zeros_like(span.wave))  # silence


def _size(span) -> tuple:
  return (kind_of(span), *media.native_size(span))
