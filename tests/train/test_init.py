"""Runs that begin with parameters from files: `config.init`."""

import json
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from mmjax import models, sharding
from mmjax.data.document import Document, Text
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.data.writer import Writer
from mmjax.interop import huggingface, pretrained
from mmjax.train import build, loop, optim
from mmjax.train import config as config_lib
from mmjax.train.checkpoint import Checkpoints

FIELDS = dict(
  embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=16,
  scale_embedding=False,
)  # fmt: skip


@pytest.fixture(scope='module')
def stored(tmp_path_factory):
  """A language model on disk, and its parameters by path."""
  model = models.build('unified', vocab_size=257, **FIELDS)
  made = jax.eval_shape(model.init, jax.random.key(0), models.padding(model))['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype('f4') / 4, made)
  path = tmp_path_factory.mktemp('lm') / 'lm'
  huggingface.export(model, params, path)
  return path, dict(zip(optim.paths(params), jax.tree.leaves(params)))


def config(init, data='none', steps=1, budget=None, **optim):
  given = dict(
    data=dict(
      source='none', path=str(data), rows=8, image=dict(patch=2, resize='fixed', size=4),
      budget=dict(stream=16, targets=8, **(budget or {})),
    ),
    model=dict(name='unified', **FIELDS),
    optim=dict(learning_rate=0.1, schedule=dict(name='constant'), **optim),
    train=dict(steps=steps, checkpoint_every=1),
    sharding=dict(max_replicated=1.0),
    init=init,
  )  # fmt: skip
  return config_lib.resolve(ConfigDict(given))


def test_loaded_parameters_take_their_places_and_the_rest_is_as_ever(stored):
  path, want = stored
  image = dict(image=dict(patches=8, items=2))
  said = dict(model=dict(spec=str(path), allow_missing=['embed/image/*']))
  made = config(said, budget=image, ema=0.9, freeze=['transformer/layers/mlp/*'])
  made.sharding.mesh = dict(data=2, fsdp=4)
  made.sharding.preset = 'fsdp'
  parts = build.build(made, 257)
  rng = jax.random.key(0)
  with sharding.use(parts.mesh, parts.rules):
    given = pretrained.load_parts(parts.model, parts.abstract.params, said)
    plain, state = parts.init(rng), parts.init(rng, given)
  places = jax.tree.map(lambda x: x.sharding, parts.abstract.params)
  names = optim.paths(state.params)
  for name, x, other, place in zip(
    names, *map(jax.tree.leaves, (state.params, plain.params, places))
  ):
    assert x.sharding.is_equivalent_to(place, x.ndim), name
    np.testing.assert_array_equal(x, want.get(name, other))
  assert {n for n in names if n not in want} == {'embed/image/bias', 'embed/image/kernel'}
  average = dict(zip(optim.paths(state.ema), jax.tree.leaves(state.ema)))
  assert not any('/mlp/' in name for name in average)  # frozen: there is none
  for name, x in average.items():
    np.testing.assert_array_equal(x, want.get(name, x))
  assert int(state.step) == 0


def test_what_is_given_must_be_there():
  parts = build.build(config({}), 257, jax.devices()[:1])
  with pytest.raises(ValueError, match='there is no parameter lm/x'):
    parts.init(jax.random.key(0), {'lm/x': jax.numpy.zeros(1)})


def test_what_is_given_is_not_drawn(stored):
  """The program that makes the state then draws nothing."""
  parts = build.build(config({}), 257, jax.devices()[:1])
  given = {k: jax.numpy.asarray(x) for k, x in stored[1].items()}
  rng = jax.random.key(0)
  plain, quick = (
    jax.jit(parts.init).lower(rng, g).compile().as_text() for g in ({}, given)
  )
  assert len(quick) < len(plain) / 4


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp('data') / 'letters'
  with Writer(path, ByteTokenizer(), {}) as writer:
    for i in range(40):
      letter = 'ab'[i % 2]
      spans = Text(f'{letter}?', trained=False), Text(letter, trained=True)
      writer.add('train', Document(spans, id=str(i)))
  return path


def test_the_first_checkpoint_holds_the_file_and_a_resumed_run_needs_it_no_more(
  stored, data, tmp_path
):
  path = shutil.copytree(stored[0], tmp_path / 'lm')
  frozen = ['transformer/layers/*', 'embed/text']

  def run(steps, init):
    made = config(init, data, steps, freeze=frozen)
    return loop.train(made, tmp_path / 'run', jax.devices()[:1])

  with pytest.raises(ValueError, match='init.model: .*nowhere: no such directory'):
    run(1, {'model': str(tmp_path / 'nowhere')})
  shutil.rmtree(tmp_path / 'run')

  init = {'model': str(path)}
  assert run(1, init) == 'done'
  said = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert said['init'] == init
  assert 'parameters from' in (tmp_path / 'run' / 'train.log').read_text()
  parts = build.build(config(init), 257, jax.devices()[:1])
  kept = Checkpoints(tmp_path / 'run' / 'checkpoints', read_only=True)
  params, _ = kept.restore_params(parts.abstract.params, 1)
  for name, x in zip(optim.paths(params), jax.tree.leaves(params)):
    equal = np.array_equal(x, stored[1][name])
    assert equal == any(name.startswith(p.rstrip('*')) for p in frozen), name

  shutil.rmtree(path)
  assert run(2, init) == 'done'
  with pytest.raises(ValueError, match='run with another config: init.model'):
    run(3, {'model': 'elsewhere'})
