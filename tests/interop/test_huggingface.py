import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mmjax import models, sharding
from mmjax.batch import Budget
from mmjax.interop import files, place
from mmjax.interop import huggingface as hf

WIDTHS = dict(
  vocab_size=40, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=4,
  mlp_dim=24,
)  # fmt: skip
LLAMA = dict(WIDTHS, num_kv_heads=2, scale_embedding=False, tie_embeddings=False)
GPT2 = dict(
  WIDTHS, norm='layer', bias='all', gated=False, rotary=False, max_positions=9,
  activation='gelu_tanh', scale_embedding=False, norm_eps=1e-5,
)  # fmt: skip
VIT = dict(
  channels=12, embed_dim=16, num_layers=2, num_heads=4, mlp_dim=24, position_grid=(2, 3)
)
CLIP_VISION = dict(
  VIT, pool='class', patch_bias=False, embedding_norm=True, activation='quick_gelu',
  mean=(122.770938, 116.746013, 104.093736), std=(68.500533, 66.632158, 70.323163),
)  # fmt: skip
CLIP_PATCHES = dict(CLIP_VISION, pool='none', class_token=True, final_norm=False)
SIGLIP_VISION = dict(VIT, pool='map', activation='gelu_tanh')
MODELS = {
  'vit': ('vit', dict(VIT, pool='class', num_classes=3, mean=(1.0, 2.5, 3.123456))),
  'clip_vision_model': ('vit', CLIP_VISION),
  'siglip_vision_model': ('vit', SIGLIP_VISION),
  'clip': (
    'dual',
    dict(
      vision=dict(CLIP_VISION, name='vit'),
      text=dict(GPT2, name='unified', activation='quick_gelu'),
      embed_dim=10, media=(('image', 12),), logit_bias=False,
    ),
  ),
  'siglip': (
    'dual',
    dict(
      vision=dict(SIGLIP_VISION, name='vit'),
      text=dict(
        WIDTHS, name='encoder', num_types=0, embedding_norm=False, post_norm=False,
        activation='gelu_tanh', max_positions=9,
      ),
      embed_dim=16, media=(('image', 12),), image_projection=False, projection_bias=True,
      temperature_init=0.1, bias_init=-10.0, max_scale=1000.0,
    ),
  ),
  'llama': ('unified', LLAMA),
  'qwen2': ('unified', dict(LLAMA, bias='qkv', tie_embeddings=True)),
  'gemma': (
    'unified', dict(WIDTHS, norm='rms_offset', activation='gelu_tanh', head_dim=8)
  ),
  'gpt2': ('unified', GPT2),
  'bert': ('encoder', dict(WIDTHS, pooler=True, mlm_head=True)),
  'resnet': (
    'resnet',
    dict(
      channels=12, image_grid=(16, 16), num_classes=3, stem=8, widths=(16, 32),
      depths=(2, 1), mean=(1.0, 2.5, 3.123456),
    ),
  ),
  'fuyu': (
    'unified',
    dict(
      WIDTHS, norm='layer', bias='all', gated=False, activation='relu2', qk_norm=True,
      rotary_dim=2, rope_base=25_000.0, norm_eps=1e-5, scale_embedding=False,
      tie_embeddings=False, media=(('image', 12),),
    ),
  ),
  'llava': (
    'encoded',
    dict(
      lm=dict(LLAMA, name='unified'),
      vision=dict(CLIP_PATCHES, name='vit'),
      projector=dict(name='mlp'),
      media=(('image', 12),),
    ),
  ),
  'paligemma': (
    'encoded',
    dict(
      lm=dict(WIDTHS, name='unified', norm='rms_offset', activation='gelu_tanh'),
      vision=dict(SIGLIP_VISION, name='vit', pool='none'),
      projector=dict(name='linear'),
      media=(('image', 12),),
    ),
  ),
  'idefics': (
    'flamingo',
    dict(
      lm=dict(WIDTHS, name='unified', scale_embedding=False, tie_embeddings=False,
              extra_words=2),
      vision=dict(CLIP_PATCHES, name='vit', give_class=True),
      resampler=dict(embed_dim=16, num_layers=2, num_heads=2, head_dim=6, mlp_dim=64,
                     num_latents=3, activation='relu', norm_eps=1e-5),
      media=(('image', 12),), marker=39, cross_every=2, cross_heads=4, cross_head_dim=4,
      cross_mlp_dim=24, cross_norm='rms', cross_activation='silu', cross_gated=True,
      cross_qk_norm=True, gate_vector=True,
    ),
  ),
}  # fmt: skip


