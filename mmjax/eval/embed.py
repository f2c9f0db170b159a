"""Embeddings of any number of images and texts, each alone, in batches of one shape.

Retrieval and zero-shot classification are comparisons of these, see
`models.dual.Dual`. One example stands in each row; the last batch ends in empty rows.
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmjax import sharding
from mmjax.batch import BankBudget, Budget
from mmjax.data import media, pack
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


@dataclasses.dataclass(eq=False)
class EmbeddingEvaluator:
  """What retrieval and zero-shot classification have in common.

  Fields:
    dataset: `[i] -> Document`, `len`, `.tokenizer`.
    model, mesh, rules, media_rules: as in training.
    rows: rows of a batch over all processes; must divide over the mesh.
    every: steps between evaluations in training; 0 = only at the end.
    limit: how many documents a scheduled evaluation takes; None = all.
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

  NAME: ClassVar[str]  # in the config's `eval`

  def __post_init__(self):
    for name in ('rows', 'limit'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'eval.{self.NAME}.{name} = {value}; it must be positive')
    self.embedder = Embedder(
      self.model, self.mesh, self.rules, self.media_rules, self.dataset.tokenizer,
      self.rows,
    )  # fmt: skip

  def pictures(self, index: int) -> list[np.ndarray]:
    """The first image u8[H, W, 3] of a document, as stored."""
    spans = self.dataset[index].spans
    return [media.pixels(s) for s in spans if isinstance(s, Image)][:1]

  def prepare(self, index: int) -> Any:
    """What of document `index` is embedded and told of; may raise BadDocument."""
    raise NotImplementedError

  @functools.cached_property
  def prepared(self) -> tuple[list[Any], collections.Counter]:
    """Of all documents, and the bad ones by reason; made once."""
    found, bad = [], collections.Counter()
    for index in range(len(self.dataset)):
      try:
        found.append(self.prepare(index))
      except BadDocument as error:
        bad[error.reason] += 1
    return found, bad
