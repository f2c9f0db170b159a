"""Parts from files: bit by bit where they fit, fitted where they may, refused else."""

import sys
import types

import flax.traverse_util
import jax
import numpy as np
import pytest

from mmjax import models, sharding
from mmjax.interop import huggingface as hf
from mmjax.interop import pretrained, surgery

FIELDS = dict(
  vocab_size=40, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
  mlp_dim=24, scale_embedding=False, tie_embeddings=False,
)  # fmt: skip
GPT2 = dict(
  FIELDS, num_kv_heads=4, norm='layer', bias='all', gated=False, rotary=False,
  max_positions=9, activation='gelu_tanh', norm_eps=1e-5, tie_embeddings=True,
)  # fmt: skip


def random_params(model):
  rng = np.random.default_rng(0)
  made = jax.eval_shape(model.init, jax.random.key(0), models.padding(model))['params']
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), made)


def abstract(model):
  return jax.eval_shape(model.init, jax.random.key(0), models.padding(model))['params']


def stored(tmp_path_factory, name, fields):
  model = models.build('unified', **fields)
  params = random_params(model)
  path = tmp_path_factory.mktemp(name)
  hf.export(model, params, path)
  return model, params, path


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
  return stored(tmp_path_factory, 'llama', FIELDS)


@pytest.fixture(scope='module')
def gpt2(tmp_path_factory):
  return stored(tmp_path_factory, 'gpt2', GPT2)


def flat(tree):
  return flax.traverse_util.flatten_dict(tree, sep='/')


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_what_fits_comes_bit_by_bit_and_to_its_place(llama):
  model, params, path = llama
  same(pretrained.load_into(model, abstract(model), str(path)), params)
  mesh = sharding.make_mesh({'fsdp': 2, 'tensor': 2}, jax.devices()[:4])
  rules = sharding.rules_for('fsdp+tensor')
  names = sharding.axis_names(model.init, jax.random.key(0), models.padding(model))
  places = sharding.shardings(names['params'], params, mesh, rules)
  shapes = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, 'bfloat16', sharding=s), params, places
  )
  got = pretrained.load_into(model.clone(remat='full'), shapes, str(path))
  same(got, jax.tree.map(lambda x: x.astype('bfloat16'), params))
  there = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), got, places)
  assert all(jax.tree.leaves(there))


def test_new_words_are_added_where_asked(llama):
  model, params, path = llama
  larger = model.clone(vocab_size=48)
  refuses(larger, path, 'has 40 words, the model 48; grow=True adds new ones')
  got = pretrained.load_into(larger, abstract(larger), str(path), grow=True, seed=1)
  assert got['embed']['text'].shape == (48, 16) and got['head'].shape == (16, 48)
  np.testing.assert_array_equal(got['embed']['text'][:40], params['embed']['text'])
  np.testing.assert_array_equal(got['head'][:, :40], params['head'])
  same(got['transformer'], params['transformer'])
  other = pretrained.load_into(larger, abstract(larger), str(path), grow=True, seed=2)
  assert (got['head'][:, 40:] != other['head'][:, 40:]).any()
  refuses(model.clone(vocab_size=39), path, 'has 40 words, the model only 39; set its')


def test_positions_are_cut(gpt2):
  model, params, path = gpt2
  shorter = model.clone(max_positions=5)
  got = pretrained.load_into(shorter, abstract(shorter), str(path))
  np.testing.assert_array_equal(
    got['embed']['positions'], params['embed']['positions'][:5]
  )
  longer = model.clone(max_positions=12)
  refuses(longer, path, r'embed/positions is \[9, 16\], the model wants \[12, 16\]')


def test_a_tower_of_a_larger_model_on_another_grid(tmp_path):
  """CLIP's vision encoder, for pictures of 4 x 4 patches and not of 2 x 3."""
  vision = dict(
    name='vit', embed_dim=16, num_layers=1, num_heads=4, mlp_dim=24, pool='class',
    position_grid=(2, 3), patch_bias=False, embedding_norm=True, activation='quick_gelu',
  )  # fmt: skip
  text = dict(GPT2, name='unified', activation='quick_gelu')
  media = [['image', 12]]
  clip = models.build(
    'dual', vision=vision, text=text, embed_dim=10, media=media, logit_bias=False
  )
  params = random_params(clip)
  hf.export(clip, params, tmp_path)
  fields = {**vision, 'position_grid': (4, 4)}
  vit = models.build(**fields, channels=12, mean=clip.vision.mean, std=clip.vision.std)
  got = pretrained.load_into(vit, abstract(vit), str(tmp_path), take='vision')
  table, old = got.pop('position'), params['vision'].pop('position')
  same(got, params['vision'])
  np.testing.assert_array_equal(table[0], old[0])
  np.testing.assert_allclose(table, surgery.resize_positions(old, (2, 3), (4, 4)))
  refuses(vit, tmp_path, 'holds Dual, the part is Vit')
  refuses(vit, tmp_path, r"no part 'visoin'; did you mean 'vision'\?", take='visoin')


