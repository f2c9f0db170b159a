"""Runs that begin where others ended."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import models
from mmjax.sharding import make_mesh
from mmjax.train import begin
from mmjax.train.checkpoint import Checkpoints
from mmjax.train.state import TrainState

LM = dict(
  name='unified', vocab_size=9, embed_dim=8, num_layers=1, num_heads=2, num_kv_heads=2,
  head_dim=4, mlp_dim=8,
)  # fmt: skip
ENCODED = dict(
  name='encoded',
  lm=LM,
  vision=dict(name='vit', embed_dim=8, num_layers=1, num_heads=2, mlp_dim=8),
  projector=dict(name='mlp'),
  media=(('image', 6),),
)
PLACE = jax.sharding.NamedSharding(make_mesh({'fsdp': 8}), jax.sharding.PartitionSpec())


def random(fields, seed):
  """A model and parameters that no init gives, placed on a mesh."""
  model = models.build(**fields)
  made = jax.eval_shape(model.init, jax.random.key(0), models.padding(model))['params']
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype('f4'), made)
  return model, jax.device_put(params, PLACE)


def save(params, workdir, ema=None):
  zero = jax.device_put(jnp.zeros((), jnp.int32), PLACE)
  runs = Checkpoints(workdir / 'checkpoints')
  state = TrainState(
    step=zero, params=params, opt_state={'n': zero}, ema=ema, skipped=zero,
    skipped_in_a_row=zero,
  )  # fmt: skip
  runs.save(state, 1, {})
  runs.close()
  return str(workdir)


def flat(tree):
  paths = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(k, simple=True, separator='/'): x for k, x in paths}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """(model, other parameters of it, workdirs and parameters by name)."""
  model, other = random(ENCODED, 0)
  whole, words = random(ENCODED, 1)[1], random(LM, 2)[1]
  raw = random(LM | dict(media=(('image', 6),)), 3)[1]
  path = tmp_path_factory.mktemp('runs')
  mean = jax.tree.map(lambda x: x + 1, words)
  return model, other, dict(
    whole=(save(whole, path / 'whole'), whole),
    words=(save(words, path / 'words', mean), mean),
    raw=(save(raw, path / 'raw'), raw),
  )  # fmt: skip


def test_parameters_of_another_run(runs):
  """All of it, a part of it, and a part that was trained alone."""
  model, params, made = runs
  (path, whole), (words, mean), (raw, lm) = made['whole'], made['words'], made['raw']

  def given(**init):
    found = begin.parameters(model, params, init)
    assert all(x.sharding.is_equivalent_to(PLACE, x.ndim) for x in found.values())
    return found

  want = flat(whole)
  jax.tree.map(np.testing.assert_array_equal, given(model=path), want)
  part = {k: x for k, x in want.items() if k.startswith('vision/')}
  jax.tree.map(np.testing.assert_array_equal, given(vision=path), part)
  both = {f'lm/{k}': x for k, x in flat(mean).items()} | part
  got = given(lm=words, vision=path)  # where there is a moving average, that
  jax.tree.map(np.testing.assert_array_equal, got, both)
  got = given(lm=dict(spec=raw, ignore=['embed/image/*']))
  want = {f'lm/{k}': x for k, x in flat(lm).items() if not k.startswith('embed/image')}
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
  ('init', 'message'),
  [
    (dict(lmm='whole'), "init: no part 'lmm'; did you mean 'lm'"),
    (dict(lm='raw'), 'init.lm: .*extra params/embed/image/bias'),
    (dict(model='words'), 'init.model: .* missing'),
    (dict(lm=dict(spec='raw', grow=True)), "there is no 'grow' to say"),
    (dict(lm='nowhere'), 'nowhere'),
  ],
)
def test_refuses(runs, init, message):
  model, params, made = runs
  where = {name: path for name, (path, _) in made.items()} | {'nowhere': 'nowhere'}
  init = {
    k: where[v] if isinstance(v, str) else dict(v, spec=where[v['spec']])
    for k, v in init.items()
  }
  with pytest.raises(ValueError, match=message):
    begin.parameters(model, params, init)
