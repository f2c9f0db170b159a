"""Memory of a program on a TPU chip, compiled without one; what scripts here share."""

import os
import time
from typing import Any

# Before JAX starts: nothing runs.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax  # noqa: E402

from mmjax.plan import topology  # noqa: E402
from mmjax.plan.readout import out_of_memory  # noqa: E402


def devices(name: str) -> list[Any]:
  """Those of a slice such as 'v5e:16x16'."""
  return topology.devices(topology.parse(name))


def memory(run: Any, args: tuple[Any, ...]) -> dict[str, Any]:
  """What a line tells of jax.jit's `run`: peak_mib, error, compile_cpu_seconds."""
  line: dict[str, Any] = {}
  began = time.process_time()
  try:
    found = run.lower(*args).compile().memory_analysis()
    line['peak_mib'] = round(found.peak_memory_in_bytes / 2**20, 1)
  except jax.errors.JaxRuntimeError as error:
    sizes = out_of_memory(error)
    line['peak_mib'] = None
    line['error'] = (
      f'out of memory: {sizes[0] / 2**30:.2f} GiB' if sizes else str(error)[:200]
    )
  line['compile_cpu_seconds'] = round(time.process_time() - began, 1)
  return line
