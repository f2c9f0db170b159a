"""Embeddings of any number of images and texts, each alone, in batches of one shape.

Retrieval and zero-shot classification are comparisons of these, see
`models.dual.Dual`. One example stands in each row; the last batch ends in empty rows.
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmjax import sharding
from mmjax.batch import BankBudget, Budget
from mmjax.data import pack
from mmjax.data.document import BadDocument, Document, Image, Text
from mmjax.data.example import Example, to_example


@dataclasses.dataclass(eq=False)
class Embedder:
  """Embeds with a model that has `embed_images` and `embed_texts`.

  Fields:
    model, mesh, rules, media_rules: as in training.
    tokenizer: the dataset's.
    rows: of a batch over all processes; must divide over the mesh.
  """

  model: Any
  mesh: Mesh
  rules: sharding.Rules
  media_rules: Mapping[str, Any]
  tokenizer: Any
  rows: int = 128

  def image_example(self, document: Document) -> Example:
    """The first image of a document.

    Raises:
      BadDocument: 'no_image', or what decoding says.
    """
    first = next((s for s in document.spans if isinstance(s, Image)), None)
    if first is None:
      raise BadDocument('no_image', f'document {document.id!a}')
    # The text is there because examples without a target are refused; a word, as blanks
    # are nothing to some tokenizers.
    return self._example((dataclasses.replace(first, branch=0), Text('a', True)))

  def text_example(self, *texts: str) -> Example:
    """Texts of one document, trained as they are in pairs: closed by the end token.

    Raises:
      BadDocument: 'nothing_trained', if there is no text.
    """
    return self._example(tuple(Text(text, True) for text in texts))

  def images(self, params: Any, examples: Sequence[Example]) -> np.ndarray:
    """f32[n, E], the embeddings of `image_example`s."""
    bank = {k: BankBudget(1, 1, r.channels) for k, r in self.media_rules.items()}
    return self._embed(self._image_step, params, examples, Budget(1, 1, bank))

  def texts(self, params: Any, examples: Sequence[Example]) -> np.ndarray:
    """f32[n, E], the embeddings of `text_example`s."""
    return self._embed(self._text_step, params, examples, Budget(1, 1))

  def _example(self, spans) -> Example:
    return to_example(
      Document(spans),
      tokenizer=self.tokenizer,
      rules=self.media_rules,
      slots=self.model.slots,
    )

  @functools.cached_property
  def _image_step(self):
    def step(params, batch):
      [bank] = batch.bank.values()
      return self.model.apply({'params': params}, bank, method='embed_images')[:, 0]

    return self._jit(step)

  @functools.cached_property
  def _text_step(self):
    def step(params, batch):
      first = np.ones((self.rows, 1), np.int32)
      found = self.model.apply({'params': params}, batch, first, method='embed_texts')
      return found[0][:, 0]

    return self._jit(step)

  def _jit(self, step):
    # Whole on every device, so that every process can read all of it.
    return jax.jit(step, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

  def _embed(self, step, params, examples, like) -> np.ndarray:
    if not examples:
      raise ValueError('nothing to embed')
    budget = pack.fit_budget(examples, like, multiple=8)
    index, blocks = sharding.row_block(self.rows, self.mesh, self.rules)
    local = self.rows // blocks
    running, done = collections.deque(), []
    with sharding.use(self.mesh, self.rules):
      for start in range(0, len(examples), self.rows):
        rows = [[e] for e in examples[start : start + self.rows]]
        rows += [[]] * (self.rows - len(rows))
        batch = pack.pack(rows[index * local : (index + 1) * local], budget)
        batch = sharding.place_batch(batch, self.rows, self.mesh, self.rules)
        running.append(step(params, batch))
        if len(running) > 2:  # pack the next while this one runs, but hold few
          done.append(np.asarray(running.popleft()))
    return np.concatenate([*done, *map(np.asarray, running)])[: len(examples)]
