"""Encoded early fusion: an encoder's tokens stand in the language model's stream.

  patches --encoder--> features --projector--.
                                              >-- stream --> Transformer --> logits
  tokens -------------lookup-----------------'

(LLaVA, 2304.08485; PaliGemma, 2407.07726; with a resampler like BLIP-2, 2301.12597.)
The language model is any `Unified` under `lm/`, which gets the projected tokens ready
made for its media slots; text embeddings that are multiplied by sqrt(D) leave them as
they are. Whether an image's slots, or all of a prompt's, see each other is a matter of
the batch's tags (`data.image_attention`, `data.prompt_attention`).

Trained in two stages, as LLaVA: first the projector alone, so that what it gives means
something to the language model, and then the language model too:

  config.optim.freeze = STAGE1        then        config.optim.freeze = STAGE2
"""

import flax.linen as nn
import jax

from mmjax.batch import AttentionTags, Item, PackedBatch
from mmjax.models.unified import Unified
from mmjax.nn.cache import Cache
from mmjax.nn.features import bank_of
from mmjax.nn.projector import Projector
from mmjax.ops.vocabulary import Head

# What stays as it was, by stage: patterns for `optim.freeze`.
STAGE1 = ('vision/*', 'lm/*')
STAGE2 = ('vision/*',)


class Encoded(nn.Module):
  """A language model whose media slots hold the projected tokens of an encoder.

  Fields:
    lm: the language model; it has no media of its own.
    vision: an encoder, see `nn.features`.
    projector: see `nn.projector`.
    media: ((kind, channels),), one kind.
  """

  lm: Unified
  vision: nn.Module
  projector: Projector
  media: tuple[tuple[str, int], ...] = ()

  def __post_init__(self):
    super().__post_init__()
    if len(self.media) != 1:
      raise ValueError(f'encoded takes one kind of media, got {self.media}')
    if self.lm.media or self.lm.modality_embedding:
      raise ValueError(
        'encoded: the language model has media or modality_embedding of its own; leave'
        ' both out'
      )

  @property
  def reach(self) -> int | tuple[int, int] | None:
    return self.lm.reach

  def __call__(self, batch: PackedBatch, *, train: bool = False) -> jax.Array:
    """Hidden states after the final norm, f[B, T, D].

    Raises:
      ValueError: media that are not the model's.
    """
    ready = self._ready(batch, train)
    return self.lm(PackedBatch(batch.stream, {}), train=train, ready=ready)

  def extend(
    self, batch: PackedBatch, cache: Cache, slot: jax.Array | int
  ) -> tuple[jax.Array, Cache]:
    """Runs new slots against the cache: f[B, T, D] and the cache with them written.

    Args:
      batch: the next T slots of every row, with the row's bank if there are media slots
        among them, and without one (`{}`) else, which spares the encoder.
      cache: of S >= slot + T slots, from `empty_cache`.
      slot: where the new slots are written.
    """
    ready = self._ready(batch, False) if batch.bank else {}
    return self.lm.extend(PackedBatch(batch.stream, {}), cache, slot, ready=ready)

  def head(self) -> Head:
    """What turns hidden states into logits."""
    return self.lm.head()

  def logits(self, hidden: jax.Array) -> jax.Array:
    """f[..., D] -> f32[..., V]."""
    return self.lm.logits(hidden)

  def attention_tags(self, batch: PackedBatch) -> dict[str, AttentionTags]:
    """By name of an attention, its tags; see `batch.AttentionTags`."""
    return self.lm.attention_tags(batch)

  def slots(self, item: Item) -> tuple[int, int, int]:
    """The grid of stream slots an item takes.

    Raises:
      ValueError: the encoder can't take such an item.
    """
    return self.projector.slots(self.vision.grid(item))

  def empty_cache(self, rows: int, slots: int) -> Cache:
    """A cache for `extend`; a plain function of the fields."""
    return self.lm.empty_cache(rows, slots)

  def unscanned(self, params: dict) -> tuple['Encoded', dict]:
    """The same model with the language model's layers one by one, and its parameters."""
    if not self.lm.scan:
      return self, params
    lm, flat = self.lm.unscanned(params['lm'])
    return self.clone(lm=lm), {**params, 'lm': flat}

  def _ready(self, batch: PackedBatch, train: bool) -> dict[str, jax.Array]:
    """By kind, what the media slots take, f[B, P, D]."""
    bank = bank_of(batch, self.media)
    features = self.vision(bank, train=train)
    num_items = bank.item_order.shape[1]
    tokens = self.projector(features, num_items, self.lm.embed_dim)
    return {self.media[0][0]: tokens}
