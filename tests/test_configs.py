"""Every config file builds its model, optimizer and state, without computing them."""

import ast
import pathlib
import runpy

import jax
import pytest

from mmjax.train import build, config, log
from mmjax.train.loop import _refuse_uneven

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / 'configs').glob('*.py'))

LARGE = {
  'encoded_easy_vqa_stage1': 6_000_000,
  'encoded_easy_vqa_stage2': 6_000_000,
  'flamingo_docs': 160_000_000,
  'lit_emoji': 30_000_000,
}  # with what is read from files


@pytest.mark.parametrize('variant', ['', ':tiny'])
@pytest.mark.parametrize('file', CONFIGS, ids=lambda p: p.stem)
def test_builds(file, variant):
  made = config.load(f'{file}{variant}')
  config.check(made)
  parts = build.build(made, 512, jax.devices()[:1])
  _refuse_uneven(made, parts)
  batch = parts.batch_shapes(made.data.rows)
  rng = jax.eval_shape(lambda: jax.random.key(0))
  loss, sums = jax.eval_shape(
    lambda p, b, r: parts.loss_fn(p, b, r, True), parts.abstract.params, batch, rng
  )
  assert loss.shape == () and sums['weight'].shape == ()
  count = sum(x.size for x in jax.tree.leaves(parts.abstract.params))
  assert count < (200_000 if variant else LARGE.get(file.stem, 3_000_000))
  again = config.from_json(config.to_json(made))
  assert config.refuse_changes(made, again) == []


@pytest.mark.parametrize('file', CONFIGS, ids=lambda p: p.stem)
def test_says_what_it_is_and_how_to_run_it(file):
  text = ast.get_docstring(ast.parse(file.read_text()))
  assert 'Expect:' in text
  assert f'COMMAND: python train.py --config=configs/{file.name}' in text
  said = runpy.run_path(str(file))['get_config']()
  assert len(config._flat(said)) <= 70


def test_there_are_configs():
  assert {p.stem for p in CONFIGS} >= {'quickstart', 'easy_vqa'}
  assert callable(log.read)
