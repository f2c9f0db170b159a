"""Two processes of two devices each answer their own rows and read all answers."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
from test_vqa import RULE, Model, _data, looks

from mmjax import sharding
from mmjax.eval.vqa import Vqa


def _run():
  mesh = sharding.make_mesh({'data': -1})
  fields = dict(media_rules={'image': RULE}, rows=8, max_new=3, generate=looks)
  return Vqa(_data(), Model(), mesh, sharding.rules_for('dp'), **fields).run({})


@pytest.mark.slow
def test_each_process_has_every_prediction():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  path = os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path])
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': path}
  running = [
    subprocess.Popen(
      [sys.executable, __file__, address, str(i)], env=env, stdout=subprocess.PIPE
    )
    for i in range(2)
  ]
  outputs = [p.communicate(timeout=180)[0].decode() for p in running]
  assert [p.returncode for p in running] == [0, 0]
  want = _run().predictions
  for output in outputs:
    assert json.loads(output.strip().splitlines()[-1]) == want


if __name__ == '__main__':
  import jax

  jax.config.update('jax_num_cpu_devices', 2)
  jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
  print('\n' + json.dumps(_run().predictions))
