"""A mesh of devices emulated on the CPU: what must be set before jax starts. Launchers use it, so it imports no jax."""

from collections.abc import Mapping

DEVICE_COUNT = '--xla_force_host_platform_device_count'


def emulation(devices: int, environment: Mapping[str, str]) -> dict[str, str]:
  """Environment variables with which a new process sees `devices` devices on its CPU.

  The XLA_FLAGS of `environment` are kept but for an earlier number of devices. Each emulated device blocks a thread
  while it waits for the others. XLA makes as many threads as there are cores (NPROC overrides it), and ends a process
  whose devices have not met within 40 s: both are too little on a small or busy machine. Its scheduler for concurrency
  lets devices reach independent collectives in different orders, where they wait for each other for ever (seen with
  jaxlib 0.10.2 and collectives inside a conditional): the sequential one keeps the program's order.
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
