"""Two processes of two devices each load their own rows and read all losses."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
from test_gain import documents, evaluator

from mmjax.data.store import Dataset
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.data.writer import Writer


class _Broken(Dataset):
  """A document that only the process that loads it finds broken."""

  def __getitem__(self, i):
    document = super().__getitem__(i)
    if i == 3:
      span = document.spans[1]
      object.__setattr__(span, 'content', b'no image')
    return document


def _run(path):
  import jax

  return evaluator(_Broken(path, 'test'), devices=jax.device_count()).run({})


@pytest.mark.slow
def test_each_process_has_every_loss(tmp_path):
  with Writer(tmp_path / 'data', ByteTokenizer()) as writer:
    for document in documents(21, 7):
      writer.add('test', document)
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  path = os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path])
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': path}
  command = [sys.executable, __file__, str(tmp_path / 'data'), address]
  running = [
    subprocess.Popen([*command, str(i)], env=env, stdout=subprocess.PIPE)
    for i in range(2)
  ]
  outputs = [p.communicate(timeout=180)[0].decode() for p in running]
  assert [p.returncode for p in running] == [0, 0]
  want = _run(tmp_path / 'data')
  assert 1 <= want.metrics['gain/left_out'] <= 2
  for output in outputs:
    assert json.loads(output.strip().splitlines()[-1]) == want.predictions


if __name__ == '__main__':
  import jax

  jax.config.update('jax_num_cpu_devices', 2)
  jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
  print('\n' + json.dumps(_run(sys.argv[1]).predictions))
