"""What a process is started with to see several devices on its CPU."""

from fmcv_jax.parallel.cpu_emulation import emulation


def test_the_users_own_xla_flags_are_kept_and_win():
  theirs = '--xla_dump_to=/tmp/x --xla_cpu_enable_concurrency_optimized_scheduler=true'
  flags = emulation(4, {'XLA_FLAGS': theirs})['XLA_FLAGS'].split()
  assert flags[-1] == '--xla_force_host_platform_device_count=4'
  # XLA reads from left to right: the last word on a flag holds.
  assert flags.index('--xla_cpu_enable_concurrency_optimized_scheduler=false') < flags.index(theirs.split()[1])
  assert theirs.split()[0] in flags


def test_an_earlier_number_of_devices_is_replaced():
  first = emulation(2, {})
  again = emulation(8, first)
  assert again['XLA_FLAGS'].count('device_count') == 1
  assert again['XLA_FLAGS'].endswith('device_count=8')


def test_each_device_gets_threads_to_wait_in_by_default():
  assert emulation(8, {})['NPROC'] == '32'
  assert emulation(8, {'NPROC': '5'})['NPROC'] == '5'
