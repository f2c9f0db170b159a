"""Retrieval: the text of an image among all texts, and the image of a text.

  pair 1  image --.   .-- text      R@k: the share of queries whose partner is among
  pair 2  image ---- x ---- text    the k most similar of ALL pairs of the split
  pair 3  image --'   '-- text      (Karpathy & Fei-Fei, 1412.2306)

Beside it stands chance, k / pairs. A pair is a document's first image and its text; with
`languages`, also its names in those from its meta.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mmjax import sharding
from mmjax.data import media
from mmjax.data.document import BadDocument, Image, Text
from mmjax.eval import prompts
from mmjax.eval.embed import Embedder
from mmjax.eval.ranking import Ranking, ranks, words
from mmjax.names import closest

TASKS = ('image to text', 'text to image')


@dataclasses.dataclass(eq=False)
class Retrieval:
  """Evaluates a model that embeds images and texts.

  Fields:
    dataset: `[i] -> Document`, `len`, `.tokenizer`.
    model, mesh, rules, media_rules: as in training.
    rows: rows of a batch over all processes; must divide over the mesh.
    every: steps between evaluations in training; 0 = only at the end.
    limit: how many pairs a scheduled evaluation takes; None = all.
    at: the k of R@k.
    languages: names of languages, or 'all'; the text is meta['name/<language>'].
  """

  dataset: Any
  model: Any
  mesh: Mesh
  rules: sharding.Rules
  media_rules: Mapping[str, Any]
  image_attention: str = 'block'
  rows: int = 128
  every: int = 0
  limit: int | None = None
  at: Sequence[int] = (1, 5, 10)
  languages: Sequence[str] | str = ()

  def __post_init__(self):
    for name in ('rows', 'limit'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'eval.retrieval.{name} = {value}; it must be positive')
    if not self.at or min(self.at) < 1:
      raise ValueError(f'eval.retrieval.at = {self.at}; ranks count from 1')
    self._embedder = Embedder(
      self.model, self.mesh, self.rules, self.media_rules, self.dataset.tokenizer,
      self.rows,
    )  # fmt: skip

  def run(self, params: Any, step: int = 0, *, full: bool = False) -> Ranking:
    """Ranks all pairs both ways.

    Args:
      params: the model's parameters, placed as in training.
      step: goes into nothing but errors.
      full: take all pairs, whatever `limit` says.

    Raises:
      ValueError: there is not one pair, or a language that no document has; or the
        rows don't divide over the mesh.
    """
    start = time.perf_counter()
    pairs, bad = self._prepared
    if not pairs:
      raise ValueError(
        f'evaluation at step {step}: no pair in {len(self.dataset)} documents'
        f' (bad: {dict(bad) or "none"})'
      )
    chosen = [pairs[i] for i in prompts.spread(len(pairs), None if full else self.limit)]
    images = self._embedder.images(params, [p.image for p in chosen])
    found, table = {}, [('', 'pairs', *(f'R@{k}' for k in self.at), 'median rank')]
    predictions = []
    for language in ('', *self._languages):
      have = [i for i, p in enumerate(chosen) if language in p.texts]
      if not have:
        continue
      texts = self._embedder.texts(params, [chosen[i].texts[language] for i in have])
      both = images[have], texts
      for task, (queries, candidates) in zip(TASKS, (both, both[::-1])):
        r = ranks(queries, candidates, np.arange(len(have)))
        key = '/'.join(filter(None, ('retrieval', language, task.replace(' ', '_'))))
        found |= {f'{key}/r{k}': r.recall(k) for k in self.at}
        found[f'{key}/median_rank'] = float(np.median(r.rank))
        shares = [words(r.recall(k)) for k in self.at]
        name = f'{language}: {task}' if language else task
        table.append((name, f'{len(have):,}', *shares, f'{np.median(r.rank):,.1f}'))
        if not language:
          predictions += self._records(task, r, chosen)
    n = len(chosen)
    chances = {k: min(1.0, k / n) for k in self.at}
    found |= {f'retrieval/chance/r{k}': c for k, c in chances.items()}
    table.append(
      ('chance', f'{n:,}', *map(words, chances.values()), f'{(n + 1) / 2:,.1f}')
    )
    found |= {'retrieval/count': float(n)}
    found['retrieval/seconds'] = time.perf_counter() - start
    if bad:
      found['retrieval/bad_documents'] = float(sum(bad.values()))
    return Ranking(found, predictions, self._headline(found), table, self.pictures)

  def pictures(self, index: int) -> list[np.ndarray]:
    """The first image u8[H, W, 3] of a document, as stored."""
    spans = self.dataset[index].spans
    return [media.pixels(s) for s in spans if isinstance(s, Image)][:1]

  def _headline(self, found) -> str:
    k = self.at[0]
    shares = [found[f'retrieval/{t.replace(" ", "_")}/r{k}'] for t in TASKS]
    return (
      f'Of {found["retrieval/count"]:,.0f} pairs R@{k} is {words(shares[0])} from image'
      f' to text, {words(shares[1])} from text to image; chance is'
      f' {words(found[f"retrieval/chance/r{k}"])}.'
    )

  def _records(self, task, r, chosen) -> list[dict[str, Any]]:
    to_text = task == TASKS[0]
    records = []
    for i, pair in enumerate(chosen):
      top = [chosen[j] for j in r.top[i].tolist()]
      records.append({
        'index': pair.index,
        'document': pair.name,
        'task': task,
        'query': None if to_text else pair.text,
        'right': pair.text,
        'rank': float(r.rank[i]),
        'correct': r.rank[i] == 1,
        'top': [[None if to_text else p.index, p.text] for p in top],
      })  # fmt: skip
    for record in records:
      record['correct'] = bool(record['correct'])
    return records

  @property
  def _languages(self) -> list[str]:
    pairs, _ = self._prepared
    have = sorted({language for p in pairs for language in p.texts} - {''})
    if self.languages == 'all':
      return have
    for language in self.languages:
      if language not in have:
        raise ValueError(
          f'eval.retrieval.languages: {language!r}{closest(language, have)}'
        )
    return list(self.languages)

  @functools.cached_property
  def _prepared(self) -> tuple[list['_Pair'], collections.Counter]:
    """The pairs, and bad documents by reason; made once."""
    pairs, bad = [], collections.Counter()
    for index in range(len(self.dataset)):
      try:
        pairs.append(self._pair(index))
      except BadDocument as error:
        bad[error.reason] += 1
    return pairs, bad

  def _pair(self, index: int) -> '_Pair':
    document, embedder = self.dataset[index], self._embedder
    texts = [span.text for span in document.spans if isinstance(span, Text)]
    examples = {'': embedder.text_example(*texts)}
    if self.languages:
      for key, text in document.meta.items():
        if key.startswith('name/') and isinstance(text, str) and text:
          examples[key.removeprefix('name/')] = embedder.text_example(text)
    image = embedder.image_example(document)
    return _Pair(index, document.id, ' '.join(texts), image, examples)


@dataclasses.dataclass(frozen=True, eq=False)
class _Pair:
  """index and name of the document, its text, and examples: image, text by language."""

  index: int
  name: str
  text: str
  image: Any
  texts: dict[str, Any]
