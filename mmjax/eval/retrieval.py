"""Retrieval: the text of an image among all texts, and the image of a text.

  pair 1  image --.   .-- text      R@k: the share of queries whose partner is among
  pair 2  image ---- x ---- text    the k most similar of ALL pairs of the split
  pair 3  image --'   '-- text      (Karpathy & Fei-Fei, 1412.2306)

Beside it stands chance, k / pairs. A pair is a document's first image and its text; with
`languages`, also its names in those from its meta.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.data.document import Text
from mmjax.eval import prompts
from mmjax.eval.embed import EmbeddingEvaluator
from mmjax.eval.ranking import Ranking, ranks, words
from mmjax.names import closest

TASKS = ('image to text', 'text to image')


@dataclasses.dataclass(eq=False)
class Retrieval(EmbeddingEvaluator):
  """Evaluates a model that embeds images and texts.

  Fields, beside those of all (`EmbeddingEvaluator`):
    at: the k of R@k.
    languages: names of languages, or 'all'; the text is meta['name/<language>'].
  """

  at: Sequence[int] = (1, 5, 10)
  languages: Sequence[str] | str = ()

  NAME = 'retrieval'

  def __post_init__(self):
    super().__post_init__()
    if not self.at or min(self.at) < 1:
      raise ValueError(f'eval.retrieval.at = {self.at}; ranks count from 1')

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
    pairs, bad = self.prepared
    if not pairs:
      raise ValueError(
        f'evaluation at step {step}: no pair in {len(self.dataset)} documents'
        f' (bad: {dict(bad) or "none"})'
      )
    chosen = [pairs[i] for i in prompts.spread(len(pairs), None if full else self.limit)]
    images = self.embedder.images(params, [p.image for p in chosen])
    found, table = {}, [('', 'pairs', *(f'R@{k}' for k in self.at), 'median rank')]
    predictions = []
    for language in ('', *self._languages):
      have = [i for i, p in enumerate(chosen) if language in p.texts]
      if not have:
        continue
      texts = self.embedder.texts(params, [chosen[i].texts[language] for i in have])
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
        'correct': bool(r.rank[i] == 1),
        'top': [[None if to_text else p.index, p.text] for p in top],
      })  # fmt: skip
    return records

  @property
  def _languages(self) -> list[str]:
    pairs, _ = self.prepared
    have = sorted({language for p in pairs for language in p.texts} - {''})
    if self.languages == 'all':
      return have
    for language in self.languages:
      if language not in have:
        raise ValueError(
          f'eval.retrieval.languages: {language!r}{closest(language, have)}'
        )
    return list(self.languages)

  def prepare(self, index: int) -> '_Pair':
    document, embedder = self.dataset[index], self.embedder
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
