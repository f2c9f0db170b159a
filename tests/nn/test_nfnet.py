import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from mmjax.batch import Bank, BankBudget, Budget, Item
from mmjax.nn.nfnet import ACTIVATIONS, DEPTHS, Block, NFNet, WSConv

KEY = jax.random.key(0)
TINY = NFNet(
  channels=48, image_grid=(3, 3), stem=(4, 4, 8), widths=(16, 24), depths=(1, 2),
  group_width=4, num_classes=0, pool='mean',
)  # fmt: skip


def shapes(model):
  bank = Budget(1, 1, {'image': BankBudget(1, 1, model.channels)}).empty(1).bank['image']
  return jax.eval_shape(model.init, jax.random.key(0), bank)['params']


def pictures(n=1, grid=(3, 3)):
  """n rows of one picture each."""
  cells = np.indices((1, *grid)).reshape(3, -1).T.astype(np.int32)
  P = len(cells)
  return Bank(
    np.random.default_rng(1).standard_normal((n, P, 48)).astype(np.float32),
    np.ones((n, P), np.int32),
    np.tile(cells[None], (n, 1, 1)),
    np.ones((n, 1), np.int32),
    np.zeros((n, 1), np.int32),
  )


@pytest.mark.parametrize(
  ('name', 'millions'),
  [('F0', 71.5), ('F1', 132.6), ('F3', 254.9), ('F6', 438.4)],
)
def test_sizes_as_published(name, millions):
  """Table 1 of 2102.06171, with a head of 1000 classes."""
  model = NFNet(channels=768, image_grid=(16, 16), depths=DEPTHS[name], num_classes=1000)
  count = sum(x.size for x in jax.tree.leaves(shapes(model)))
  assert round(count / 1e6, 1) == millions
  assert model.grid(Item('image', (1, 16, 16))) == (1, 8, 8) and model.width == 3072


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_activations_keep_variance_1(name):
  x = np.linspace(-12, 12, 200_001, dtype=np.float32)
  y = np.asarray(ACTIVATIONS[name](x), np.float64)
  p = np.exp(-(x.astype(np.float64) ** 2) / 2)
  p /= p.sum()
  assert abs(p @ y**2 - (p @ y) ** 2 - 1) < 2e-3


def test_a_convolution_keeps_variance_1_at_every_scale_of_its_kernel():
  x = np.random.default_rng(0).standard_normal((4, 16, 16, 64)).astype(np.float32)
  x, conv = ACTIVATIONS['gelu'](x), WSConv(256, 3)
  params = conv.init(jax.random.key(0), x)['params']
  for factor in (1, 30):
    scaled = {**params, 'kernel': 5 + factor * params['kernel']}
    y = conv.apply({'params': scaled}, x)[:, 1:-1, 1:-1]  # without zeros at the edge
    # Mean 0 though the activation's isn't, and variance 1, over channels.
    assert abs(np.mean(y)) < 0.03 and abs(np.var(y) - 1) < 0.05


def test_a_block_adds_the_variance_it_is_meant_to():
  """With gain 1 it adds alpha**2 to a stream of the variance that beta stands for."""
  x = 2 * np.random.default_rng(0).standard_normal((2, 16, 16, 128)).astype(np.float32)
  block = Block(128, 1, 64, alpha=3.0, beta=1 / 2)
  params = jax.jit(block.init)(jax.random.key(0), x)['params']
  np.testing.assert_array_equal(jax.jit(block.apply)({'params': params}, x), x)
  params['skip_gain'] = np.ones((), np.float32)
  y = jax.jit(block.apply)({'params': params}, x)
  inner = np.s_[:, 2:-2, 2:-2]  # without zeros at the edge
  print('variance added', np.var(y[inner] - x[inner]), 'in all', np.var(y[inner]))
  assert abs(np.var(y[inner] - x[inner]) / 9 - 1) < 0.1
  assert abs(np.var(y[inner]) / 13 - 1) < 0.1


@functools.cache
def random_params():
  rng = np.random.default_rng(0)
  draw = lambda x: 0.5 * rng.standard_normal(x.shape).astype(x.dtype)  # noqa: E731
  return jax.tree.map(draw, shapes(TINY))


