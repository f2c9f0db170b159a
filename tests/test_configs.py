"""Every config file builds its model, optimizer and state, without computing them."""

import ast
import pathlib
import runpy

import jax
import pytest
from ml_collections import ConfigDict

from mmjax.train import build, config, log
from mmjax.train.loop import refuse_uneven

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / 'configs').glob('*.py'))

LARGE = {
  'encoded_easy_vqa_stage1': 6_000_000,
  'encoded_easy_vqa_stage2': 6_000_000,
  'flamingo_docs': 160_000_000,
  'lit_emoji': 30_000_000,
}  # with what is read from files
# For pods: billions of parameters, without what was published as another number.
PODS = {
  'clip_l14': 0.428,
  'flamingo_3b': 2.7,
  'flamingo_9b': 8.9,
  'paligemma_3b': 2.92,
  'siglip_so400m': 0.878,
  'unified_1b': 1.24,
  'unified_4b_image': 4.3,
  'unified_8b': 8.03,
}


@pytest.mark.parametrize('variant', ['', ':tiny'])
@pytest.mark.parametrize('file', CONFIGS, ids=lambda p: p.stem)
def test_builds(file, variant):
  made = config.load(f'{file}{variant}')
  config.check(made)
  devices = jax.devices()[:1]
  pod = PODS.get(file.stem) if not variant else None
  if pod:
    made.sharding.mesh, devices = ConfigDict({'data': 1, 'fsdp': 8}), jax.devices()
  parts = build.build(made, 512, devices)
  refuse_uneven(made, parts)
  batch = parts.batch_shapes(made.data.rows)
  rng = jax.eval_shape(lambda: jax.random.key(0))
  loss, sums = jax.eval_shape(
    lambda p, b, r: parts.loss_fn(p, b, r, True), parts.abstract.params, batch, rng
  )
  assert loss.shape == () and sums['weight'].shape == ()
  count = sum(x.size for x in jax.tree.leaves(parts.abstract.params))
  if pod:
    assert count == pytest.approx(1e9 * pod, rel=0.05)
    assert made.data.vocab_size is not None
  else:
    assert count < (200_000 if variant else LARGE.get(file.stem, 3_000_000))
  again = config.from_json(config.to_json(made))
  assert config.refuse_changes(made, again) == []


@pytest.mark.parametrize('file', CONFIGS, ids=lambda p: p.stem)
def test_says_what_it_is_and_how_to_run_it(file):
  text = ast.get_docstring(ast.parse(file.read_text()))
  assert 'Expect:' in text
  assert f'COMMAND: python train.py --config=configs/{file.name}' in text
  said = runpy.run_path(str(file))['get_config']()
  assert len(config.flat(said)) <= 70


def test_there_are_configs():
  assert {p.stem for p in CONFIGS} >= {'quickstart', 'easy_vqa'}
  assert callable(log.read)
