"""Checkpoints are whole or not there, and refuse what isn't theirs."""

import gc
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.train import checkpoint as lib
from mmjax.train.checkpoint import CheckpointError, Checkpoints
from mmjax.train.state import TrainState

# A read that TensorStore gave up calls back into an event loop that is gone.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


@pytest.fixture(autouse=True)
def _sweep():
  yield
  gc.collect()


def assert_bits(one, other):
  one, other = jax.device_get((one, other))
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


@pytest.fixture(scope='module')
def written(toy, toy_batch, tmp_path_factory):
  run = toy(name='adamw', ema=0.5, freeze=('bias',))
  directory = tmp_path_factory.mktemp('written')
  states = {}
  checkpoints = Checkpoints(directory, keep=3)
  for step in (1, 2, 3):
    run(toy_batch(seed=step))
    checkpoints.save(run.state, step, {'note': f'step {step}'})
    # Copied, since the next step writes over what it was given.
    states[step] = jax.tree.map(np.array, jax.device_get(run.state))
  checkpoints.close()
  return run, states, directory


@pytest.fixture
def saved(written, tmp_path):
  """(run, states by step, a directory of our own) with steps 1, 2 and 3."""
  run, states, directory = written
  shutil.copytree(directory, tmp_path / 'copy')
  return run, states, tmp_path / 'copy'


def data_file(directory) -> pathlib.Path:
  """The largest file that holds numbers."""
  return max(directory.rglob('d/*'), key=lambda p: p.stat().st_size)


def test_restores_bits_although_the_step_donates(saved):
  run, states, directory = saved
  state, meta = Checkpoints(directory).restore(run.abstract)
  assert_bits(state, states[3])
  assert meta['note'] == 'step 3' and meta['step'] == 3


def test_parameters_alone_are_the_average(saved):
  run, states, directory = saved
  checkpoints = Checkpoints(directory, read_only=True)
  params, meta = checkpoints.restore_params(run.abstract.params)
  assert_bits(params, states[3].eval_params())
  assert not np.array_equal(params['up'], states[3].params['up'])
  params, meta = checkpoints.restore_params(run.abstract.params, step=2)
  assert meta['step'] == 2
  assert_bits(params, states[2].eval_params())
  with pytest.raises(CheckpointError, match=r'no checkpoint of step 7.*\[1, 2, 3\]'):
    checkpoints.restore_params(run.abstract.params, step=7)


def test_nothing_there(tmp_path, toy):
  abstract = toy().abstract
  assert Checkpoints(tmp_path).restore(abstract) is None
  with pytest.raises(CheckpointError, match='no checkpoint in'):
    Checkpoints(tmp_path, read_only=True).restore_params(abstract.params)
  with pytest.raises(CheckpointError, match='no checkpoints at'):
    Checkpoints(tmp_path / 'x', read_only=True)


def test_keeps_the_newest(toy, tmp_path):
  run = toy()
  checkpoints = Checkpoints(tmp_path, keep=2)
  for step in range(5):
    checkpoints.save(run.state, step, {})
  checkpoints.save(run.state, 4, {})  # a second time: nothing to do
  checkpoints.wait()
  assert checkpoints.steps() == [3, 4]


def test_another_mesh(toy, toy_batch, tmp_path):
  run = toy(name='adamw', devices=4, preset='fsdp')
  run(toy_batch())
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(run.state, 1, {})
  checkpoints.wait()
  for other in (toy(name='adamw'), toy(name='adamw', devices=2, preset='fsdp')):
    state, _ = checkpoints.restore(other.abstract)
    assert_bits(state, run.state)
    for leaf, want in zip(jax.tree.leaves(state), jax.tree.leaves(other.abstract)):
      assert leaf.sharding == want.sharding


@pytest.mark.parametrize('damage', ['cut', 'gone', 'no meta data'])
def test_goes_back_behind_a_damaged_one(saved, caplog, damage):
  run, states, directory = saved
  if damage == 'cut':
    file = data_file(directory / '3' / 'optimizer')
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  elif damage == 'gone':
    data_file(directory / '3' / 'params').unlink()
  else:
    (directory / '3' / 'meta' / 'metadata').write_text('{"fingerp')
  checkpoints = Checkpoints(directory)
  state, _ = checkpoints.restore(run.abstract)
  assert_bits(state, states[2])
  assert 'checkpoint of step 3 is damaged' in caplog.text
  assert 'going back to step 2' in caplog.text
  # The place of step 3 is free again.
  assert checkpoints.steps() == [1, 2]
  checkpoints.save(run.state, 3, {})
  checkpoints.wait()
  assert checkpoints.steps() == [1, 2, 3]
  assert (directory / 'damaged-3').is_dir()