def test_parts_may_be_left_out_by_pattern(llama):
  model, params, path = llama
  seeing = model.clone(media=(('image', 6),))
  refuses(seeing, path, r'it lacks embed/image/bias, embed/image/kernel \(see allow_mis')
  allowed = dict(allow_missing=('embed/image/*',))
  refuses(seeing, path, 'has no embed/image/bias; give `initial`', **allowed)
  initial = random_params(seeing)
  got = pretrained.load_into(
    seeing, abstract(seeing), str(path), initial=initial, **allowed
  )
  assert got['embed']['image'] is not None
  same(got['embed']['image'], initial['embed']['image'])
  same(got['transformer'], params['transformer'])

  tied = model.clone(tie_embeddings=True)
  refuses(tied, path, r'the model lacks head \(see ignore\)')
  got = pretrained.load_into(tied, abstract(tied), str(path), ignore=('head',))
  same(got, {k: v for k, v in params.items() if k != 'head'})
  refuses(
    model, path, r"ignore='haed' matches no parameter \(there are: ", ignore=['haed']
  )
  refuses(model, path, "allow_missing='x' matches no par", allow_missing=['x'])


def refuses(model, path, message, **options):
  with pytest.raises(ValueError, match=message) as error:
    pretrained.load_into(model, abstract(model), str(path), **options)
  assert '\n' not in str(error.value)


def test_another_architecture_is_refused(llama, gpt2):
  model, _, path = llama
  refuses(model.clone(num_layers=3), path, 'another model: here num_layers=3, not 2')
  odd = model.clone(rope_base=5.0, activation='gelu')
  refuses(odd, path, "here activation='gelu', not 'silu'; here rope_base=5.0, not 10000")
  refuses(model.clone(scan=False), path, 'the module must have scan=True')
  refuses(gpt2[0], path, "here norm='layer', not 'rms'")
  encoder = models.build('encoder', vocab_size=40)
  refuses(encoder, path, 'holds Unified, the part is Encoder')
  refuses(model, 'nowhere', 'nowhere: no such directory')
  refuses(model, 'package:no_such_package/x', 'no package')


def test_a_pth_file_is_read_by_its_own_reader(tmp_path, monkeypatch):
  model = models.build('unified', **FIELDS)
  params = random_params(model)
  reader = types.SimpleNamespace(load_efficientnet=lambda path, module: params)
  monkeypatch.setitem(sys.modules, 'mmjax.interop.efficientnet', reader)
  same(pretrained.load_into(model, abstract(model), str(tmp_path / 'x.pth')), params)
  wide = model.clone(vocab_size=41)
  message = r'embed/text is \[40, 16\], the model wants \[41, 16\]'
  refuses(wide, tmp_path / 'x.pth', message)


def test_parts_of_a_model_by_name(llama):
  _, params, path = llama
  model = models.build(
    'flamingo',
    lm=dict(name='unified', **FIELDS),
    vision=dict(name='vit', embed_dim=8, num_layers=1, num_heads=2, mlp_dim=8),
    resampler=dict(num_latents=2, embed_dim=8, num_layers=1, num_heads=2),
    media=[['image', 6]],
  )
  shapes = abstract(model)
  got = pretrained.load_parts(model, shapes, {'lm': str(path)})
  assert {k.partition('/')[0] for k in got} == {'lm'}
  same({k.removeprefix('lm/'): x for k, x in got.items()}, flat(params))
  grown = dict(spec=str(path), grow=True)
  same(pretrained.load_parts(model, shapes, {'lm': grown}), got)
  whole = models.build('unified', **FIELDS)
  same(pretrained.load_parts(whole, params, {'model': str(path)}), flat(params))
  for init, message in (
    ({'visoin': 'x'}, r"no part 'visoin'; did you mean 'vision'\? \(choices: lm, model,"),
    ({'lm': 'nowhere'}, 'init.lm: nowhere: no such directory'),
    ({'lm': {'grow': True}}, 'init.lm needs a spec'),
    ({'lm': {'spec': 'x', 'gorw': 1}}, "init.lm has no 'gorw'; did you mean 'grow'"),
  ):
    with pytest.raises(ValueError, match=message):
      pretrained.load_parts(model, shapes, init)