@functools.cache
def random_model(kind, dtype='float32'):
  """A model and parameters of which no two numbers are equal, in NumPy."""
  name, fields = MODELS[kind]
  shared = dict(param_dtype=dtype)
  model = models.build(name, shared=shared, **fields)
  made = jax.eval_shape(model.init, jax.random.key(0), models.padding(model))['params']
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda x: np.array(rng.normal(size=x.shape), x.dtype), made)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)
  return jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


@pytest.mark.parametrize('kind', sorted(MODELS))
def test_import_of_export_is_bit_equal(kind, tmp_path):
  model, params = random_model(kind)
  hf.export(model, params, tmp_path, max_shard_bytes=10_000)
  assert json.loads((tmp_path / 'config.json').read_text())['model_type'] == kind
  assert len(list(tmp_path.glob('*.safetensors'))) > 1
  again, got = hf.load(tmp_path)
  assert again == model
  assert same(got, params)


@pytest.mark.parametrize('scaling', [('linear', 4.0), ('llama3', 8.0, 1.0, 4.0, 8192.0)])
def test_scaled_rotary_positions_go_out_and_in(scaling, tmp_path):
  model, params = random_model('llama')
  model = model.clone(rope_scaling=scaling)
  hf.export(model, params, tmp_path)
  assert hf.load(tmp_path)[0] == model
  rope = json.loads((tmp_path / 'config.json').read_text())['rope_parameters']
  assert (rope['rope_type'], rope['factor']) == scaling[:2]


@pytest.mark.parametrize('kind', ['llama', 'clip'])
def test_bfloat16_stays_bfloat16(kind, tmp_path):
  model, params = random_model(kind, 'bfloat16')
  hf.export(model, params, tmp_path)
  stored = load_file(tmp_path / 'model.safetensors').values()
  assert {x.dtype.name for x in stored} == {'bfloat16'}
  again, got = hf.load(tmp_path)
  assert same(got, params) and again == model


def test_a_host_reads_only_the_slices_of_its_devices(tmp_path, monkeypatch):
  """On a mesh the numbers are the same, each in its place, read once."""
  model, params = random_model('gpt2')
  hf.export(model, params, tmp_path)
  mesh = sharding.make_mesh({'fsdp': 2, 'tensor': 4})
  rules = sharding.rules_for('fsdp+tensor')
  read = []

  class Slices:
    def __init__(self, x):
      self.x = x

    def __getitem__(self, index):
      found = self.x[index]
      read.append(found.size)
      return found

  plain = files.Source.__getitem__
  monkeypatch.setattr(files.Source, '__getitem__', lambda s, n: Slices(plain(s, n)))
  _, got = hf.load(tmp_path, mesh=mesh, rules=rules)
  assert same(got, params)
  query = got['transformer']['layers']['attention']['query']
  assert query.sharding.shard_shape(query.shape) == (2, 8, 1, 4)
  assert sum(read) == sum(x.size for x in jax.tree.leaves(params))
  assert max(read) <= 40 * 16 / 8


