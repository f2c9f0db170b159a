"""A question whose answer is in the picture, small enough to learn in seconds."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from mmjax import models, sharding
from mmjax.data.document import Document, Image, Text
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.data.writer import Writer
from mmjax.ops.vocabulary import Head
from mmjax.sharding import param
from mmjax.train import build, config, loop, optim, state, step


@pytest.fixture
def tiny():
  """tiny(section={...}) -> a resolved config of a model that trains in no time."""

  def make(**sections):
    given = ConfigDict(
      dict(
        data=dict(
          source='none',
          path='none',
          rows=8,
          image=dict(patch=2, resize='fixed', size=4),
          budget=dict(stream=16, targets=4, image=dict(patches=8, items=2)),
        ),
        model=dict(
          embed_dim=16,
          num_layers=2,
          num_heads=4,
          num_kv_heads=2,
          head_dim=8,
          mlp_dim=32,
        ),
        optim=dict(learning_rate=3e-3, schedule=dict(name='constant')),
        train=dict(steps=4),
      )
    )
    for name, values in sections.items():
      if name not in given:
        given[name] = ConfigDict()
      part = given[name]
      for key, value in values.items():
        if isinstance(value, dict) and isinstance(part.get(key), ConfigDict):
          part[key].update(value)
        else:
          part[key] = value
    return config.resolve(given)

  return make


@pytest.fixture
def pictures():
  """pictures(budget, rows, seed) -> a batch; a row is two documents of this kind:

  slot    0   1   2   3    4    5        4 patches, all dark or all light
  token   i   i   i   i    1   2 or 3    1 = "?", 2 = dark, 3 = light (trained)
  """

  def make(budget, rows, seed=0):
    rng = np.random.default_rng(seed)
    light = rng.integers(0, 2, (rows, 2))
    batch = budget.empty(rows)
    s, bank = batch.stream, batch.bank['image']
    for d in range(2):
      at = slice(6 * d, 6 * d + 6)
      s.tokens[:, at] = [-1, -1, -1, -1, 1, 0]
      s.tokens[:, 6 * d + 5] = 2 + light[:, d]
      s.segment_ids[:, at] = d + 1
      s.order[:, at] = s.last[:, at] = [0, 0, 0, 0, 1, 2]
      s.positions[:, at] = np.array([0, 0, 1, 1, 2, 3])[:, None]
      s.weights[:, 6 * d + 5] = 1
      s.source[:, at] = [4 * d, 4 * d + 1, 4 * d + 2, 4 * d + 3, -1, -1]
      patches = slice(4 * d, 4 * d + 4)
      noise = rng.integers(0, 100, (rows, 4, bank.values.shape[-1]))
      bank.values[:, patches] = noise + 150 * light[:, d, None, None]
      bank.items[:, patches] = d + 1
      bank.item_segments[:, d] = d + 1
    return batch

  return make


class Stepper:
  """A compiled step with its state, outside of the loop."""

  def __init__(self, state, compiled, mesh, rules, rows):
    self.state, self.compiled = state, compiled
    self.mesh, self.rules, self.rows = mesh, rules, rows

  def __call__(self, batch):
    with sharding.use(self.mesh, self.rules):
      placed = sharding.place_batch(batch, self.rows, self.mesh, self.rules)
      self.state, metrics = self.compiled(self.state, placed)
    return {k: float(v) for k, v in jax.device_get(metrics).items()}


@pytest.fixture
def stepper():
  """stepper(config) -> (a `Stepper` of the real model, its parts)."""

  def make(config, devices=1):
    p = build.build(config, 8, jax.devices()[:devices])
    places = jax.tree.map(lambda x: x.sharding, p.abstract.params)
    with sharding.use(p.mesh, p.rules):
      run = step.make_step(
        p.loss_fn,
        p.optimizer,
        jax.random.key(1),
        accumulate=config.train.accumulate,
        grad_shardings=places,
      )
      rows = config.data.rows
      compiled = step.compile_step(run, p.abstract, p.batch_shapes(rows))
      return Stepper(p.init(jax.random.key(0)), compiled, p.mesh, p.rules, rows), p

  return make


class Toy(nn.Module):
  """x f[B, 4] -> f[B, 2]; compiles in no time."""

  @nn.compact
  def __call__(self, x):
    normal = nn.initializers.normal(0.5)
    up = param(self, 'up', normal, (4, 8), ('embed', 'mlp'))
    bias = param(self, 'bias', nn.initializers.zeros, (8,), ('mlp',))
    down = param(self, 'down', normal, (8, 2), ('mlp', None))
    return jnp.tanh(x @ up + bias[None]) @ down


def toy_loss(params, batch, rng, train):
  """Weighted squares; NaN where x holds a NaN."""
  noise = jax.random.normal(rng, batch['x'].shape) * batch['noise'][:, None]
  error = Toy().apply({'params': params}, batch['x'] + noise) - batch['y']
  rows = jnp.sum(error**2, 1) * batch['weight']
  return jnp.sum(rows), {'weight': jnp.sum(batch['weight'])}


@pytest.fixture(scope='session')
def toy_batch():
  def make(rows=8, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 4)).astype(np.float32)
    y = np.stack([x[:, 0] - x[:, 1], x[:, 2] + 0.5 * x[:, 3]], 1)
    ones = np.ones(rows, np.float32)
    return {'x': x, 'y': y, 'weight': ones, 'noise': 0 * ones}

  return make


@pytest.fixture(scope='session')
def toy(toy_batch):
  """toy(name='adamw', ...) -> a `Stepper` of `Toy`, with .abstract; programs are kept."""

  def compiled(accumulate, loss_fn, rows, devices, preset, **optimizer):
    optimizer = {'name': 'sgd', 'learning_rate': 0.1, 'steps': 100, **optimizer}
    axis = 'fsdp' if preset == 'fsdp' else 'data'
    mesh = sharding.make_mesh({axis: devices}, jax.devices()[:devices])
    rules = sharding.rules_for(preset)

    def init(rng):
      return Toy().init(rng, jnp.zeros((1, 4)))['params']

    def build_optimizer(params, names):
      return optim.build(params, names, **optimizer)

    with sharding.use(mesh, rules):
      made, abstract, init = state.plan(init, build_optimizer, mesh, rules)
      run = step.make_step(loss_fn, made, jax.random.key(1), accumulate=accumulate)
      batch = toy_batch(rows)
      shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        batch,
        sharding.batch_shardings(batch, mesh, rules),
      )
      return step.compile_step(run, abstract, shapes), init, abstract, mesh, rules

  programs = {}

  def make(accumulate=1, loss_fn=toy_loss, rows=8, devices=1, preset='dp', **optimizer):
    args = (accumulate, loss_fn, rows, devices, preset)
    key = repr((args, sorted(optimizer.items())))
    if key not in programs:
      programs[key] = compiled(*args, **optimizer)
    program, init, abstract, mesh, rules = programs[key]
    with sharding.use(mesh, rules):
      made = Stepper(init(jax.random.key(0)), program, mesh, rules, rows)
    made.abstract = abstract
    return made

  return make


class Bigram(nn.Module):
  """Predicts a token from the one before; blind, and fast to compile."""

  vocab_size: int
  media: tuple = ()
  embed_dim: int = 8
  rate: float = 0.5

  def setup(self):
    shape, axes = (self.vocab_size, self.embed_dim), ('vocab', 'embed')
    self.table = param(self, 'table', nn.initializers.normal(0.1), shape, axes)
    init = nn.initializers.normal(0.1)
    self.kernel = param(self, 'head', init, shape[::-1], axes[::-1])
    self.drop = nn.Dropout(self.rate)

  def __call__(self, batch, *, train=False):
    hidden = jnp.take(self.table, jnp.maximum(batch.stream.tokens, 0), 0)
    hidden = self.drop(hidden, deterministic=not train)
    return hidden @ self.kernel @ self.kernel.T if self.is_initializing() else hidden

  def head(self):
    return Head((self.kernel,), (('embed', 'vocab'),))

  def slots(self, item):
    return item.grid


class Counter:
  """Stands for an evaluator; notes when it ran."""

  every, runs = 2, None

  def run(self, params, step, full=False):
    from mmjax.eval import Result

    self.runs.append((step, full))
    if hook := getattr(self, 'hook', None):
      hook(step)
    return Result({'vqa/accuracy': 0.5 + step / 100}, [])


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp('data') / 'shades'
  rng = np.random.default_rng(0)
  with Writer(path, ByteTokenizer(), {}) as writer:
    for i in range(60):
      light = int(rng.integers(0, 2))
      pixels = (rng.integers(0, 100, (4, 4, 3)) + 150 * light).astype(np.uint8)
      image = Image(pixels)
      answer = Text('light' if light else 'dark', trained=True)
      writer.add(
        'train', Document((image, Text('?', trained=False), answer), id=f'doc{i}')
      )
  return path


@pytest.fixture(scope='module')
def programs():
  """Executables by their text, so that a program is compiled once in this file."""
  return {}


@pytest.fixture
def run(tiny, data, tmp_path, monkeypatch, programs):
  """run(steps, ..., workdir='a') -> outcome; run.evaluator counts evaluations."""
  compile_ = jax.stages.Lowered.compile

  def kept(self, *args, **kwargs):
    key = self.as_text()
    if key not in programs:
      programs[key] = compile_(self, *args, **kwargs)
    return programs[key]

  monkeypatch.setattr(jax.stages.Lowered, 'compile', kept)
  # A picture takes a second; tests/eval looks at it.
  monkeypatch.setattr(
    'mmjax.eval.curves.write', lambda workdir, *_: (workdir / 'curves.png').touch()
  )
  monkeypatch.setitem(models.MODELS, 'bigram', Bigram)
  evaluator = Counter()
  evaluator.runs = []
  monkeypatch.setattr('mmjax.eval.build_evaluators', lambda *a, **k: {'vqa': evaluator})

  def make(steps=4, workdir='a', devices=1, profile=None, **sections):
    given = tiny(
      data={
        'path': str(data),
        'rows': 8,
        'budget': dict(stream=32, targets=16),
        **sections.get('data', {}),
      },
      train={
        **dict(steps=steps, log_every=2, checkpoint_every=2),
        **sections.get('train', {}),
      },
      optim=sections.get('optim', {}),
    )
    given.model = {'name': 'bigram', 'embed_dim': 8, **sections.get('model', {})}
    given.sharding.update({'max_replicated': 1.0, **sections.get('sharding', {})})
    given, where = config.resolve(given), tmp_path / workdir
    return loop.train(given, where, jax.devices()[:devices], profile)

  make.evaluator, make.workdir = evaluator, tmp_path / 'a'
  return make
