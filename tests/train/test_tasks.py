"""Which task a config gets, and who makes its microbatches."""

import jax
import pytest
from ml_collections import ConfigDict

from mmjax.train import build, config

TOWER = dict(embed_dim=8, num_layers=1, num_heads=2, mlp_dim=8)


def make(**train):
  made = config.resolve(
    ConfigDict(
      dict(
        data=dict(
          source='none', path='none', rows=4, image=dict(patch=2, resize='fixed', size=4),
          budget=dict(stream=8, targets=8, image=dict(patches=8, items=2)),
        ),
        model=dict(
          name='dual', embed_dim=8, vision=dict(name='vit', **TOWER),
          text=dict(name='encoder', num_kv_heads=2, head_dim=4, **TOWER),
        ),
        train=dict(task='contrastive', **train),
      )
    )
  )  # fmt: skip
  config.check(made)
  return build.build(made, 16, jax.devices()[:1])


@pytest.mark.parametrize('accumulate', [1, 2])
def test_contrastive_makes_its_microbatches_itself(accumulate):
  parts = make(accumulate=accumulate, contrastive=dict(loss='sigmoid'))
  assert parts.accumulate == 1
  rng = jax.eval_shape(lambda: jax.random.key(0))
  f = jax.make_jaxpr(lambda p, b, r: parts.loss_fn(p, b, r, True))
  program = str(f(parts.abstract.params, parts.batch_shapes(4), rng))
  assert ('remat' in program) == (accumulate > 1)
  assert 'logistic' in program or 'log1p' in program  # the sigmoid loss


def test_an_unknown_loss_is_refused_at_the_door():
  with pytest.raises(ValueError, match="config.train.contrastive.loss = 'infonse'"):
    make(contrastive=dict(loss='infonse'))
