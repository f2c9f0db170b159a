"""Several processes that are one run: how they find each other, what they tell.

  TPU pod, SLURM, Open MPI      python train.py --distributed --config=...
  anywhere else, on each host   python train.py --coordinator=10.0.0.1:1234
                                  --num_processes=4 --process_id=2 --config=...

The environment asks for the same as JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID. All processes get the same command and see the same workdir and data
(a shared disk). Without any of this a process is a run of its own.
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

_ENV = {
  'coordinator': 'JAX_COORDINATOR_ADDRESS',
  'num_processes': 'JAX_NUM_PROCESSES',
  'process_id': 'JAX_PROCESS_ID',
}


def define_flags() -> None:
  """--distributed, --coordinator, --num_processes and --process_id, for a script."""
  flags.DEFINE_boolean(
    'distributed', False, 'One of several processes; the cluster says which.'
  )
  flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, where none does.')
  flags.DEFINE_integer('num_processes', None, 'How many processes there are.')
  flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0 on.')


def start_from_flags() -> bool:
  """`start` with what the flags say."""
  names = ('distributed', *_ENV)
  return start(**{name: flags.FLAGS[name].value for name in names})


def start(
  distributed: bool = False,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> bool:
  """Joins the other processes, if there are any; before JAX computes anything.

  Args:
    distributed: find out from the cluster what isn't given.
    coordinator, num_processes, process_id: as for `jax.distributed.initialize`;
      default: the environment, see above.

  Returns:
    Whether this is one of several processes.

  Raises:
    ValueError: only a part of the three is known and nobody says the rest; or the
      others can't be reached.
  """
  given = {'coordinator': coordinator, 'num_processes': num_processes,
           'process_id': process_id}  # fmt: skip
  for name, variable in _ENV.items():
    if given[name] is None and (text := os.environ.get(variable)):
      if name != 'coordinator' and not text.isdecimal():
        raise ValueError(f'{variable}={text!r} must be a number')
      given[name] = text if name == 'coordinator' else int(text)
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(given) and not distributed:
    return False
  if missing and not distributed:
    told = ', '.join(f'--{name} (or {_ENV[name]})' for name in missing)
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
  except (ValueError, TypeError, RuntimeError) as error:
    line = ' '.join(str(error).split())
    raise ValueError(f'could not join the other processes: {line}') from error
  return jax.process_count() > 1


def refuse_unjoined() -> None:
  """Refuses a pod whose processes have not been told that they are one run.

  Raises:
    ValueError: devices of other processes are there, but no way to talk to them.
  """
  if jax.process_count() > 1 and not jax.distributed.is_initialized():
    raise ValueError(
      f'this is one of {jax.process_count()} processes: start each with --distributed'
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
