import jax
import pytest

from mmjax.batch import BankBudget, Budget, Item
from mmjax.nn.resnet import ResNet


def shapes(model):
  bank = Budget(1, 1, {'image': BankBudget(1, 1, model.channels)}).empty(1).bank['image']
  return jax.eval_shape(model.init, jax.random.key(0), bank)['params']


# As torchvision counts them, whose batch norms' means and variances aren't parameters.
@pytest.mark.parametrize(
  ('fields', 'want'),
  [
    (dict(), 25_557_032),
    (dict(norm='group'), 25_557_032),
    (dict(depths=(3, 4, 23, 3)), 44_549_160),
    (dict(block='basic', widths=(64, 128, 256, 512), depths=(2, 2, 2, 2)), 11_689_512),
  ],
)
def test_sizes_as_published(fields, want):
  model = ResNet(channels=768, num_classes=1000, **fields)
  leaves = jax.tree_util.tree_leaves_with_path(shapes(model))
  assert want == sum(x.size for p, x in leaves if p[-1].key not in ('mean', 'var'))
  assert model.grid(Item('image', (1, 14, 14))) == (1, 7, 7)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(norm='batch'), "ResNet: unknown norm 'batch'"),
    (dict(block='botleneck'), "unknown block 'botleneck'; did you mean 'bottleneck'"),
    (dict(depths=(1, 1)), r'and depths=\(1, 1\) differ in length'),
    (dict(norm='group', norm_groups=7), '64 channels do not divide into 7 groups'),
  ],
)
def test_refuses(change, message):
  with pytest.raises(ValueError, match=message):
    shapes(ResNet(channels=12, **change))
