"""Environment variables for emulated CPU devices, to be set before jax starts. Launchers use it: it imports no jax."""

from collections.abc import Mapping

DEVICE_COUNT = '--xla_force_host_platform_device_count'


def emulation(devices: int, environment: Mapping[str, str]) -> dict[str, str]:
  """Environment variables that give a new process `devices` emulated CPU devices.

  The XLA_FLAGS of `environment` are kept except for an earlier number of devices. Each emulated device blocks a thread
  while it waits for the others. XLA creates one thread per core (NPROC overrides it), and aborts a process whose
  devices do not reach a collective within 40 s: both are insufficient on a small or busy machine. Its
  concurrency-optimized scheduler lets devices reach independent collectives in different orders, which deadlocks
  (observed with jaxlib 0.10.2 and collectives inside a conditional): the sequential scheduler keeps the program order.
  """
  kept = [flag for flag in environment.get('XLA_FLAGS', '').split() if not flag.startswith(DEVICE_COUNT)]
  ours = (
    '--xla_cpu_enable_concurrency_optimized_scheduler=false',
    '--xla_cpu_collective_call_warn_stuck_timeout_seconds=120',
    '--xla_cpu_collective_call_terminate_timeout_seconds=600',
  )
  return {
    'JAX_PLATFORMS': 'cpu',
    'NPROC': environment.get('NPROC', str(4 * devices)),
    'XLA_FLAGS': ' '.join([*ours, *kept, f'{DEVICE_COUNT}={devices}']),
  }
