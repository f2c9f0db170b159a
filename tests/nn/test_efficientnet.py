import jax
import numpy as np
import pytest

from mmjax.batch import BankBudget, Budget, Item
from mmjax.nn.efficientnet import EfficientNet


def empty(model):
  patches = model.image_grid[0] * model.image_grid[1]
  budget = Budget(1, 1, {'image': BankBudget(patches, 1, model.channels)})
  return budget.empty(1).bank['image']


def test_size_as_published():
  """4.652 million with its head (the table of EfficientNet-Lite)."""
  model = EfficientNet(channels=768, num_classes=1000)
  made = jax.eval_shape(model.init, jax.random.key(0), empty(model))
  leaves = jax.tree_util.tree_leaves_with_path(made)
  trained = sum(x.size for path, x in leaves if path[-1].key not in ('mean', 'var'))
  assert trained == 4_652_008
  assert model.grid(Item('image', (1, 14, 14))) == (1, 7, 7) and model.width == 1280
  for grid, want in (((16, 20), (8, 10)), ((13, 13), (7, 7))):
    assert model.clone(image_grid=grid).grid(Item('image', (1, *grid))) == (1, *want)


def test_head():
  model = EfficientNet(
    channels=12, image_grid=(2, 2), stem=4, stages=((1, 3, 1, 4, 1),), width=8,
    num_classes=5,
  )  # fmt: skip
  made = jax.eval_shape(model.init, jax.random.key(0), empty(model))
  assert made['params']['head']['kernel'].shape == (8, 5)
  rng = np.random.default_rng(0)
  x, kernel, bias = (rng.standard_normal(s, np.float32) for s in ((2, 3, 8), (8, 5), 5))
  made = {'params': {'head': {'kernel': kernel, 'bias': bias}}}
  got = model.apply(made, x, method='logits')
  np.testing.assert_allclose(got, x @ kernel + bias, atol=1e-6)
  with pytest.raises(ValueError, match='num_classes=0, so there is no head'):
    model.clone(num_classes=0).apply(made, x, method='logits')