def test_equals_the_paper_in_numpy():
  def conv(x, p, stride=1):
    w = p['kernel'].astype(np.float64)
    w = w - w.mean((0, 1, 2))
    h, _, d, E = w.shape
    w = w / np.sqrt((w**2).sum((0, 1, 2))) * p['gain']  # fan-in * variance = the sum
    need = max((-(-len(x) // stride) - 1) * stride + h - len(x), 0)
    x = np.pad(x, ((need // 2, need - need // 2),) * 2 + ((0, 0),))
    x = np.lib.stride_tricks.sliding_window_view(x, (h, h), (0, 1))[::stride, ::stride]
    groups = x.shape[2] // d
    return p['bias'] + np.concatenate([
      np.einsum('HWdij,ijdE->HWE', a, b)
      for a, b in zip(np.split(x, groups, 2), np.split(w, groups, 3))
    ], -1)  # fmt: skip

  def act(x):
    tanh = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    return 1.7015043497085571 * x * (1 + tanh) / 2

  params, bank = random_params(), pictures()
  x = bank.values[0].reshape(3, 3, 4, 4, 3).swapaxes(1, 2).reshape(12, 12, 3)
  x = conv(x, params['stem_0'], 2)
  for i, stride in ((1, 1), (2, 1), (3, 2)):
    x = conv(act(x), params[f'stem_{i}'], stride)
  # Expected variance before the block: 1; 1 + 0.04, a new stage; 1 + 0.04.
  for name, std, stride in (('stage_0_block_0', 1, 1), ('stage_1_block_0', 1.04**0.5, 2),
                            ('stage_1_block_1', 1.04**0.5, 1)):  # fmt: skip
    p, y = params[name], act(x) / std
    if 'shortcut' in p:
      pooled = y
      if stride == 2:  # 3 x 3 to 2 x 2; what is outside doesn't count
        pooled = np.array([[y[i : i + 2, j : j + 2].mean((0, 1)) for j in (0, 2)]
                           for i in (0, 2)])  # fmt: skip
      x = conv(pooled, p['shortcut'])
    y = conv(act(conv(y, p['conv_0'])), p['conv_1'], stride)
    y = conv(act(conv(act(y), p['conv_2'])), p['conv_3'])
    hidden = y.mean((0, 1)) @ p['se']['down']['kernel'] + p['se']['down']['bias']
    gate = np.maximum(hidden, 0) @ p['se']['up']['kernel'] + p['se']['up']['bias']
    x = x + 0.2 * p['skip_gain'] * y * 2 / (1 + np.exp(-gate))
  want = act(conv(x, params['last'])).reshape(4, -1)
  got = jax.jit(TINY.apply)({'params': params}, bank).values[0]
  assert np.abs(want).max() > 1
  np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * np.abs(want).max())


def test_a_dropped_block_is_passed_by_and_a_kept_one_makes_up_for_it():
  """Each picture has its own draw."""
  block = Block(8, 1, 4, alpha=0.5, beta=1.0, keep=0.5)
  x = np.random.default_rng(0).standard_normal((1, 3, 3, 8)).astype(np.float32)
  x = np.repeat(x, 32, 0)
  made = jax.eval_shape(block.init, dict(params=KEY, dropout=KEY), x)
  rng = np.random.default_rng(0)
  made = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), made)
  added = jax.jit(lambda x: block.clone(keep=1.0).apply(made, x))(x) - x
  got = jax.jit(lambda x, key: block.apply(made, x, rngs={'dropout': key}))(x, KEY) - x
  dropped = ~np.any(got, (1, 2, 3))
  assert 8 <= dropped.sum() <= 24
  np.testing.assert_allclose(got[~dropped], 2 * added[~dropped], atol=1e-5)


def test_blocks_are_dropped_more_often_the_deeper_they_are():
  model, seen = TINY.clone(drop_rate=0.6), []
  params = shapes(model)

  def note(next_call, args, kwargs, context):
    if type(context.module).__name__ == 'Block':
      seen.append(context.module.keep)
    return next_call(*args, **kwargs)

  for train in (True, False):
    with nn.intercept_methods(note):
      run = functools.partial(model.apply, train=train, rngs={'dropout': KEY})
      jax.eval_shape(run, {'params': params}, pictures())
  np.testing.assert_allclose(seen, [1, 0.8, 0.6, 1, 1, 1])


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(activation='gelu_new'), "unknown activation 'gelu_new'; did you mean 'gelu'"),
    (dict(depths=(1,)), r'depths=\(1,\) differ in length'),
    (dict(drop_rate=1.0), r'drop_rate=1.0 is not in \[0, 1\)'),
    (dict(widths=(16, 20)), 'half of width 20 does not divide into groups'),
  ],
)
def test_refuses(change, message):
  with pytest.raises(ValueError, match=message):
    shapes(TINY.clone(**change))
