"""Zero-shot classification: the class whose words are nearest to the image.

  'a drawing of {}'   'an emoji: {}'  x  class --text tower--> mean, normalised
                                                  ^ compared with each image

An ensemble of prompts (CLIP, 2103.00020, section 3.1.4): the embeddings of a class in
all templates, each of length 1, are averaged. An image's class is its document's
meta['label'].
"""

import collections
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.data.document import BadDocument
from mmjax.data.example import Example
from mmjax.eval import prompts
from mmjax.eval.embed import EmbeddingEvaluator
from mmjax.eval.ranking import Ranking, ranks, words


@dataclasses.dataclass(eq=False)
class ZeroShot(EmbeddingEvaluator):
  """Evaluates a model that embeds images and texts.

  Fields, beside those of all (`EmbeddingEvaluator`):
    templates: texts with '{}' where the class stands.
    label: which meta holds the class.
    classes: from a label to its words; None = the labels are the words.
  """

  templates: Sequence[str] = ('{}',)
  label: str = 'label'
  classes: Mapping[str, str] | None = None

  NAME = 'zeroshot'

  def __post_init__(self):
    super().__post_init__()
    for template in self.templates:
      if template.count('{}') != 1:
        raise ValueError(f"eval.zeroshot.templates: {template!r} needs one '{{}}'")
    if not self.templates:
      raise ValueError('eval.zeroshot.templates is empty')

  def run(self, params: Any, step: int = 0, *, full: bool = False) -> Ranking:
    """Classifies the images.

    Args:
      params: the model's parameters, placed as in training.
      step: goes into nothing but errors.
      full: take all images, whatever `limit` says.

    Raises:
      ValueError: there is not one image with a label; or the rows don't divide over
        the mesh.
    """
    start = time.perf_counter()
    images, bad = self.prepared
    if not images:
      raise ValueError(
        f'evaluation at step {step}: no image with meta {self.label!r} in'
        f' {len(self.dataset)} documents (bad: {dict(bad) or "none"})'
      )
    labels = sorted({label for *_, label in images})
    right = {label: i for i, label in enumerate(labels)}
    chosen = [
      images[i] for i in prompts.spread(len(images), None if full else self.limit)
    ]
    where = np.array([right[label] for *_, label in chosen])
    embedded = self.embedder.images(params, [example for _, _, example, _ in chosen])
    r = ranks(embedded, self.class_embeddings(params, labels), where)
    counts = collections.Counter(where.tolist())
    by_class = [float(np.mean(r.rank[where == c] == 1)) for c in sorted(counts)]
    share, k = max(counts.values()) / len(chosen), min(5, len(labels))
    found = {
      'zeroshot/accuracy': r.recall(1),
      f'zeroshot/top{k}': r.recall(k),
      'zeroshot/mean_class_accuracy': float(np.mean(by_class)),
      'zeroshot/chance': r.chance(1),
      'zeroshot/majority': share,
      'zeroshot/classes': float(len(labels)),
      'zeroshot/count': float(len(chosen)),
      'zeroshot/seconds': time.perf_counter() - start,
    }
    if bad:
      found['zeroshot/bad_documents'] = float(sum(bad.values()))
    records = [
      {
        'index': index,
        'document': name,
        'task': 'classify',
        'query': None,
        'right': self._words(label),
        'rank': float(r.rank[i]),
        'correct': bool(r.rank[i] == 1),
        'top': [[None, self._words(labels[j])] for j in r.top[i].tolist()],
      }
      for i, (index, name, _, label) in enumerate(chosen)
    ]
    table = [('', 'images', 'accuracy', f'top {k}', 'mean over classes')]
    shares = map(words, (r.recall(1), r.recall(k), float(np.mean(by_class))))
    table.append(('zero-shot', f'{len(chosen):,}', *shares))
    table.append(('chance', '', words(r.chance(1)), words(r.chance(k)), ''))
    table.append(('most frequent class', '', words(share), '', ''))
    headline = (
      f'{words(r.recall(1))} of {len(chosen):,} images in the right one of'
      f' {len(labels)} classes, with {len(self.templates)} templates; chance is'
      f' {words(r.chance(1))}, always the most frequent class {words(share)}.'
    )
    return Ranking(found, records, headline, table, self.pictures)

  def class_embeddings(self, params: Any, labels: Sequence[str]) -> np.ndarray:
    """f32[classes, E] of length 1: the mean over the templates."""
    texts = [t.format(self._words(label)) for label in labels for t in self.templates]
    examples = [self.embedder.text_example(text) for text in texts]
    each = self.embedder.texts(params, examples)
    mean = each.reshape(len(labels), len(self.templates), -1).mean(1)
    return mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-6)

  def _words(self, label: str) -> str:
    return label if self.classes is None else self.classes.get(label, label)

  def prepare(self, index: int) -> tuple[int, str, Example, str]:
    """(index, document's id, its image, its label)."""
    document = self.dataset[index]
    label = document.meta.get(self.label)
    if not isinstance(label, str):
      raise BadDocument('no_label', f'document {document.id!a}')
    return index, document.id, self.embedder.image_example(document), label
