"""Real processes that are one run: two of two CPU devices, or four, over loopback."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax._src import clusters

from mmjax import sharding
from mmjax.data.document import Document, Image, Text
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.data.writer import Writer
from mmjax.train import build, datasets, lifeline, processes
from mmjax.train import config as config_lib
from mmjax.train import log as log_lib

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 40
CONFIG = f"""
from ml_collections import ConfigDict

def get_config(variant=''):
  config = ConfigDict(dict(
    data=dict(
      source='none', path=DATA, rows=8, image=dict(patch=2, resize='fixed', size=4),
      budget=dict(stream=32, targets=16, image=dict(patches=8, items=2)),
    ),
    model=dict(embed_dim=16, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=8,
               mlp_dim=32, dropout=0.1),
    optim=dict(learning_rate=3e-3, schedule=dict(name='constant'), ema=0.9),
    sharding=dict(cpu_devices=2, max_replicated=1.0),
    train=dict(steps={STEPS}, log_every=3, checkpoint_every=4, keep=100),
    eval=dict(vqa=dict(every=20, limit=7, rows=8, max_new=6)),
  ))
  if variant == 'tensor':  # every process needs every row
    config.sharding.update(preset='fsdp+tensor', mesh=dict(data=1, tensor=-1),
                           rules=dict(vocab=None, act_vocab=None))
  if variant == 'fsdp':
    config.sharding.update(preset='fsdp', mesh=dict(data=1, fsdp=-1), cpu_devices=1)
  return config
"""
# train.py, with a line for each row that this process draws: step, row, hash.
SPY = f"""
import hashlib, os, runpy, sys
import jax
from mmjax.train import loop

draw = loop._Run._draw

def spied(run, loaded):
  step = loaded.next_step + 1
  drawn = draw(run, loaded)
  leaves = jax.tree.leaves(drawn[2])
  with open(f'{{run.workdir}}.rows{{jax.process_index()}}', 'a') as out:
    for row in range(len(leaves[0])):
      found = hashlib.sha256(b''.join(x[row].tobytes() for x in leaves)).hexdigest()
      print(step, run.block[0] * len(leaves[0]) + row, found, file=out)
  return drawn

loop._Run._draw = spied
sys.argv[0] = {str(ROOT / 'train.py')!r}
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def document(i, rng):
  light = int(rng.integers(0, 2))
  image = Image((rng.integers(0, 100, (4, 4, 3)) + 150 * light).astype(np.uint8))
  question = Text('?' * (1 + i % 5), trained=False)
  spans = (image, question, Text('light' if light else 'dark', True))
  return Document(spans, id=f'doc{i}')


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp('processes')
  rng = np.random.default_rng(0)
  with Writer(folder / 'data', ByteTokenizer(), {}) as out:
    for i in range(200):
      out.add('train' if i < 190 else 'test', document(i, rng))
  with Writer(folder / 'broken', ByteTokenizer(), {}, shard_bytes=1) as out:
    for i in range(40):
      out.add('train', document(i, rng))
  file = folder / 'shades.py'
  file.write_text(CONFIG.replace('DATA', repr(str(folder / 'data'))))
  made = config_lib.load(str(file))
  made.data.path = str(folder / 'broken')
  dataset, rules = datasets.load(made), build.rules_of(made)
  budget = build.budget_of(made, rules)
  model = build.model_of(made, dataset.tokenizer.vocab_size, budget)
  plan = build.pipeline_of(made, dataset, model, budget, rules).plan
  for process, row in enumerate((0, 4)):  # of the first step, by who loads it
    (bad, *_) = plan.row(row)
    shutil.copytree(folder / 'broken', folder / f'broken{process}')
    shards = (folder / f'broken{process}' / 'train').glob('documents-*')
    shard = sorted(shards)[bad]
    shard.write_bytes(bytes(shard.stat().st_size))
  return file


def cached(folder):
  """Settings with which processes of one folder compile a program but once."""
  return {
    'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'),
    'JAX_ENABLE_COMPILATION_CACHE': 'true',
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }


