"""Initialization of multi-process runs, and small collectives between processes."""

import os

import jax
import numpy as np

from fmcv_jax.parallel.cpu_emulation import emulation

# Heartbeat timeout after which a process counts as lost (jax's default of 100 s leaves a pod idle for minutes).
HEARTBEAT_SECONDS = 20
# Shutdown barrier timeout, also after an error, when other processes may be waiting for this one (jax: 300 s).
SHUTDOWN_SECONDS = 60


def emulate(devices: int) -> None:
  """Gives this process `devices` CPU devices; call it before the first use of devices, which reads it once."""
  os.environ.update(emulation(devices, os.environ))
  jax.config.update('jax_platforms', 'cpu')  # the variable was read when jax was imported


def initialize() -> None:
  """Connects the processes of a multi-process run; call it before any other use of jax.

  `launch/local.py` and the Slurm script set FMCV_COORDINATOR (host:port), FMCV_PROCESSES and FMCV_PROCESS; on TPU pods
  FMCV_PROCESSES=auto lets jax detect the others.
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
  """True for the process that writes logs, images and configs."""
  return jax.process_index() == 0


def any_process(flag: bool) -> bool:
  """True if `flag` is True in any process; every process must call it at the same point."""
  if jax.process_count() == 1:
    return flag
  from jax.experimental import multihost_utils

  return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def from_main(value: np.ndarray) -> np.ndarray:
  """Broadcasts the array of process 0, whose shape all must know; every process must call it at the same point."""
  if jax.process_count() == 1:
    return value
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.broadcast_one_to_all(value))
