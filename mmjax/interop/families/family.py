"""What an architecture of Hugging Face is to us, and what its tables are made of.

A `Family` is a table of leaves and two functions: `fields` makes our model's fields
of a config.json, `config` makes a config.json of our model. Which of the leaves a
model has is the model's matter (a tied one has no head).
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Set
from typing import Any

import flax.linen as nn

from mmjax.interop.leaf import Leaf
from mmjax.names import closest

LAYERS = 'transformer/layers/'
ACTIVATIONS = {
  'silu': 'silu',
  'gelu': 'gelu',
  'gelu_tanh': 'gelu_pytorch_tanh',
  'quick_gelu': 'quick_gelu',
  'relu': 'relu',
  'relu2': 'relu2',
}
_THEIRS = {
  **{theirs: ours for ours, theirs in ACTIVATIONS.items()},
  'gelu_new': 'gelu_tanh',
  'swish': 'silu',
}


@dataclasses.dataclass(frozen=True)
class Family:
  """One architecture.

  Fields:
    model: which of ours, a name that `mmjax.models.build` knows.
    prefix: of their names, absent where the model was saved without its head.
    leaves: the table, or what makes it for a model.
    ignored: patterns of tensors that say nothing that the model doesn't know, or what
      makes them for a model.
    aliases: pairs of beginnings of names: where the files have no name that begins with
      the first, the second stands for it.
    fields: (config, names of tensors) -> fields of ours.
    config: our model -> config, without model_type and dtype.
  """

  model: str
  prefix: str
  leaves: tuple[Leaf, ...] | Callable[[nn.Module], tuple[Leaf, ...]]
  ignored: tuple[str, ...] | Callable[[nn.Module], tuple[str, ...]]
  fields: Callable[[dict[str, Any], Set[str]], dict[str, Any]]
  config: Callable[[nn.Module], dict[str, Any]]
  aliases: tuple[tuple[str, str], ...] = ()

  def table(self, model: nn.Module) -> tuple[Leaf, ...]:
    """The leaves for a model (and maybe some that it hasn't)."""
    return self.leaves(model) if callable(self.leaves) else self.leaves

  def unused(self, model: nn.Module) -> tuple[str, ...]:
    """Patterns of tensors that this model leaves where they are."""
    return self.ignored(model) if callable(self.ignored) else self.ignored

  def spell(self, name: str, stored: Set[str]) -> str:
    """A name of the table as the files have it."""
    if self.prefix and not any(s.startswith(self.prefix) for s in stored):
      name = name.removeprefix(self.prefix)
    for usual, other in self.aliases:
      if name.startswith(usual) and not any(s.startswith(usual) for s in stored):
        name = other + name[len(usual) :]
    return name


def linear(ours: str, theirs: str, axes: str) -> tuple[Leaf, Leaf]:
  """A torch Linear, f[out, in] and f[out], and ours, in first, the bias beside it."""
  bias = re.match(r'\(.*?\)|\w+', axes)[0]
  return (
    Leaf(ours, f'{theirs}.weight', axes),
    Leaf(f'{ours}_bias', f'{theirs}.bias', f'{bias} -> {bias.strip("()")}'),
  )


def norm(ours: str, theirs: str) -> tuple[Leaf, Leaf]:
  return (
    Leaf(f'{ours}/scale', f'{theirs}.weight', 'D -> D'),
    Leaf(f'{ours}/bias', f'{theirs}.bias', 'D -> D'),
  )


def only(config: dict[str, Any], key: str, *allowed: Any) -> None:
  """Refuses a value that the model doesn't have; absent means the first allowed."""
  value = config.get(key, allowed[0])
  if value not in allowed:
    raise ValueError(
      f'config.json: {key}={value!r} is not supported, only {allowed[0]!r}'
    )


def activation(config, key, default) -> str:
  name = config.get(key) or default
  if name not in _THEIRS:
    raise ValueError(f'config.json: unknown {key} {name!r}{closest(name, _THEIRS)}')
  return _THEIRS[name]


def under(ours: str, theirs: str, leaves: Iterable[Leaf]) -> tuple[Leaf, ...]:
  """The leaves of a part, at its place in a larger model on both sides."""
  return tuple(
    dataclasses.replace(leaf, ours=ours + leaf.ours, theirs=theirs + leaf.theirs)
    for leaf in leaves
  )