def start(config, workdir, *args, script='train.py', **environment):
  """A process of a script; what it says goes to a file, .err() reads it."""
  command = [sys.executable, str(ROOT / script)]
  command += [f'--config={config}'] if config else []
  folder = (
    pathlib.Path(str(config).partition(':')[0]).parent if config else workdir.parent
  )
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT),
         'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', **cached(folder),
         **environment}  # fmt: skip
  workdir.parent.mkdir(exist_ok=True)
  errors = workdir.with_name(f'{workdir.name}-{time.monotonic_ns()}.err')
  with errors.open('w') as stderr:
    process = subprocess.Popen(
      [*command, f'--workdir={workdir}', *args], env=env, stdout=stderr, stderr=stderr
    )
  process.err = errors.read_text
  return process


def free_port():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return free.getsockname()[1]


def start_many(count, config, workdir, *args, **options):
  given = [f'--coordinator=localhost:{free_port()}', f'--num_processes={count}']
  return [
    start(config, workdir, *given, f'--process_id={i}', *args, **options)
    for i in range(count)
  ]


def start_two(config, workdir, *args, **options):
  return start_many(2, config, workdir, *args, **options)


def finish(running, codes=(0, 0), seconds=400):
  """Waits for all; their stderr."""
  end = time.monotonic() + seconds
  try:
    for process in running:
      process.wait(max(end - time.monotonic(), 0.1))
  finally:
    for process in running:
      process.kill()
      process.wait()
  got = [process.returncode for process in running]
  assert codes is None or got == list(codes), '\n'.join(p.err() for p in running)
  return [process.err() for process in running]


def wait_for_step(running, workdir, step):
  end = time.monotonic() + 400
  path = workdir / 'metrics.jsonl'
  while not path.exists() or not (got := lines(workdir)) or got[-1]['step'] < step:
    assert all(p.poll() is None for p in running), [p.err() for p in running]
    assert time.monotonic() < end
    time.sleep(0.005)


def lines(workdir):
  """The log without what a clock says."""
  found = log_lib.read(workdir / 'metrics.jsonl')
  return [{k: v for k, v in x.items() if not log_lib.clocked(k)} for x in found]


def saved(workdir):
  found = (workdir / 'checkpoints').iterdir()
  return sorted(int(p.name) for p in found if p.name.isdigit())


def params(workdir, step):
  path = workdir / 'checkpoints' / str(step) / 'params'
  with ocp.StandardCheckpointer() as reader:
    found = reader.metadata(path).item_metadata.tree
    return reader.restore(path, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), found))


def result(workdir, step=STEPS):
  """Every bit of the state, every line of the log, every answer."""
  meta = workdir / 'checkpoints' / str(step) / 'meta' / 'metadata'
  page = json.loads((workdir / 'eval' / f'{step}.json').read_text())
  answers = page['results']['vqa']['predictions']
  return json.loads(meta.read_text())['fingerprints'], lines(workdir), answers


def assert_same_run(got, want, step, rtol=1e-6):
  """Parameters to rtol in each leaf's Euclidean norm, and so the log until `step`."""
  pairs = zip(jax.tree.leaves(params(got, step)), jax.tree.leaves(params(want, step)))
  for a, b in pairs:
    assert np.linalg.norm(a - b) <= rtol * np.linalg.norm(b)
  both = [[x for x in lines(w) if x['step'] <= step] for w in (got, want)]
  assert len(both[0]) == len(both[1]) > 0
  for a, b in zip(*both):
    assert a.keys() == b.keys()
    for key in a:
      exact = key.startswith(('data/', 'eval/')) or key == 'step'
      np.testing.assert_allclose(a[key], b[key], 1e-12 if exact else rtol, err_msg=key)


@pytest.fixture(scope='module')
def two(config):
  """The workdir of a run of two processes, and what they said."""
  workdir = config.parent / 'two'
  return workdir, finish(start_two(config, workdir))


@pytest.mark.slow
def test_two_processes_equal_one(config, two, tmp_path):
  one = tmp_path / 'one'
  finish([start(config, one, '--config.sharding.cpu_devices=4')], [0])
  assert_same_run(two[0], one, 8)
  assert_same_run(two[0], one, STEPS, 1e-5)  # rounding grows with the steps
  assert result(two[0])[2] == result(one)[2]


