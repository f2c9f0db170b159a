"""Visual question answering: each question alone, greedily, and twice more blind.

  own        with its own images
  shuffled   with the images of another document
  blank      with mid-grey images of the same sizes

The answer is right if it is the reference, character by character. A model that
answers from the words alone scores the same on all three (Goyal et al.,
1612.00837; Thomason et al., 1811.00613). With `shots`, each question stands behind so
many answered ones of another split, the same ones in all three.
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
from mmjax.data import example, fewshot, media, pack
from mmjax.data.document import Image
from mmjax.eval import metrics, prompts


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
  prompt_attention: str = 'causal'
  image_positions: str = 'grid'
  rows: int = 128
  max_new: int = 8
  every: int = 0
  limit: int | None = None
  published: Mapping[str, float] = dataclasses.field(default_factory=dict)
  shots: int = 0
  shots_embeddings: Sequence[str] | None = None
  pool: Any = None
  generate: Callable | None = None

  def __post_init__(self):
    for name in ('rows', 'max_new', 'limit'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'eval.vqa.{name} = {value}; it must be positive')
    if self.shots < 0:
      raise ValueError(f'eval.vqa.shots = {self.shots}; it must not be negative')

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
    limit = None if full else self.limit
    chosen = [asked[i] for i in prompts.spread(len(asked), limit)]
    needed = sorted({place for q in chosen for place in (q.own, q.shuffled, q.blank)})
    said = dict(zip(needed, self._answer(params, [pool[place] for place in needed])))
    records = [
      {
        **q.record,
        'prediction': said[q.own],
        'prediction_shuffled': said[q.shuffled],
        'prediction_blank': said[q.blank],
        'correct': metrics.exact(said[q.own], q.record['answer']),
      }
      for q in chosen
    ]
    found = summarise(records)
    found['vqa/seconds'] = time.perf_counter() - start
    if bad:
      found['vqa/bad_documents'] = float(sum(bad.values()))
    return Result(found, records, dict(self.published), self.pictures)

  def pictures(self, index: int) -> list[np.ndarray]:
    """The images u8[H, W, 3] of a document, as stored."""
    spans = self.dataset[index].spans
    return [media.pixels(s) for s in spans if isinstance(s, Image)]

  @functools.cached_property
  def _prepared(self):
    """(questions, pool of prompts, bad documents by reason), made once."""
    to_example = functools.partial(
      example.to_example,
      tokenizer=self.dataset.tokenizer,
      rules=self.media_rules,
      slots=self.model.slots,
      image_attention=self.image_attention,
      prompt_attention=self.prompt_attention,
      image_positions=self.image_positions,
    )
    before = None
    if self.shots:
      files = self.shots_embeddings or ()
      before = fewshot.build(self.dataset, self.shots, self.pool, files=files).before
    end = self.dataset.tokenizer.end_name
    return prompts.collect(self.dataset, to_example, before, end)

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

  def _answer(self, params, asked: Sequence[example.Example]) -> list[str]:
    """The answers to any number of prompts; the last batch ends in empty rows."""
    index, blocks = sharding.row_block(self.rows, self.mesh, self.rules)
    local = self.rows // blocks
    first = index * local
    running, tokens = collections.deque(), []
    with sharding.use(self.mesh, self.rules):
      for start in range(0, len(asked), self.rows):
        rows = [[e] for e in asked[start : start + self.rows]]
        rows += [[]] * (self.rows - len(rows))
        batch = pack.pack(rows[first : first + local], self._budget)
        batch = sharding.place_batch(batch, self.rows, self.mesh, self.rules)
        running.append(self._step(params, batch))
        if len(running) > 2:  # pack the next while this one runs, but hold few
          tokens.append(np.asarray(running.popleft()))
    tokens = np.concatenate([*tokens, *map(np.asarray, running)])
    decode = functools.cache(self._decode)
    return [decode(tuple(row)) for row in tokens[: len(asked)].tolist()]

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
