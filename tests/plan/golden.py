"""What three tiny steps cost: FLOPs and bytes, one line each in golden.json, made by

  python tests/plan/golden.py [CASE ...]

from what the program and the compilers say now. Look at what changed before it is
committed: a number that grew is a regression until it is explained.

  products   FLOPs of the products in the jaxpr; no compiler is asked
  cpu        FLOPs (not of products alone) and bytes of kernels, `cost_analysis`
  v5e        FLOPs, bytes, wire, kernels, HBM of a chip of v5e:2x2, `plan.readout`

FLOPs of the jaxpr are the same everywhere. What XLA makes of a step differs from version
to version, so its numbers stand under the version they were read with.
"""

import importlib.util
import json
import pathlib
import sys

import jax
from ml_collections import ConfigDict

from mmjax.plan import topology
from mmjax.plan.compile import lower, plan
from mmjax.plan.flops import flops
from mmjax.train import build
from mmjax.train import config as config_lib

FILE = pathlib.Path(__file__).with_suffix('.json')
CHIPS = 'v5e:2x2'
# That a number may be off, as a share of it.
SHARES = dict(products=0.01, flops=0.01, bytes=0.05, wire=0.05, hbm=0.05, kernels=0.05)

_LM = dict(num_heads=4, num_kv_heads=2, head_dim=32, embed_dim=128)
_VIT = dict(num_layers=1, num_heads=4, mlp_dim=256, embed_dim=128, position_grid=(4, 4))
_ENCODER = dict(mlp_dim=256, max_positions=128, num_types=0, post_norm=False)
MODELS = {
  'unified': dict(name='unified', num_layers=2, mlp_dim=256, **_LM),
  'flamingo': dict(
    name='flamingo',
    lm=dict(name='unified', num_layers=2, mlp_dim=256, **_LM),
    vision=dict(name='vit', **_VIT),
    resampler=dict(embed_dim=128, num_layers=1, num_heads=4, num_latents=16),
    cross_every=2,
  ),
  'dual': dict(
    name='dual',
    embed_dim=128,
    vision=dict(name='vit', pool='mean', **_VIT),
    text=dict(name='encoder', num_layers=1, **_ENCODER, **_LM),
  ),
}


def load(name, chip=False, **changed):
  """A case's config: float32, layers one by one; on chips bfloat16, scanned, FSDP.

  Args:
    name: of `MODELS`.
    chip: for chips, not for one device of a CPU.
    **changed: 'data.budget.targets' = 256 and the like, as an override says it.
  """
  dtype = dict(dtype='bfloat16' if chip else 'float32')
  how = {'resampler': dtype, None: dtype | dict(scan=chip)}
  model = {
    k: {**v, **how.get(k, how[None])} if isinstance(v, dict) else v
    for k, v in MODELS[name].items()
  }
  given = dict(
    data=dict(
      source='none', path='none', rows=8, vocab_size=1024,
      image=dict(patch=8, resize='fixed', size=32),
      budget=dict(stream=256, targets=64, image=dict(patches=64, items=4)),
    ),
    model=model | (how[None] if name == 'unified' else {}),
    optim=dict(name='adamw', learning_rate=1e-3, weight_decay=0.1, clip_norm=1.0),
    sharding=dict(preset='dp', max_replicated=1.0),
    train=dict(steps=4, task='contrastive' if name == 'dual' else 'next_token'),
  )  # fmt: skip
  if name == 'dual':
    given['data']['budget'] = dict(stream=64, targets=64, image=dict(patches=64, items=4))
  if chip:
    given['optim']['grad_dtype'] = 'bfloat16'
    given['sharding'] |= dict(preset='fsdp', mesh=dict(data=1, fsdp=-1))
  config = config_lib.resolve(ConfigDict(given))
  config.update_from_flattened_dict(changed)
  config_lib.check(config)
  return config


def products(config):
  """FLOPs of the products of a step, counted in its jaxpr."""
  parts = build.build(config, config.data.vocab_size, jax.devices()[:1])
  step = parts.step(build.step_rng(config))
  return flops(step, parts.abstract, parts.batch_shapes(config.data.rows))


def cpu(config):
  """What XLA makes of the step for one device of a CPU."""
  _, lowered = lower(config, jax.devices()[:1])
  found = lowered.compile().cost_analysis()
  return {'flops': int(found['flops']), 'bytes': int(found['bytes accessed'])}


def chip(config):
  """What libtpu makes of the step, on one chip of `CHIPS`."""
  read = plan(config, topology.parse(CHIPS)).readout
  return {
    'flops': read.flops, 'bytes': read.hbm_bytes, 'wire': read.wire_bytes,
    'kernels': read.kernels, 'hbm': read.hbm_peak,
  }  # fmt: skip


def off(now, golden):
  """What isn't what it was: {key: (now, then)}."""
  return {
    key: (now[key], then)
    for key, then in golden.items()
    if abs(now[key] - then) > SHARES[key] * then
  }


def line():
  """The version of JAX as far as its compilers go: '0.10'."""
  return '.'.join(jax.__version__.split('.')[:2])


def main(names):
  golden = json.loads(FILE.read_text()) if FILE.exists() else {}
  for name in names or MODELS:
    made = golden.setdefault(name, {'cpu': {}, 'v5e': {}})
    made['products'] = products(load(name))
    made['cpu'][line()] = cpu(load(name))
    if importlib.util.find_spec('libtpu'):
      made['v5e'][line()] = chip(load(name, chip=True))
    print(name, made, flush=True)
    ordered = {n: golden[n] for n in MODELS if n in golden}
    FILE.write_text(json.dumps(ordered, indent=1) + '\n')


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')
  main(sys.argv[1:])