@pytest.mark.slow
def test_a_model_over_both_processes(config, tmp_path):
  """Two processes hold parts of the model and load the same rows."""
  variant, args = f'{config}:tensor', ('--config.train.steps=8',)
  finish(start_two(variant, tmp_path / 'two', *args))
  finish(
    [start(variant, tmp_path / 'one', *args, '--config.sharding.cpu_devices=4')], [0]
  )
  assert_same_run(tmp_path / 'two', tmp_path / 'one', 8)
  answers = [result(tmp_path / name, 8)[2] for name in ('two', 'one')]
  assert answers[0] == answers[1]


@pytest.mark.slow
def test_only_the_first_process_speaks_and_writes(two):
  workdir, (first, second) = two
  assert f'done: {STEPS} steps' in first
  assert 'step' not in second and 'error' not in second.lower()
  words = (workdir / 'train.log').read_text()
  assert words.count('compiled the step') == words.count(f'done: {STEPS}') == 1
  steps = [x['step'] for x in lines(workdir) if 'train/loss' in x]
  assert steps == [*range(3, STEPS, 3), STEPS]
  assert len(list((workdir / 'tensorboard').iterdir())) == 1
  pages = {p.name for p in (workdir / 'eval').iterdir()}
  assert {f'{n}.{kind}' for n in (20, STEPS) for kind in ('json', 'html')} <= pages
  assert saved(workdir) == list(range(4, STEPS + 1, 4))


@pytest.mark.slow
def test_two_processes_evaluate_a_checkpoint(two):
  first, second = finish(start_two(None, two[0], script='eval.py'))
  assert (
    f'compared with eval/{STEPS}.json: vqa: 10 questions in common, identical' in first
  )
  assert 'step' not in second


@pytest.mark.slow
def test_a_run_goes_on_in_one_process_or_in_two(config, two, tmp_path):
  """From step 20, whose evaluation is there already, as if killed in step 21."""
  for name in ('one', 'two'):
    shutil.copytree(two[0], tmp_path / name)
    for step in range(24, STEPS + 1, 4):
      shutil.rmtree(tmp_path / name / 'checkpoints' / str(step))
  one = start(config, tmp_path / 'one', '--config.sharding.cpu_devices=4')
  assert 'going on from step 20' in finish([one], [0])[0]
  assert_same_run(tmp_path / 'one', two[0], 24)
  assert_same_run(tmp_path / 'one', two[0], STEPS, 1e-5)
  assert 'going on from step 20' in finish(start_two(config, tmp_path / 'two'))[0]
  assert result(tmp_path / 'two') == result(two[0])


@pytest.mark.slow
@pytest.mark.parametrize(
  ('number', 'who', 'code'),
  [
    (signal.SIGTERM, 1, 75),
    pytest.param(signal.SIGINT, 0, 0, marks=pytest.mark.long),
  ],
)
def test_a_signal_to_one_stops_both_at_one_step(config, two, tmp_path, number, who, code):
  workdir = tmp_path / 'run'
  running = start_two(config, workdir)
  wait_for_step(running, workdir, 6)
  running[who].send_signal(number)
  first, _ = finish(running, [code, code], seconds=120)
  told = f'{number.name}: finishing the step' if who == 0 else 'another process was asked'
  assert told in first
  stopped = saved(workdir)[-1]
  assert f'stopped at step {stopped}; the same command goes on' in first
  finish(start_two(config, workdir))
  assert result(workdir) == result(two[0])


@pytest.mark.slow
@pytest.mark.parametrize('who', [0, pytest.param(1, marks=pytest.mark.long)])
def test_kill_9_of_one_ends_the_other_and_loses_little(config, two, tmp_path, who):
  workdir = tmp_path / 'run'
  running = start_two(config, workdir)
  wait_for_step(running, workdir, 9)
  running[who].kill()
  # A process in a step sees the connection break; one that waits for the other to
  # write its part of a checkpoint needs as long as it takes to be sure.
  killed = time.monotonic()
  err = finish(running, None, seconds=2 * lifeline.SILENT)[1 - who]
  assert time.monotonic() - killed < lifeline.SILENT + 30
  # The watchdog may speak once more after it.
  (last,) = [line for line in err.splitlines() if line.startswith('error: ')]
  said = ['error: lost another process', f'error: lost process {who}']
  # With process 0 JAX's own end may be faster, and says more.
  said += ['error: JAX ended this process'] if who == 0 else []
  assert last.startswith(tuple(said)), err
  assert running[1 - who].returncode == 75
  assert 'Traceback' not in err and (who == 0 or 'stack trace' not in err)
  finish(start_two(config, workdir))
  assert result(workdir) == result(two[0])