LOADS = """
import re, sys
import jax
from mmjax.interop import huggingface

def most(key):
  return 1000 * int(re.search(key + r':\\s+(\\d+)', open('/proc/self/status').read())[1])

jax.block_until_ready(jax.numpy.ones(3) + 1)
before = most('VmRSS')
_, params = huggingface.load(sys.argv[1])
jax.block_until_ready(params)
print(most('VmHWM') - before, sum(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.slow
def test_the_host_holds_a_small_part_of_a_sharded_file(tmp_path):
  """A first load of 229 MB: less than a quarter of it beyond the parameters themselves.

  On a CPU the parameters are the host's, too; measured is all that the process holds,
  programs that were compiled included.
  """
  fields = dict(
    LLAMA, vocab_size=16_000, embed_dim=512, num_layers=12, num_heads=8, num_kv_heads=8,
    head_dim=64, mlp_dim=1536,
  )  # fmt: skip
  model = models.build('unified', **fields)
  made = jax.eval_shape(model.init, jax.random.key(0), models.padding(model))['params']
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), made)
  size = sum(x.nbytes for x in jax.tree.leaves(params))
  hf.export(model, params, tmp_path, max_shard_bytes=size // 8)
  ran = subprocess.run(
    [sys.executable, '-c', LOADS, tmp_path],
    capture_output=True, text=True, check=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'},
  )  # fmt: skip
  grown, loaded = map(int, ran.stdout.split())
  assert loaded == size == 229_165_056
  assert grown - size < size / 4, f'{grown - size:,} more than {size:,}'


@pytest.mark.parametrize('kind', ['llama', 'gpt2'])
def test_what_is_written_in_blocks_is_the_same(kind, tmp_path, monkeypatch):
  """Layer by layer, and some rows at a time, of which the last overlap."""
  model, params = random_model(kind)
  hf.export(model, params, tmp_path)
  monkeypatch.setattr(place, 'HOST', 0)
  monkeypatch.setattr(place, '_BLOCK', 7 * 16 * 4)
  assert same(hf.load(tmp_path)[1], params)
  mesh = sharding.make_mesh({'fsdp': 4, 'tensor': 2})
  got = hf.load(tmp_path, mesh=mesh, rules=sharding.rules_for('fsdp+tensor'))[1]
  assert same(got, params)


def test_slices_of_a_tensor(tmp_path, monkeypatch):
  x = np.random.default_rng(0).normal(size=(7, 5, 3)).astype('f4')
  (tmp_path / 'config.json').write_text('{}')
  save_file(
    {'x': x, 'y': x[0, 0], 'z': x[0, 0, :1].reshape(())}, tmp_path / 'model.safetensors'
  )
  source = files.Source(tmp_path)
  monkeypatch.setattr(files, '_CHUNK', 31)
  for index in np.s_[:, :, :], np.s_[2:5, :, :], np.s_[1:7, 2:4, :], np.s_[3:3, :, 1:2]:
    np.testing.assert_array_equal(source['x'][index], x[index])
  np.testing.assert_array_equal(source['y'][1:3,], x[0, 0, 1:3])
  assert source['z'][()] == x[0, 0, 0]


@pytest.fixture(scope='module')
def stored(tmp_path_factory):
  path = tmp_path_factory.mktemp('llama')
  model, params = random_model('llama')
  hf.export(model, params, path)
  return path


def edited(stored, tmp_path, config=None, tensors=None):
  """A copy of the directory with another config.json or other tensors."""
  path = pathlib.Path(shutil.copytree(stored, tmp_path / 'copy'))
  if config is not None:
    found = json.loads((path / 'config.json').read_text())
    (path / 'config.json').write_text(json.dumps({**found, **config}))
  if tensors is not None:
    found = load_file(path / 'model.safetensors')
    tensors(found)
    save_file(found, path / 'model.safetensors')
  return path


def refuses(path, message, **options):
  with pytest.raises(ValueError, match=message) as error:
    hf.load(path, **options)
  assert '\n' not in str(error.value)


Q = 'model.layers.0.self_attn.q_proj.weight'


@pytest.mark.parametrize(
  ('edit', 'message'),
  [
    (
      lambda t: t.update({Q.replace('q_proj', 'qproj'): t.pop(Q)}),
      r'q_proj.weight is missing \(nearest: model.layers.0.self_attn.qproj.weight\)',
    ),
    (
      lambda t: t.update({Q.replace('weight', 'bias'): t['model.norm.weight']}),
      r'q_proj.bias is extra \(nearest: model.layers.0.self_attn.q_proj.weight\)',
    ),
    (lambda t: t.update({Q: t[Q][:8]}), r'q_proj.weight is \[8, 16\], not \[16, 16\]'),
    (
      lambda t: t.update({Q: t[Q].astype('i4')}),
      'q_proj.weight is of type I32, not one of F64, F32, F16, BF16',
    ),
    (
      lambda t: t.update({Q: t[Q].astype('f2')}),
      'q_proj.weight is of type F16, config.json says float32; give param_dtype',
    ),
    (
      lambda t: t.pop('lm_head.weight'),
      'lm_head.weight is missing, and config.json does not tie it',
    ),
  ],
)
def test_tensors_that_do_not_fit(stored, tmp_path, edit, message):
  refuses(edited(stored, tmp_path, tensors=edit), message)


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    (
      dict(model_type='lama'),
      r"unknown architecture 'lama'; did you mean 'llama'\? \(choices: bert, clip, ",
    ),
    (dict(dtype='float31'), "unknown dtype 'float31'"),
    (dict(hidden_act='sillu'), "unknown hidden_act 'sillu'; did you mean 'silu'"),
    (
      dict(rope_parameters=dict(rope_type='yarn', rope_theta=1e4)),
      r"rope_type='yarn' is not supported \(choices: default, linear, llama3\)",
    ),
    (dict(attention_bias=True), 'attention_bias=True is not supported, only False'),
  ],
)
def test_configs_that_are_not_ours(stored, tmp_path, config, message):
  refuses(edited(stored, tmp_path, config=config), message)


def test_a_config_without_a_width(stored, tmp_path):
  path = edited(stored, tmp_path)
  config = json.loads((path / 'config.json').read_text())
  del config['hidden_size']
  (path / 'config.json').write_text(json.dumps(config))
  refuses(path, "config.json has no 'hidden_size'")


def test_directories_that_are_not_whole(stored, tmp_path):
  refuses(tmp_path / 'nowhere', 'nowhere: no such directory')
  path = edited(stored, tmp_path)
  weights = path / 'model.safetensors'
  whole = weights.read_bytes()
  weights.write_bytes(whole[:-5])
  refuses(path, 'model.safetensors is no whole safetensors file: .*incomplete')
  weights.write_bytes(b'')
  refuses(path, 'model.safetensors is no whole safetensors file')
  weights.unlink()
  refuses(path, 'copy: no .safetensors file')
  (path / 'pytorch_model.bin').write_bytes(b'')
  refuses(path, 'pytorch_model.bin is a pickle, which can run any code')
  refuses(path / 'pytorch_model.bin', 'pytorch_model.bin is a pickle')
  for name in 'ab':
    (path / f'{name}.safetensors').write_bytes(whole)
  refuses(path, '2 .safetensors files, but no model.safetensors.index.json')
  index = path / 'model.safetensors.index.json'
  for text, message in (
    ('{', 'index.json is no JSON'),
    ('[]', 'index.json: it must hold an object'),
    ('{}', 'it has no "weight_map"'),
    ('{"weight_map": {"x": "c.safetensors"}}', 'names c.safetensors, which is not there'),
    ('{"weight_map": {"x": "../c.safetensors"}}', 'is not in the directory'),
  ):
    index.write_text(text)
    refuses(path, message)
  (path / 'config.json').unlink()
  refuses(path, 'copy: no config.json')


def test_what_is_asked_for_is_done_or_refused(stored):
  model, params = random_model('llama')
  again, got = hf.load(stored / 'model.safetensors', param_dtype='bfloat16', chunk=8)
  assert again == model.clone(param_dtype='bfloat16', chunk=8)
  assert same(got, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
  refuses(stored, 'layers come stacked', scan=False)
  refuses(stored, "no field 'chunks'; did you mean 'chunk'", chunks=8)
  refuses(stored, 'no weights for embed/image/', media=(('image', 6),))


def test_export_refuses(stored, tmp_path):
  model, params = random_model('llama')
  cases = [
    (model.clone(norm='layer'), params, 'not the parameters of the model: .*norm/bias'),
    (model, {**params, 'head': params['head'][1:]}, 'parameters of the model: head'),
    (model.clone(scan=False), params, 'take the scanned model'),
    (model, jax.tree.map(lambda x: x.astype('i4'), params), 'one floating type, not'),
  ]
  for m, p, message in cases:
    with pytest.raises(ValueError, match=message):
      hf.export(m, p, tmp_path)

  class Far(np.ndarray):
    is_fully_addressable = False

  with pytest.raises(ValueError, match='head is spread over processes; gather it'):
    hf.export(model, {**params, 'head': params['head'].view(Far)}, tmp_path)
  odd = model.clone(qk_norm=True)
  made = jax.eval_shape(odd.init, jax.random.key(0), Budget(2, 1).empty(1))['params']
  with pytest.raises(ValueError, match=r'llama \(qk_norm=True, not False\)'):
    hf.export(odd, made, tmp_path)
  with pytest.raises(ValueError, match='already has model.safetensors'):
    hf.export(model, params, stored)
  assert not list(tmp_path.iterdir())


def test_every_family_is_tested():
  assert set(MODELS) == set(hf.FAMILIES)
  assert all(dataclasses.is_dataclass(f) for f in hf.FAMILIES.values())


@pytest.fixture(scope='module')
def tower(tmp_path_factory):
  path = tmp_path_factory.mktemp('clip_vision_model')
  hf.export(*random_model('clip_vision_model'), path)
  return path


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    (dict(num_channels=1), 'num_channels=1 is not supported, only 3'),
    (dict(patch_size=[2, 4]), 'patch_size=2 is not supported, only 4'),
  ],
)
def test_images_that_are_not_ours(tower, tmp_path, config, message):
  refuses(edited(tower, tmp_path, config=config), message)


def test_colours_stand_in_a_file_of_their_own(tower, tmp_path):
  path = edited(tower, tmp_path)
  said = path / 'preprocessor_config.json'
  assert 'preprocessor_config' not in json.loads((path / 'config.json').read_text())
  said.write_text(json.dumps(dict(image_mean=[0.1, 0.2, 0.3], image_std=[1, 1, 1])))
  model, _ = hf.load(path)
  assert model.mean == (25.5, 51.0, 76.5) and model.std == (255.0, 255.0, 255.0)
  said.unlink()
  assert hf.load(path)[0] == random_model('clip_vision_model')[0]
  said.write_text('{')
  refuses(path, 'preprocessor_config.json is no JSON')


def test_a_part_of_a_tower_leaves_the_rest_where_it_is(tower, tmp_path):
  part = dict(pool='none', class_token=True, num_layers=1, final_norm=False)
  model, params = hf.load(tower, **part)
  whole = dict(random_model('clip_vision_model')[1])
  layers = jax.tree.map(lambda x: x[:1], whole.pop('transformer')['layers'])
  assert same(params, {**whole, 'transformer': dict(layers=layers)})
  refuses(tower, 'encoder.layers.1.* is extra', num_layers=1)  # with a final norm
  odd = model.clone(channels=15)
  made = jax.eval_shape(odd.init, jax.random.key(0), models.padding(odd))['params']
  with pytest.raises(ValueError, match='15 channels are no square patch of three'):
    hf.export(odd, made, tmp_path)


@pytest.mark.parametrize('kind', ['clip', 'siglip'])
def test_towers_go_to_their_places_on_a_mesh(kind, tmp_path):
  model, params = random_model(kind)
  hf.export(model, params, tmp_path)
  mesh = sharding.make_mesh({'fsdp': 2, 'tensor': 4})
  _, got = hf.load(tmp_path, mesh=mesh, rules=sharding.rules_for('fsdp+tensor'))
  assert same(got, params)
  patch = got['vision']['patch']['kernel']
  assert patch.sharding.shard_shape(patch.shape) == (12, 8)


@pytest.mark.parametrize('kind', ['clip', 'siglip'])
def test_a_dual_encoder_of_other_parts_is_none_of_theirs(kind):
  model, _ = random_model(kind)
  with pytest.raises(ValueError, match='its vision is no Vit'):
    hf.FAMILIES[kind].config(model.clone(vision=model.text))
