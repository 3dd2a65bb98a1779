"""launch/local.py: several processes on one machine end together, and start again only when that can help."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parents[2] / 'launch' / 'local.py'

# What every child of these tests can use: its number, and how many times it was started.
PRELUDE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
here = Path(__file__).parent
me = os.environ['FMCV_PROCESS']
log = here / f'starts-{me}'
log.write_text(log.read_text() + '.' if log.exists() else '.')
starts = len(log.read_text())
(here / f'pid-{me}').write_text(str(os.getpid()))
"""


@pytest.fixture
def launch(tmp_path):
  """Writes `body` as the module that the processes run; returns the started launcher and, by default, waits for it."""
  started = []

  def start(body, *flags, wait=True, processes=2, env=None):
    (tmp_path / 'child.py').write_text(PRELUDE + textwrap.dedent(body))
    command = [sys.executable, LAUNCHER, '--module', 'child', '--processes', str(processes), *flags, '--', 'train']
    launcher = subprocess.Popen(
      command,
      env=os.environ | {'PYTHONPATH': str(tmp_path)} | (env or {}),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    started.append(launcher)
    if wait:
      launcher.output, launcher.errors = launcher.communicate(timeout=60)
    return launcher

  yield start
  for launcher in started:
    launcher.kill()
    launcher.communicate()


def starts(folder, process):
  path = folder / f'starts-{process}'
  return len(path.read_text()) if path.exists() else 0


def is_alive(pid):
  try:
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
  except (FileNotFoundError, ProcessLookupError):
    return False


def eventually(condition, seconds=20):
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    if condition():
      return True
    time.sleep(0.02)
  return False


def written(path):
  return path.exists() and path.read_text() != ''


def test_every_process_gets_its_index_and_the_users_flags_are_kept(launch, tmp_path):
  body = """
    names = ('FMCV_COORDINATOR', 'FMCV_PROCESSES', 'FMCV_PROCESS', 'JAX_PLATFORMS', 'XLA_FLAGS')
    (here / f'env-{me}').write_text(json.dumps({name: os.environ[name] for name in names} | {'argv': sys.argv[1:]}))
    print('shown by', me)
  """
  own = '--xla_cpu_foo=1 --xla_force_host_platform_device_count=7'
  launcher = launch(body, '--devices', '4', processes=3, env={'XLA_FLAGS': own})
  assert launcher.returncode == 0
  assert launcher.output == 'shown by 0\n'
  environments = [json.loads((tmp_path / f'env-{process}').read_text()) for process in range(3)]
  assert [each['FMCV_PROCESS'] for each in environments] == ['0', '1', '2']
  assert len({each['FMCV_COORDINATOR'] for each in environments}) == 1
  host, _, port = environments[0]['FMCV_COORDINATOR'].partition(':')
  assert host == '127.0.0.1'
  assert int(port) > 1023
  for each in environments:
    assert each['FMCV_PROCESSES'] == '3'
    assert each['JAX_PLATFORMS'] == 'cpu'
    flags = each['XLA_FLAGS'].split()
    assert '--xla_cpu_foo=1' in flags
    assert [flag for flag in flags if 'device_count' in flag] == ['--xla_force_host_platform_device_count=4']
    assert each['argv'] == ['train']


@pytest.mark.parametrize('loser', [0, 1])
def test_when_one_fails_the_others_are_ended_and_its_status_is_passed_on(launch, tmp_path, loser):
  body = f"""
    def signaled(*_):
      (here / 'signaled').touch()
      sys.exit(75)
    if me != '{loser}':
      signal.signal(signal.SIGTERM, signaled)
      (here / 'ready').touch()
      time.sleep(60)
    while not (here / 'ready').exists():
      time.sleep(0.01)
    print('what went wrong')
    sys.exit(3)
  """
  start = time.monotonic()
  launcher = launch(body, '--restarts', '3')
  assert launcher.returncode == 3
  assert (tmp_path / 'signaled').exists()
  assert time.monotonic() - start < 20
  assert 'what went wrong' in launcher.output + launcher.errors
  assert f'process {loser} of 2 ended with 3' in launcher.errors
  assert starts(tmp_path, loser) == 1
  for process in range(2):
    pid_file = tmp_path / f'pid-{process}'
    assert not pid_file.exists() or not is_alive(int(pid_file.read_text()))


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace(launch, tmp_path):
  body = """
    if me == '0':
      signal.signal(signal.SIGTERM, signal.SIG_IGN)
      (here / 'deaf').touch()
      time.sleep(60)
    while not (here / 'deaf').exists():
      time.sleep(0.01)
    sys.exit(4)
  """
  start = time.monotonic()
  launcher = launch(body, '--grace', '0.5')
  assert launcher.returncode == 4
  assert time.monotonic() - start < 20
  assert not is_alive(int((tmp_path / 'pid-0').read_text()))


def test_a_preempted_run_is_started_again_once_all_have_saved(launch, tmp_path):
  body = """
    if starts == 1:
      if me == '1':
        time.sleep(0.5)
        (here / 'saved').touch()
      sys.exit(75)
  """
  launcher = launch(body)
  assert (tmp_path / 'saved').exists()
  assert launcher.returncode == 0
  assert [starts(tmp_path, process) for process in range(2)] == [2, 2]


def test_a_run_that_lost_a_process_to_a_signal_is_started_again(launch, tmp_path):
  body = """
    if starts == 1:
      if me == '1':
        while not (here / 'pid-0').exists():
          time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
      time.sleep(60)
  """
  launcher = launch(body)
  assert launcher.returncode == 0
  assert [starts(tmp_path, process) for process in range(2)] == [2, 2]


@pytest.mark.parametrize(
  ('ending', 'status'), [('sys.exit(75)', 75), ('os.kill(os.getpid(), signal.SIGKILL)', 128 + 9)]
)
def test_restarts_are_bounded(launch, tmp_path, ending, status):
  launcher = launch(ending, '--restarts', '2', processes=1)
  assert launcher.returncode == status
  assert starts(tmp_path, 0) == 3


@pytest.mark.parametrize('status', [1, 2])
def test_an_error_is_never_started_again(launch, tmp_path, status):
  launcher = launch(f'sys.exit({status})')
  assert launcher.returncode == status
  assert max(starts(tmp_path, process) for process in range(2)) == 1


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_a_run_that_then_saves_is_not_started_again(launch, tmp_path, number):
  body = f"""
    def save(*_):
      (here / f'saved-{{me}}').touch()
      sys.exit(75)
    signal.signal({int(number)}, save)
    (here / f'ready-{{me}}').touch()
    time.sleep(60)
  """
  launcher = launch(body, wait=False)
  assert eventually(lambda: all((tmp_path / f'ready-{process}').exists() for process in range(2)))
  launcher.send_signal(number)
  launcher.communicate(timeout=30)
  assert launcher.returncode == 75
  assert all((tmp_path / f'saved-{process}').exists() for process in range(2))
  assert [starts(tmp_path, process) for process in range(2)] == [1, 1]


WITH_A_WORKER = """
    worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
    (here / f'worker-{me}').write_text(str(worker.pid))
    while not all((here / f'worker-{i}').exists() for i in range(2)):
      time.sleep(0.01)
"""


def test_what_a_process_started_does_not_outlive_it(launch, tmp_path):
  launcher = launch(WITH_A_WORKER + "    sys.exit(5) if me == '1' else time.sleep(60)\n")
  assert launcher.returncode == 5
  workers = [int((tmp_path / f'worker-{process}').read_text()) for process in range(2)]
  assert eventually(lambda: not any(is_alive(pid) for pid in workers))


@pytest.mark.skipif(sys.platform != 'linux', reason='the kernel ends the children of a killed launcher on Linux only')
def test_a_killed_launcher_leaves_no_process_behind(launch, tmp_path):
  launcher = launch('time.sleep(60)', wait=False)
  assert eventually(lambda: all(written(tmp_path / f'pid-{process}') for process in range(2)))
  launcher.kill()
  launcher.wait(timeout=10)
  pids = [int((tmp_path / f'pid-{process}').read_text()) for process in range(2)]
  assert eventually(lambda: not any(is_alive(pid) for pid in pids))


def test_processes_are_really_joined_and_see_each_others_devices(launch, tmp_path):
  body = """
    import jax
    from fmcv_jax.parallel import distributed
    distributed.initialize()
    assert distributed.any_process(me == '1'), 'process 0 heard nothing from process 1'
    (here / f'world-{me}').write_text(f'{jax.process_count()} {jax.local_device_count()} {jax.device_count()}')
  """
  launcher = launch(body, '--devices', '2')
  assert launcher.returncode == 0, launcher.errors
  assert [(tmp_path / f'world-{process}').read_text() for process in range(2)] == ['2 2 4', '2 2 4']