@pytest.mark.slow
@pytest.mark.parametrize('who', [0, 1])
def test_what_stops_one_process_stops_the_other(config, tmp_path, who):
  """A document that can't be read: only the process that loads it knows."""
  args = (f'--config.data.path={config.parent / f"broken{who}"}', '--config.eval={}',
          '--config.data.max_bad_share=0')  # fmt: skip
  errors = finish(start_two(config, tmp_path / 'run', *args), [1, 1])
  said = [[x for x in err.splitlines() if x.startswith('error:')] for err in errors]
  assert len(said[who]) == len(said[1 - who]) == 1, errors
  assert said[who][0].startswith('error: 1 of the last')
  assert said[1 - who][0].startswith(f'error: process {who} stopped: 1 of the last')
  assert not any('stack trace' in err or 'Traceback' in err for err in errors)


def rows(workdir):
  """What was drawn: the hash of each row by step and row; all have to agree."""
  found = {}
  for path in workdir.parent.glob(f'{workdir.name}.rows*'):
    for line in path.read_text().splitlines():
      step, row, digest = line.split()
      assert found.setdefault((int(step), int(row)), digest) == digest
  return found


@pytest.mark.slow
@pytest.mark.long
def test_four_processes_are_one(config, tmp_path):
  """One is killed; what four have written goes on in two, and in one on another mesh."""
  spy = tmp_path / 'spy.py'
  spy.write_text(SPY)
  one, four, killed = tmp_path / 'one', tmp_path / 'four', tmp_path / 'killed'
  fsdp = f'{config}:fsdp'
  args = dict(script=str(spy))
  finish([start(fsdp, one, '--config.train.steps=12', **args)], [0])
  errors = finish(start_many(4, fsdp, four, '--config.train.steps=12', **args), [0] * 4)
  assert 'done: 12 steps' in errors[0] and not any('step' in x for x in errors[1:])
  assert_same_run(four, one, 12)  # seven questions are not eight
  assert rows(four) == rows(one) and set(rows(one)) == {
    (step, row) for step in range(1, 13) for row in range(8)
  }
  shutil.copytree(four, killed)
  running = start_many(4, fsdp, killed, '--config.train.steps=1000', **args)
  wait_for_step(running, killed, 15)
  running[3].kill()
  began = time.monotonic()
  *others, _ = finish(running, None, seconds=2 * lifeline.SILENT)
  assert time.monotonic() - began < lifeline.SILENT + 30
  assert [process.returncode for process in running] == [75, 75, 75, -signal.SIGKILL]
  assert all(x.strip().splitlines()[-1].startswith('error: lost') for x in others)
  for count, workdir, mesh in ((2, killed, fsdp), (1, four, config)):
    last = saved(workdir)[-1] + 4
    args['script'] = 'train.py'
    running = start_many(count, mesh, workdir, f'--config.train.steps={last}', **args)
    assert f'going on from step {last - 4}' in finish(running, [0] * count)[0]
    assert saved(workdir)[-1] == last
  assert_same_run(four, killed, 16, 1e-5)


