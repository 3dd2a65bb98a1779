"""Start-up of a run of several processes, and the few things processes say to each other."""

import os

import jax
import numpy as np

from fmcv_jax.parallel.cpu_emulation import emulation

# A lost process is noticed after this long (jax's default of 100 s leaves a pod idle for minutes).
HEARTBEAT_SECONDS = 20
# One that ends by an error waits so long for the others, which may wait for it (jax: 300 s); so does one that is done.
SHUTDOWN_SECONDS = 60


def emulate(devices: int) -> None:
  """Gives this process `devices` CPU devices; call it before the first use of devices, which reads it once."""
  os.environ.update(emulation(devices, os.environ))
  jax.config.update('jax_platforms', 'cpu')  # the variable was read when jax was imported


def initialize() -> None:
  """Joins the processes of a run, if it has several; call it before any other use of jax.

  `launch/local.py` and the Slurm script set FMCV_COORDINATOR (host:port), FMCV_PROCESSES and FMCV_PROCESS; on TPU pods
  FMCV_PROCESSES=auto lets jax find the others by itself.
  """
  processes = os.environ.get('FMCV_PROCESSES', '1')
  if processes == 'auto':
    jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=SHUTDOWN_SECONDS)
  elif int(processes) > 1:
    jax.distributed.initialize(
      coordinator_address=os.environ['FMCV_COORDINATOR'],
      num_processes=int(processes),
      process_id=int(os.environ['FMCV_PROCESS']),
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )


def is_main() -> bool:
  """Whether this process writes what one process writes: logs, pictures, configs."""
  return jax.process_index() == 0


def any_process(flag: bool) -> bool:
  """Whether `flag` holds in any process; every process must call it at the same point."""
  if jax.process_count() == 1:
    return flag
  from jax.experimental import multihost_utils

  return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def from_main(value: np.ndarray) -> np.ndarray:
  """The first process' array of a shape that all know; every process must call it at the same point."""
  if jax.process_count() == 1:
    return value
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.broadcast_one_to_all(value))
