"""What is heavy is imported where it is used: nobody waits for what he doesn't use.

  import mmjax.models      needs jax and flax, and nothing that reads data
  import mmjax.train.loop  all of a run, and nothing that only some runs use

Asked is what is in `sys.modules`, not how long it took.
"""

import json
import pathlib
import pkgutil
import subprocess
import sys

import mmjax

ROOT = pathlib.Path(__file__).parents[1]
# Nobody needs them before he prepares data, restores, reads, draws or writes a page.
NEVER = {'array_record', 'av', 'bracex', 'cv2', 'cykooz_resizer', 'easy_vqa', 'fsspec',
         'gguf', 'grain', 'jinja2', 'lxml', 'matplotlib', 'orbax', 'pandas', 'pyarrow',
         'safetensors', 'scipy', 'sentencepiece', 'soundfile', 'tensorboardX',
         'tensorflow', 'tensorflow_datasets', 'tokenizers', 'torch',
         'jax.experimental.pallas', 'jax.experimental.topologies'}  # fmt: skip
# Of training and data, which who only uses a model has no use for.
USERS = {'PIL', 'grain', 'ml_collections', 'optax', 'pyspng', 'simplejpeg', 'tqdm'}
# In this order, each on top of those before.
STAGES = {
  'mmjax.batch': NEVER | USERS | {'flax'},
  'mmjax.ops': NEVER | USERS,
  'mmjax.models': NEVER | USERS,
  'mmjax.generate': NEVER | USERS,
  'mmjax.interop.huggingface': NEVER | USERS,
  'mmjax.data.pipeline': NEVER | {'optax'},
  'mmjax.eval': NEVER,
  'mmjax.train.loop': NEVER,
  'mmjax.plan': NEVER,
}


def test_heavy_libraries_wait_until_they_are_used():
  rooms = {
    stage: sorted(
      f'{stage}.{m.name}'
      for m in pkgutil.iter_modules([str(ROOT / stage.replace('.', '/'))])
      if not m.ispkg and m.name not in ('__main__', 'inspect')
    )
    for stage in STAGES
  }
  code = (
    'import importlib, json, sys\n'
    f'for stage, modules in {rooms!r}.items():\n'
    '  for name in [stage, *modules]:\n'
    '    importlib.import_module(name)\n'
    '  print(json.dumps([stage, sorted(sys.modules)]))\n'
  )
  out = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
  ).stdout
  seen = dict(map(json.loads, out.splitlines()))
  assert list(seen) == list(STAGES)
  found = {stage: sorted(STAGES[stage] & set(names)) for stage, names in seen.items()}
  assert found == dict.fromkeys(STAGES, [])
  # The test would find something: what a run needs is there.
  assert {'jax', 'optax', 'ml_collections', mmjax.__name__} <= set(seen['mmjax.plan'])
