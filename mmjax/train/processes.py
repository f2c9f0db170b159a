"""Several processes that are one run: how they find each other, what they tell.

  where                       what to add to `python train.py --config=...`
  TPU pod, several slices     nothing: the machine's metadata, or GKE's environment
  SLURM (srun), Open MPI 4    nothing: the launcher's environment
  Open MPI 5                  --coordinator=HOST:PORT
  Kubernetes (a JobSet)       JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES in its pods
  anywhere else               --coordinator=10.0.0.1:1234 --num_processes=4 --process_id=2

JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are the same as the
flags. All processes get the same command and see the same workdir and data (a shared
disk). `--distributed` insists on it, `--nodistributed` makes a run of each process.
"""

import contextlib
import functools
import json
import os
import sys
import traceback
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_INDEX = 'JOB_COMPLETION_INDEX'  # of Kubernetes; of one slice only, on TPUs
_ENV = {
  'coordinator': ('JAX_COORDINATOR_ADDRESS',),
  'num_processes': ('JAX_NUM_PROCESSES', 'OMPI_COMM_WORLD_SIZE'),
  'process_id': ('JAX_PROCESS_ID', 'OMPI_COMM_WORLD_RANK', _INDEX),
}
_TPU = 'TPU'


def define_flags() -> None:
  """--distributed, --coordinator, --num_processes and --process_id, for a script."""
  flags.DEFINE_boolean(
    'distributed', None, 'One of several processes; default: what is found to be so.'
  )
  flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, where none does.')
  flags.DEFINE_integer('num_processes', None, 'How many processes there are.')
  flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0 on.')


def start_from_flags() -> bool:
  """`start` with what the flags say."""
  names = ('distributed', *_ENV)
  return start(**{name: flags.FLAGS[name].value for name in names})


def start(
  distributed: bool | None = None,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> bool:
  """Joins the other processes, if there are any; before JAX computes anything.

  Args:
    distributed: None = if there is a sign of others; True = there are; False = alone.
    coordinator, num_processes, process_id: as for `jax.distributed.initialize`;
      default: the environment, then what JAX finds out about the cluster.

  Returns:
    Whether it joined others.

  Raises:
    ValueError: only a part of the three is known and nobody says the rest; or the
      others can't be reached.
  """
  if distributed is False:
    return False
  given = {'coordinator': coordinator, 'num_processes': num_processes,
           'process_id': process_id}  # fmt: skip
  launcher = _launcher()
  asked = any(v is not None for v in given.values())
  for name, variables in _ENV.items():
    for variable in variables:
      if variable == _INDEX and given['coordinator'] is None:
        continue
      if given[name] is None and (text := os.environ.get(variable)):
        if name != 'coordinator' and not text.isdecimal():
          raise ValueError(f'{variable}={text!r} must be a number')
        given[name] = text if name == 'coordinator' else int(text)
        asked |= variable.startswith('JAX_')
  if not (asked or distributed or launcher):
    return False
  missing = [name for name, value in given.items() if value is None]
  if missing and not distributed and not launcher:
    told = ', '.join(f'--{name} (or {_ENV[name][0]})' for name in missing)
    raise ValueError(f'one of several processes, but which: {told} is missing')
  # SIGTERM is ours, see `train.signals`.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      given['coordinator'],
      given['num_processes'],
      given['process_id'],
      cluster_detection_method=None if missing else 'deactivate',
    )
  except (ValueError, TypeError, RuntimeError, OSError) as error:
    unknown = isinstance(error, (ValueError, OSError))  # or no metadata to ask
    if launcher == _TPU and unknown and not (asked or distributed):
      return False  # a TPU that knows of no others; if it has some: `refuse_unjoined`
    line = ' '.join(str(error).split())
    raise ValueError(f'could not join the other processes: {line}') from error
  return True


def _launcher() -> str:
  """Who seems to have started this process as one of several; '' = nobody."""

  def several(variable):
    text = os.environ.get(variable, '')
    return text.isdecimal() and int(text) > 1

  if 'SLURM_STEP_NODELIST' in os.environ and several('SLURM_NTASKS'):
    return 'SLURM'
  if several('OMPI_COMM_WORLD_SIZE'):
    return 'Open MPI'
  # JAX says so at its import where it finds chips, unless it was told otherwise.
  return _TPU if 'tpu' in (jax.config.jax_platforms or '').split(',') else ''


def found() -> str:
  """One line: how many processes and devices there are, and who said so."""
  devices = jax.devices()
  told = f'{len(devices)} devices ({devices[0].device_kind})'
  if jax.process_count() == 1:
    return f'1 process, {told}'
  by = _launcher() or 'flags or environment'
  return f'{jax.process_count()} processes by {by}, {told}'


def refuse_unjoined() -> None:
  """Refuses a pod whose processes have not been told that they are one run.

  Raises:
    ValueError: devices of other processes are there, but no way to talk to them.
  """
  if jax.process_count() > 1 and not jax.distributed.is_initialized():
    raise ValueError(
      f'this is one of {jax.process_count()} processes that have not found each other:'
      ' start each with --distributed'
    )


@contextlib.contextmanager
def leaving_together():
  """Around a script: a process that fails doesn't wait for the others at its end.

  JAX has processes meet before they exit; the others would be waiting for this one's
  next step meanwhile. It leaves at once instead, and they see the connection break.
  """
  try:
    yield
  except BaseException as error:
    clean = isinstance(error, SystemExit) and error.code in (None, 0)
    if clean or not jax.distributed.is_initialized():
      raise
    code = error.code if isinstance(error, SystemExit) else 1
    if is_lost(error):
      print(f'error: {how_lost(error)}', file=sys.stderr)
    elif not isinstance(error, SystemExit):
      traceback.print_exception(error)
    elif not isinstance(code, int):
      print(code, file=sys.stderr)
      code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def barrier(name: str) -> None:
  """Waits until all processes are here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def gather(value: Any) -> list[Any]:
  """Plain JSON data of each process, for all of them, in order; all have to call."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([data.size], np.int32))
  room = np.zeros(int(sizes.max()), np.uint8)
  room[: data.size] = data
  rows = multihost_utils.process_allgather(room)
  return [json.loads(bytes(row[:n])) for row, n in zip(rows, np.ravel(sizes))]


def is_lost(error: BaseException) -> bool:
  """Whether an error of JAX says that another process has gone."""
  told = ('Gloo', 'coordination service', 'CoordinationService', 'heartbeat',
          'onnection reset', 'onnection closed', 'Socket closed')  # fmt: skip
  return jax.process_count() > 1 and any(words in str(error) for words in told)


def how_lost(error: BaseException) -> str:
  """One line for an error that `is_lost`."""
  return f'lost another process: {str(error).strip().splitlines()[0][:200]}'


def anyone(flag: bool) -> jax.Array:
  """bool[], whether any process says so, on its way; all have to call."""
  everyone, largest = _largest()
  local = np.full(len(everyone.mesh.local_devices), flag)
  return largest(jax.make_array_from_process_local_data(everyone, local))


@functools.cache
def _largest():
  mesh = Mesh(np.array(jax.devices()), ('devices',))
  largest = jax.jit(lambda x: x.any(), out_shardings=NamedSharding(mesh, P()))
  return NamedSharding(mesh, P('devices')), largest
