"""launch/tpu_vm.sh, with a stand-in for gcloud whose hosts are folders on this machine."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / 'launch'

GCLOUD = """
# The arguments are: compute tpus queued-resources VERB ...
echo "$4" >> "$WORLD/log"
verb=$4; shift 4
for argument in "$@"; do
  case $argument in
    --command=*) command=${argument#--command=} ;;
    --node=0) hosts=host0 ;;
    --node=all) hosts='host0 host1' ;;
    --node-id=* | --accelerator-type=*) echo "$argument" >> "$WORLD/asked" ;;
  esac
done
case $verb in
  list) cat "$WORLD/state" 2>/dev/null || true ;;
  create) echo ACTIVE > "$WORLD/state" ;;
  delete) # the hosts and what runs on them are gone
    for host in host0 host1; do kill -KILL -- -"$(cat "$WORLD/$host/fmcv/pid")"; done
    rm -r "$WORLD/host0" "$WORLD/host1" "$WORLD/state" ;;
  scp) for host in $hosts; do mkdir -p "$WORLD/$host"; cp "$1" "$WORLD/$host/${2#*:}"; done ;;
  ssh)
    for host in $hosts; do
      mkdir -p "$WORLD/$host"
      (cd "$WORLD/$host" && HOST=$host HOME=$WORLD/$host bash -c "$command") || exit
    done ;;
esac
"""

# Stands in for the host's python3: pip and uv do nothing but make the environment's python, which runs $TRAINING.
PYTHON3 = """
echo "$@" >> "$WORLD/$HOST.installs"
if [[ "$*" == *'uv venv'* ]]; then
  mkdir -p ../venv/bin
  printf '#!/bin/bash\\n%s\\n' "$TRAINING" > ../venv/bin/python
  chmod +x ../venv/bin/python
fi
"""


@pytest.fixture
def tpu(tmp_path, commands):
  """Runs the script on two hosts that are folders; `training` is what the run does there, in bash."""
  world = tmp_path / 'world'
  world.mkdir()
  commands('gcloud', GCLOUD)
  commands('python3', PYTHON3)
  # A small working tree, as the real one takes a second to pack.
  tree = tmp_path / 'tree'
  (tree / 'launch').mkdir(parents=True)
  shutil.copy(LAUNCH / 'tpu_vm.sh', tree / 'launch')
  (tree / 'constraints.txt').touch()
  subprocess.run(['git', 'init', '--quiet', tree], check=True)

  def run(*arguments, training='', wait=True, **values):
    settings = {'NAME': 'x', 'ZONE': 'z', 'PAUSE': '0', 'POLL': '0.2', 'WORLD': str(world), 'TRAINING': training}
    process = subprocess.Popen(
      ['bash', tree / 'launch' / 'tpu_vm.sh', *arguments],
      env=commands.env | settings | values,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    if wait:
      process.output, process.errors = process.communicate(timeout=60)
    return process

  run.world = world
  yield run
  for path in world.glob('*/fmcv/pid'):  # a run that a failed test left
    with contextlib.suppress(ProcessLookupError, ValueError):
      os.killpg(int(path.read_text()), signal.SIGKILL)


def test_tpu_vm_asks_for_a_slice_installs_trains_on_all_hosts_and_ends_with_the_runs_status(tpu):
  training = 'echo "$HOST $FMCV_PROCESSES"; printf "<%s>" "$@" > "$WORLD/$HOST.arguments"'
  result = tpu('run', '--config', 'configs/X.py', '--workdir', "gs://b/it's", training=training)
  assert result.returncode == 0, result.errors
  assert result.output == 'host0 auto\n'
  assert (tpu.world / 'asked').read_text().split() == ['--node-id=x', '--accelerator-type=v6e-64']
  for host in ('host0', 'host1'):
    arguments = (tpu.world / f'{host}.arguments').read_text()
    assert arguments == "<-m><fmcv_jax><train><--config><configs/X.py><--workdir><gs://b/it's>"
    assert '.[tpu]' in (tpu.world / f'{host}.installs').read_text()
    assert (tpu.world / host / 'fmcv' / 'code' / 'constraints.txt').exists()


def test_tpu_vm_starts_a_preempted_or_crashed_run_again_and_never_a_user_error(tpu):
  training = """
    echo start >> starts
    case $(wc -l < starts) in 1) exit 75 ;; 2) exit 134 ;; 3) exit 2 ;; esac"""
  result = tpu('run', training=training)
  assert result.returncode == 2, result.errors
  for host in ('host0', 'host1'):
    assert (tpu.world / host / 'fmcv' / 'code' / 'starts').read_text().count('start') == 3


def test_tpu_vm_gives_up_on_a_run_that_crashes_again_and_again(tpu):
  result = tpu('run', training='echo start >> starts; exit 1', RESTARTS='2')
  assert result.returncode == 1
  assert (tpu.world / 'host1' / 'fmcv' / 'code' / 'starts').read_text().count('start') == 3


def test_tpu_vm_asks_again_when_the_slice_was_taken_away_and_resumes(tpu):
  training = """
    echo start >> "$WORLD/$HOST.starts"
    [ "$(wc -l < "$WORLD/$HOST.starts")" = 2 ] && exit 0
    [ "$HOST" = host1 ] && echo SUSPENDED > "$WORLD/state"
    sleep 60"""
  result = tpu('run', training=training)
  assert result.returncode == 0, result.errors
  assert 'x was taken away' in result.errors
  verbs = (tpu.world / 'log').read_text().split()
  assert [verb for verb in verbs if verb in ('create', 'delete')] == ['create', 'delete', 'create']


def test_tpu_vm_stop_lets_the_run_save_and_ends_it(tpu):
  training = """
    trap 'touch "$WORLD/$HOST.saved"; exit 75' TERM
    touch "$WORLD/$HOST.ready"
    while true; do sleep 0.05; done"""
  running = tpu('run', training=training, wait=False)
  while running.poll() is None and not all((tpu.world / f'host{i}.ready').exists() for i in range(2)):
    time.sleep(0.05)
  assert tpu('stop').returncode == 0
  running.output, running.errors = running.communicate(timeout=30)
  assert running.returncode == 75, running.errors
  assert all((tpu.world / f'host{i}.saved').exists() for i in range(2))


def test_tpu_vm_says_what_it_needs(tpu):
  result = tpu('run', NAME='')
  assert result.returncode == 2
  assert result.errors.startswith('set NAME')
  result = tpu()
  assert result.returncode == 2
  assert 'launch/tpu_vm.sh run --config' in result.output