def test_a_turned_byte_is_noticed(tmp_path, caplog):
  """A flipped bit inside an array passes every check of the format, not ours."""
  zero = jnp.zeros((), jnp.int32)

  def state(seed):
    big = np.random.default_rng(seed).normal(size=(300, 300)).astype(np.float32)
    return TrainState(zero, {'big': jax.device_put(big)}, (), None, zero, zero)

  checkpoints = Checkpoints(tmp_path)
  for step in (1, 2):
    checkpoints.save(state(step), step, {})
  checkpoints.wait()
  file = data_file(tmp_path / '2' / 'params')
  raw = bytearray(file.read_bytes())
  assert len(raw) > 250_000
  raw[150_000] ^= 1
  file.write_bytes(raw)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
  )
  restored, _ = Checkpoints(tmp_path).restore(abstract)
  assert_bits(restored, state(1))
  assert 'params/big are not those that were saved' in caplog.text


def test_all_damaged_is_an_error_not_a_fresh_start(saved):
  run, _, directory = saved
  for step in (1, 2, 3):
    data_file(directory / str(step) / 'params').write_bytes(b'')
  with pytest.raises(CheckpointError, match='no whole checkpoint in .*step 3: .*step 1'):
    Checkpoints(directory).restore(run.abstract)


def test_half_written_is_not_seen(saved):
  run, states, directory = saved
  (directory / '3').rename(directory / '3.orbax-checkpoint-tmp')
  checkpoints = Checkpoints(directory)
  assert checkpoints.steps() == [1, 2]
  assert_bits(checkpoints.restore(run.abstract)[0], states[2])


def test_another_architecture_lists_everything(saved, toy):
  _, _, directory = saved
  other = toy(name='lion').abstract
  shapes = {**other.params, 'extra': other.params['bias']}
  shapes['up'] = jax.ShapeDtypeStruct((4, 16), np.float32, sharding=shapes['up'].sharding)
  del shapes['down']
  with pytest.raises(CheckpointError) as caught:
    Checkpoints(directory, read_only=True).restore_params(shapes)
  message = str(caught.value)
  assert '\n' not in message
  assert 'missing params/extra' in message
  assert 'extra ema/down, params/down' in message
  assert 'params/up is float32[4,8], not float32[4,16]' in message
  with pytest.raises(CheckpointError, match='missing .*mu/bias; extra .*nu/up'):
    Checkpoints(directory).restore(other)


def test_refusal_comes_before_reading(saved):
  run, _, directory = saved

  def refuse(meta):
    raise ValueError(f'not {meta["note"]}')

  with pytest.raises(ValueError, match='not step 3'):
    Checkpoints(directory).restore(run.abstract, refuse)


FULL_DISK = """
import resource, sys
import jax, jax.numpy as jnp, numpy as np
from mmjax.train.checkpoint import CheckpointError, Checkpoints
from mmjax.train.log import logging_to
from mmjax.train.state import TrainState

def state(seed):
  zero = jnp.zeros((), jnp.int32)
  w = np.random.default_rng(seed).normal(size=(100, 100)).astype('float32')
  params = {'w': jnp.asarray(w)}
  return TrainState(zero, params, (), None, zero, zero)

with logging_to(sys.argv[1]):
  checkpoints = Checkpoints(sys.argv[1] + '/checkpoints')
  checkpoints.save(state(1), 1, {})
  checkpoints.wait()
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
  try:
    checkpoints.save(state(2), 2, {})
    checkpoints.wait()
  except CheckpointError as error:
    print(error)
"""


def test_full_disk_leaves_the_old_one_whole(tmp_path):
  command = [sys.executable, '-c', FULL_DISK, str(tmp_path)]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('\n') == 1
  assert 'could not save' in done.stdout
  assert 'File too large' in done.stdout
  assert 'the last whole one is of step 1' in done.stdout
  assert 'Traceback' not in done.stderr
  again = Checkpoints(tmp_path / 'checkpoints')
  assert again.steps() == [1]
  w = np.random.default_rng(1).normal(size=(100, 100)).astype('float32')
  want = {'w': jnp.asarray(w)}
  abstract = {
    'w': jax.ShapeDtypeStruct((100, 100), 'float32', sharding=want['w'].sharding)
  }
  assert_bits(again.restore_params(abstract)[0], want)


def test_fingerprint_sees_every_bit_and_every_place():
  x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
  base = lib.fingerprints({'x': x})
  bits = x.view(np.uint32).astype(np.uint64).ravel()
  odd = (np.arange(15, dtype=np.uint64) * 2654435761 % 2**32) | 1
  assert base['x'] == int((bits * odd).sum() % 2**32)
  for i in range(15):
    for bit in (0, 13, 31):
      y = x.copy()
      y.view(np.uint32).ravel()[i] ^= np.uint32(1 << bit)
      assert lib.fingerprints({'x': y}) != base
  assert lib.fingerprints({'x': x[::-1].copy()}) != base