SLOW_DISK = f"""
import runpy, sys, time
import jax
from mmjax.data.pipeline import Steps

draw = Steps.__next__

def slow_disk(steps):
  if steps.next_step == 4 and jax.process_index() == 1:
    time.sleep(8)
  return draw(steps)

Steps.__next__ = slow_disk
sys.argv[0] = {str(ROOT / 'train.py')!r}
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.slow
def test_a_late_step_tells_where_both_are(config, tmp_path):
  script = tmp_path / 'slow_disk.py'
  script.write_text(SLOW_DISK)
  args = ('--config.train.steps=6', '--config.train.watchdog=3', '--config.eval={}',
          '--config.train.checkpoint_every=100')  # fmt: skip
  finish(start_two(config, tmp_path / 'run', *args, script=str(script)))
  log = (tmp_path / 'run' / 'train.log').read_text()
  assert 'done: 6 steps' in log
  told = log.split(' WARNING ')  # a busy machine may be late a second time
  assert any('s, the others ' in x and 'process 0: step ' in x for x in told)
  (stuck,) = [x for x in told if x.startswith('process 1: step 4, data for')]
  assert 'in slow_disk' in stuck


@pytest.mark.slow
def test_clocks_of_two_hosts_may_differ(config, two, tmp_path):
  """Process 1 lives a day later: nothing of the run asks which time it is."""
  skew = tmp_path / 'skew'
  skew.mkdir()
  (skew / 'sitecustomize.py').write_text(
    'import time; right = time.time; time.time = lambda: right() + 86400\n'
  )
  given = [f'--coordinator=localhost:{free_port()}', '--num_processes=2']
  later = dict(PYTHONPATH=f'{skew}{os.pathsep}{ROOT}')
  running = [
    start(config, tmp_path / 'run', *given, f'--process_id={i}', **(later if i else {}))
    for i in range(2)
  ]
  finish(running)
  assert result(tmp_path / 'run') == result(two[0])


@pytest.mark.slow
def test_the_cluster_says_who_is_who(config, tmp_path):
  """SLURM, as `srun --ntasks=2` sets it up: nothing is asked for."""
  slurm = {'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'localhost',
           'SLURM_NTASKS': '2', 'SLURM_STEP_NUM_NODES': '1',
           'JAX_COORDINATOR_PORT': str(free_port())}  # fmt: skip
  running = [
    start(config, tmp_path / 'run', '--config.train.steps=3',
          **slurm, SLURM_PROCID=str(i), SLURM_LOCALID=str(i))
    for i in range(2)
  ]  # fmt: skip
  first, second = finish(running)
  assert '2 processes by SLURM, 4 devices (cpu)' in first
  assert 'done: 3 steps' in first and 'step' not in second


@pytest.fixture
def nowhere(monkeypatch):
  """Without a cluster; a list of what `jax.distributed.initialize` was called with."""
  for name in list(os.environ):
    if name.startswith(('JAX_', 'SLURM_', 'OMPI_', 'TPU_', 'MEGASCALE_', 'JOB_')):
      monkeypatch.delenv(name)
  called = []

  def initialize(*args, cluster_detection_method):
    # What JAX itself would find, without the network.
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    rest = (None, cluster_detection_method, 1)
    found = (*args, None) if cluster_detection_method else detect(*args, *rest)
    if None in found[:3]:
      raise ValueError('coordinator_address should be defined.')
    called.append(found)

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  monkeypatch.setattr(jax.config, 'update', lambda *_: None)
  return called


SLURM = {'SLURM_JOB_ID': '4096', 'SLURM_STEP_NODELIST': 'gpu[07-08]',
         'SLURM_NTASKS': '16', 'SLURM_PROCID': '9', 'SLURM_LOCALID': '1'}  # fmt: skip
MPI4 = {'OMPI_MCA_orte_hnp_uri': '4096.0;tcp://10.96.0.1:34911',
        'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_COMM_WORLD_RANK': '3',
        'OMPI_COMM_WORLD_LOCAL_RANK': '1', 'OMPI_VERSION': '4.1.6'}  # fmt: skip
MPI5 = {'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_COMM_WORLD_RANK': '3',
        'JAX_COORDINATOR_ADDRESS': 'node1:1234'}  # fmt: skip
JOBSET = {'JAX_COORDINATOR_ADDRESS': 'run-nodes-0-0.run:1234', 'JAX_NUM_PROCESSES': '2',
          'JOB_COMPLETION_INDEX': '1', 'KUBERNETES_SERVICE_HOST': '10.0.0.1'}  # fmt: skip
# A worker of the second of two slices of 64 hosts, as GKE sets it up.
HOSTS = ','.join(f'run-slice-1-{i}.run' for i in range(64))
GKE = {'TPU_WORKER_HOSTNAMES': HOSTS, 'TPU_WORKER_ID': '5', 'MEGASCALE_NUM_SLICES': '2',
       'MEGASCALE_SLICE_ID': '1', 'MEGASCALE_COORDINATOR_ADDRESS': 'localhost',
       'JOB_COMPLETION_INDEX': '5', 'TPU_SKIP_MDS_QUERY': 'true'}  # fmt: skip


@pytest.mark.parametrize(
  'environment, want',
  [
    (SLURM, ('gpu07:61440', 16, 9, [1])),
    (MPI4, ('10.96.0.1:61441', 4, 3, [1])),
    (MPI5, ('node1:1234', 4, 3, None)),
    (JOBSET, ('run-nodes-0-0.run:1234', 2, 1, None)),
    (GKE, ('localhost:8482', 128, 69, None)),
  ],
)
def test_who_is_who_by_the_environment(nowhere, monkeypatch, environment, want):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  if environment is GKE:  # as where there are chips
    monkeypatch.setattr('jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm', 1)
    monkeypatch.setattr('jax._src.clusters.cluster.running_in_cloud_tpu_vm', 1)
    monkeypatch.setattr(processes, '_launcher', lambda: 'TPU')
  assert processes.start()
  assert nowhere == [want]
  assert not processes.start(distributed=False)


def test_signs_of_others(nowhere, monkeypatch):
  assert processes._launcher() == ''
  monkeypatch.setenv('SLURM_STEP_NODELIST', 'one')
  monkeypatch.setenv('SLURM_NTASKS', '1')  # a shell on a node
  assert processes._launcher() == '' and not processes.start()
  monkeypatch.setattr(type(jax.config), 'jax_platforms', 'tpu,cpu')
  assert processes._launcher() == 'TPU'
  assert not processes.start()  # one machine, which knows of no others
  with pytest.raises(ValueError, match='could not join .* should be defined'):
    processes.start(distributed=True)
  assert processes.found() == f'1 process, {jax.device_count()} devices (cpu)'
  monkeypatch.setattr(jax, 'process_count', lambda: 4)
  assert processes.found().startswith('4 processes by TPU, ')


def test_nobody_asked_for_more_processes(nowhere):
  assert not processes.start() and not nowhere
  assert processes.gather({'a': 1}) == [{'a': 1}]
  processes.barrier('alone')


def test_half_of_an_answer_is_refused(monkeypatch):
  with pytest.raises(ValueError, match=r'--process_id \(or JAX_PROCESS_ID\) is missing'):
    processes.start(coordinator='localhost:1', num_processes=2)
  monkeypatch.setenv('JAX_PROCESS_ID', 'one')
  with pytest.raises(ValueError, match="JAX_PROCESS_ID='one' must be a number"):
    processes.start(coordinator='localhost:1', num_processes=2)


def test_a_process_that_cannot_join_says_so(monkeypatch):
  def nobody(*_, **__):
    raise RuntimeError('connection refused\nby localhost')

  monkeypatch.setattr(jax.distributed, 'initialize', nobody)
  with pytest.raises(ValueError, match='could not join .*: connection refused by local'):
    processes.start(coordinator='localhost:1', num_processes=2, process_id=0)


def test_what_one_process_says_of_itself(monkeypatch):
  assert [processes.anyone(said) for said in (True, False)] == [True, False]
  assert int(processes.largest(2)) == 2
  error = RuntimeError('UNKNOWN: Gloo all-reduce failed: Connection reset by peer')
  assert not processes.is_lost(error)  # there is no other
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  assert processes.is_lost(error) and not processes.is_lost(ValueError('too many'))
  assert processes.how_lost(error) == f'lost another process: {error}'


def test_a_pod_without_the_flag_is_refused(monkeypatch):
  processes.refuse_unjoined()
  monkeypatch.setattr(jax, 'process_count', lambda: 4)
  with pytest.raises(
    ValueError, match='one of 4 processes that have not found.*--distrib'
  ):
    processes.refuse_unjoined()


def test_one_process_loads_all_rows():
  for sizes in ({'data': 8}, {'data': 2, 'tensor': 4}, {'tensor': 8}):
    mesh = sharding.make_mesh(sizes)
    assert sharding.row_block(8, mesh, sharding.rules_for('dp')) == (0, 1)
