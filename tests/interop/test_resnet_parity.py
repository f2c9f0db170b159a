"""Small random ResNets of transformers, on CPU torch, give our numbers; and back.

Their batch norms stand as in evaluation, with means and variances that were not 0
and 1. Needs the extra `parity`.
"""

import functools
import importlib.util
import json
import shutil
import warnings

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mmjax.batch import Bank
from mmjax.data.media import patchify
from mmjax.interop import huggingface as hf

pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings('ignore'),
  pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ('torch', 'transformers')),
    reason="needs torch and transformers: pip install 'mmjax[parity]'",
  ),
]

SIZES = dict(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1])
MODELS = {
  'classes': ('ResNetForImageClassification', dict(SIZES, num_labels=5)),
  'two': ('ResNetForImageClassification', SIZES),  # the number that goes without saying
  'basic': ('ResNetModel', dict(SIZES, layer_type='basic', hidden_sizes=[8, 12])),
  'early': ('ResNetModel', dict(SIZES, downsample_in_bottleneck=True)),
}
names = pytest.mark.parametrize('name', MODELS)
OURS = dict(channels=192, image_grid=(5, 4))
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 40, 32, 3)).astype(np.uint8)


def quiet(f, *args, **kwargs):
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return f(*args, **kwargs)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """name -> (their model, its directory, what it says of the images)."""
  import torch

  transformers = quiet(importlib.import_module, 'transformers')
  # With oneDNN, torch 2.13 aborts in the backward pass of narrow 3 x 3 convolutions.
  torch.backends.mkldnn.set_flags(False)

  @functools.cache
  def make(name):
    cls, fields = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(transformers.ResNetConfig(**fields)).eval()
    with torch.no_grad():
      for key, x in model.state_dict().items():
        if key.endswith('running_var'):
          x.mul_(1 + torch.rand_like(x))
        elif not key.endswith('num_batches_tracked'):
          share = 0.5 if 'classifier' in key else 0.1
          x.add_(share * torch.randn_like(x))
    path = tmp_path_factory.mktemp(name)
    quiet(model.save_pretrained, path)
    return model, path

  yield make
  torch.backends.mkldnn.set_flags(True)


def bank():
  """Two pictures in the first row, one in the second."""
  patches = np.stack([patchify(image, 8) for image in IMAGES])
  values, items = np.zeros((2, 42, 192), np.uint8), np.zeros((2, 42), np.int32)
  positions = np.zeros((2, 42, 3), np.int32)
  cells = np.indices((1, 5, 4)).reshape(3, -1).T
  for (b, i, at), image in zip(((0, 1, 0), (0, 2, 21), (1, 1, 2)), patches):
    here = b, slice(at, at + 20)
    values[here], items[here], positions[here] = image, i, cells
  there = np.array([[1, 1], [1, 0]], np.int32)
  return Bank(values, items, positions, there, np.zeros_like(there))


def theirs(model):
  """Tokens [3, h, w, D], pooled [3, D] and logits of the images, as torch tensors."""
  import torch

  mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
  pixels = ((IMAGES - np.array(mean)) / np.array(std)).astype(np.float32)
  pixels = torch.tensor(pixels.transpose(0, 3, 1, 2))
  base = getattr(model, 'resnet', model)(pixels)
  logits = model(pixels).logits if hasattr(model, 'resnet') else None
  return base.last_hidden_state.permute(0, 2, 3, 1), base.pooler_output[..., 0, 0], logits


def ours(model, params):
  def of_items(x):
    return jnp.stack([x[0, 0], x[0, 1], x[1, 0]])

  out = model.apply({'params': params}, bank())
  pooled = of_items(out.pooled)
  grid = 1, *model.out_grid(model.image_size)
  tokens = of_items(out.values.reshape(2, 2, *grid[1:], -1))
  if not model.num_classes:
    return tokens, pooled, None
  return tokens, pooled, model.apply({'params': params}, pooled, method='logits')


@names
def test_outputs_agree(name, made):
  module, path = made(name)
  model, params = hf.load(path, **OURS)
  largest = 0.0
  got = jax.jit(functools.partial(ours, model))(params)
  for x, y in zip(got, theirs(module)):
    assert (x is None) == (y is None)
    if y is not None:
      y = y.detach().numpy()
      assert x.shape == y.shape and np.abs(y).max() > 0.3
      largest = max(largest, np.abs(x - y).max())
  print(f'{name}: max |difference| {largest:.1e}')
  assert largest <= 1e-4


@pytest.mark.parametrize('name', ['classes', 'basic'])
def test_gradients_agree(name, made, tmp_path):
  """Of sum(cos(outputs)); theirs are read as if they were weights."""
  module, path = made(name)
  module.zero_grad()
  sum(y.cos().sum() for y in theirs(module) if y is not None).backward()
  grads = {n: np.zeros_like(x) for n, x in load_file(path / 'model.safetensors').items()}
  grads |= {n: p.grad.numpy().copy() for n, p in module.named_parameters()}
  shutil.copy(path / 'config.json', tmp_path)
  save_file(grads, tmp_path / 'model.safetensors')
  _, want = hf.load(tmp_path, **OURS)
  model, params = hf.load(path, **OURS)

  @jax.jit
  @jax.grad
  def gradients(params):
    return sum(jnp.cos(y).sum() for y in ours(model, params) if y is not None)

  got = flax.traverse_util.flatten_dict(gradients(params), sep='/')
  want = flax.traverse_util.flatten_dict(want, sep='/')
  largest = 0.0
  for path, w in want.items():
    if path.endswith(('norm/mean', 'norm/var')):
      assert not np.any(got[path])
      continue
    error = np.linalg.norm(got[path] - w) / np.linalg.norm(w)
    largest = max(largest, float(error))
  print(f'{name}: largest relative difference of gradients {largest:.1e}')
  assert largest <= 1e-3


@names
def test_there_and_back_is_equal_bit_by_bit(name, made, tmp_path):
  module, path = made(name)
  model, params = hf.load(path, **OURS)
  hf.export(model, params, tmp_path)
  again, same = hf.load(tmp_path)
  assert again == model  # also the size of the pictures, which their config lacks
  jax.tree.map(np.testing.assert_array_equal, same, params)
  opened = quiet(type(module).from_pretrained, tmp_path)
  want = module.state_dict()
  assert want.keys() == opened.state_dict().keys()
  for key, x in opened.state_dict().items():
    assert (x == want[key]).all(), key
  said = json.loads((tmp_path / 'config.json').read_text())
  assert said['model_type'] == 'resnet'


def test_refuses_what_it_has_not(made, tmp_path):
  _, path = made('basic')
  model, params = hf.load(path, **OURS)
  with pytest.raises(ValueError, match='norm_eps=0.1, not 1e-05'):
    hf.export(model.clone(norm_eps=0.1), params, tmp_path / 'a')
  shutil.copytree(path, tmp_path / 'b')
  config = json.loads((path / 'config.json').read_text())
  config['downsample_in_first_stage'] = True
  (tmp_path / 'b' / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match='downsample_in_first_stage=True is not supported'):
    hf.load(tmp_path / 'b')
