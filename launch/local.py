"""Runs a command of fmcv_jax as several real processes on this machine, each with emulated CPU devices.

    python launch/local.py --processes 2 --devices 2 -- train --config configs/X.py --workdir DIR

The processes are joined over loopback by the variables that `fmcv_jax/parallel/distributed.py` reads, so what is tested
here is what runs on a pod. Process 0 shows its output; of the others only the one that fails first does. When one ends
badly the rest are stopped (SIGTERM; not after status 75, when they are at the same save) and are killed after
`--grace` seconds, with everything that they started. The exit status is that of the first to fail, 128 + n after signal
n. A run that was preempted and saved (status 75), or that lost a process to a signal, is started again up to
`--restarts` times and resumes by itself; a user error (status 2) or any other failure is not. Ctrl-C and SIGTERM are
passed on; a second one kills at once.
"""

import argparse
import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

from fmcv_jax.parallel.cpu_emulation import emulation

PREEMPTED = 75  # EX_TEMPFAIL: the run saved and wants to be started again
POLL_SECONDS = 0.05
SHOWN_BYTES = 8000  # of the output of a failed process other than 0

_libc = ctypes.CDLL(None) if sys.platform == 'linux' else None


def environment(process: int, processes: int, devices: int, port: int) -> dict[str, str]:
  """Environment variables of process number `process`; other XLA_FLAGS of the user are kept."""
  return {
    **os.environ,
    **emulation(devices, os.environ),
    'FMCV_COORDINATOR': f'127.0.0.1:{port}',
    'FMCV_PROCESSES': str(processes),
    'FMCV_PROCESS': str(process),
    'PYTHONUNBUFFERED': '1',
  }


def free_port() -> int:
  """A free port below the ephemeral range, so that no other program takes it before process 0 binds it."""
  while True:
    port = random.randrange(20_000, 32_000)
    with socket.socket() as probe, contextlib.suppress(OSError):
      probe.bind(('127.0.0.1', port))
      return port


def die_with_parent() -> None:
  """Runs in the child: makes the kernel kill it when the launcher dies (Linux only)."""
  if _libc is not None:
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def send(child: subprocess.Popen, number: int, *, group: bool = False) -> None:
  """Signals a child, or (group) also all that it started, such as its data workers."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(child.pid, number) if group else os.kill(child.pid, number)


def wait(children: list[subprocess.Popen], asked: list[int], grace: float) -> subprocess.Popen | None:
  """Waits until all have ended; returns the first that failed, if one did. `asked` holds the signals received."""
  alive, failed, passed_on, deadline = list(children), None, 0, None
  try:
    while alive:
      for child in [child for child in alive if child.poll() is not None]:
        alive.remove(child)
        send(child, signal.SIGKILL, group=True)
        if child.returncode and failed is None:
          failed = child
          deadline = deadline or time.monotonic() + grace
          for other in alive if child.returncode != PREEMPTED else []:
            send(other, signal.SIGTERM)
      while passed_on < len(asked):
        deadline = deadline or time.monotonic() + grace
        for child in alive:
          send(child, asked[passed_on])
        passed_on += 1
      if deadline and (time.monotonic() > deadline or len(asked) > 1):
        for child in alive:
          send(child, signal.SIGKILL, group=True)
      time.sleep(POLL_SECONDS)
  finally:
    for child in alive:
      send(child, signal.SIGKILL, group=True)
  return failed


def run_once(command: list[str], processes: int, devices: int, asked: list[int], grace: float) -> int:
  """Runs `command` in all processes; returns 0 or the return code of the first to fail (-n after signal n)."""
  port = free_port()
  with contextlib.ExitStack() as stack:
    outputs = [None] + [stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, processes)]
    children: list[subprocess.Popen] = []
    try:
      for process, output in enumerate(outputs):
        child = subprocess.Popen(
          command,
          env=environment(process, processes, devices, port),
          stdin=subprocess.DEVNULL,
          stdout=output,
          stderr=subprocess.STDOUT if output else None,
          start_new_session=True,
          preexec_fn=die_with_parent,
        )
        children.append(child)
    except BaseException:  # this machine cannot start them all: leave none
      for child in children:
        send(child, signal.SIGKILL, group=True)
      raise
    failed = wait(children, asked, grace)
    if failed is None:
      return 0
    process = children.index(failed)
    if output := outputs[process]:
      output.seek(max(0, output.seek(0, os.SEEK_END) - SHOWN_BYTES))
      for line in output.read().decode(errors='replace').splitlines():
        print(f'[{process}] {line}', file=sys.stderr)
    if failed.returncode not in (2, PREEMPTED):
      print(f'process {process} of {processes} ended with {failed.returncode}', file=sys.stderr)
    return failed.returncode


def main(arguments: list[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--processes', type=int, default=2, help='how many processes')
  parser.add_argument('--devices', type=int, default=1, help='emulated devices of each process')
  parser.add_argument('--restarts', type=int, default=3, help='how often a preempted or killed run is started again')
  parser.add_argument('--grace', type=float, default=15, help='seconds from SIGTERM to SIGKILL')
  parser.add_argument('--module', default='fmcv_jax', help='the module that python -m runs')
  parser.add_argument('command', nargs='+', help='after --: the command and its flags')
  options = parser.parse_args(arguments)
  if options.processes < 1 or options.devices < 1:
    parser.error('--processes and --devices must be at least 1')
  command = [sys.executable, '-m', options.module, *options.command]

  asked: list[int] = []
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda received, _: asked.append(received))
  for attempt in range(options.restarts + 1):
    code = run_once(command, options.processes, options.devices, asked, options.grace)
    if asked or not (code == PREEMPTED or code < 0) or attempt == options.restarts:
      break
    print(f'starting again ({attempt + 1} of {options.restarts})', file=sys.stderr)
  return code if code >= 0 else 128 - code


if __name__ == '__main__':
  sys.exit(main())
