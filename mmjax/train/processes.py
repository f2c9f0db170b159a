"""Several processes that are one run: how they find each other, what they tell.

  where                       what to add to `python train.py --config=...`
  TPU pod, several slices     nothing: the machine's metadata, or GKE's environment
  SLURM (srun), Open MPI 4    nothing: the launcher's environment
  Open MPI 5                  --coordinator=HOST:PORT
  Kubernetes (a JobSet)       JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES in its pods
  anywhere else               --coordinator=10.0.0.1:1234 --num_processes=4 --process_id=2

JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are the same as the
flags. All processes get the same command and see the same workdir (a shared disk, or
gs://) and data (a shared disk, or a copy each). `--distributed` insists on it,
`--nodistributed` makes a run of each process.
"""

import contextlib
import functools
import json
import os
import sys
import time
import traceback
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.train import lifeline

# Exit codes, of sysexits.h where there is one: a scheduler starts again what wasn't 0.
STOPPED = 75  # EX_TEMPFAIL: asked to stop before the end, or another process was lost
_MOMENT = 5.0  # seconds
_line: lifeline.Lifeline | None = None

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
  # JAX's own notice of a preemption is SIGTERM as well, which is ours: `train.signals`.
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
  global _line
  _line = lifeline.join()
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
  """Around a script: a process that fails takes the others along, with its reason.

  JAX has processes meet before they exit; the others would be waiting for this one's
  next step meanwhile. It leaves at once instead and tells them: `train.lifeline`.
  """
  try:
    yield
  except BaseException as error:
    ours = isinstance(error, SystemExit)
    code = error.code if ours else 1
    # Asked to stop, all have saved and meet at the end; after a loss they can't.
    asked = code == STOPPED and error.__context__ is None
    clean = ours and (code in (None, 0) or asked)
    if clean or not jax.distributed.is_initialized():
      if _line is not None:
        _line.close()
      raise
    if is_lost(error):
      why, code = how_lost(error), lifeline.LOST
      print(f'error: {why}', file=sys.stderr)
    elif not ours:
      traceback.print_exception(error)
      why = f'{type(error).__name__}: {error}'
    elif isinstance(code, int):  # its line was printed where it exits
      why = str(error.__context__ or 'no reason given')
    else:
      print(code, file=sys.stderr)
      why, code = str(code), 1
    if _line is not None:
      _line.leave(' '.join(why.split())[:500], code, print_it=False)
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


def ask_around(name: str, text: str, seconds: float) -> list[str]:
  """On process 0: what each process says about a thing at about this time.

  All call it, from any thread, and nobody waits for another; process 0 waits `seconds`
  before it looks. Others get an empty list.
  """
  if jax.process_count() == 1:
    return [text]
  if _line is None:
    return [text] if jax.process_index() == 0 else []
  _line.post(name, text)
  if jax.process_index():
    return []
  time.sleep(seconds)
  said = _line.posted(name)
  return [said.get(k, 'says nothing') for k in range(jax.process_count())]


def is_lost(error: BaseException) -> bool:
  """Whether an error of JAX says that another process has gone."""
  told = ('Gloo', 'coordination service', 'CoordinationService', 'heartbeat',
          'onnection reset', 'onnection closed', 'Socket closed')  # fmt: skip
  return jax.process_count() > 1 and any(words in str(error) for words in told)


def how_lost(error: BaseException) -> str:
  """One line for an error that `is_lost`.

  If another process says within a moment why it left, this one ends with that instead.
  """
  if _line is not None:
    _line.hear(_MOMENT)
  return f'lost another process: {str(error).strip().splitlines()[0][:200]}'


def largest(value: int) -> jax.Array:
  """i32[], the largest that any process says, on its way; all have to call."""
  everyone, maximum = _largest()
  local = np.full(len(everyone.mesh.local_devices), value, np.int32)
  return maximum(jax.make_array_from_process_local_data(everyone, local))


@functools.cache
def _largest():
  mesh = Mesh(np.array(jax.devices()), ('devices',))
  maximum = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, P()))
  return NamedSharding(mesh, P('devices')), maximum


def anyone(flag: bool) -> bool:
  """Whether any process says so; waits for all, which have to call."""
  return flag if jax.process_count() == 1 else bool(largest(int(flag)))
