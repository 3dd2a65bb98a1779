"""launch/slurm_gpu.sh, with stand-ins for Slurm's commands."""

import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / 'launch'


@pytest.fixture
def sbatch(tmp_path, commands):
  """Runs the script as Slurm would: `body` is what each process does, in bash, its arguments the training command."""
  commands('scontrol', f'if [ "$1" = show ]; then echo gpu07; echo gpu08; else echo "$@" >> {tmp_path}/scontrol; fi')
  # Every process in turn; like the real one, srun ends with the highest status.
  commands(
    'srun',
    """
    while [[ $1 == --* ]]; do shift; done
    worst=0
    for ((process = 0; process < SLURM_NTASKS; process++)); do
      code=0
      SLURM_PROCID=$process SLURM_LOCALID=$((process % SLURM_NTASKS_PER_NODE)) "$@" || code=$?
      ((code > worst)) && worst=$code
    done
    exit $worst""",
  )

  def run(body, nodes=2, per_node=1, gpus=8, restarts=0):
    python = commands('python-of-the-run', body)
    slurm = {
      'SLURM_JOB_ID': '8200',
      'SLURM_JOB_NODELIST': 'gpu[07-08]',
      'SLURM_NTASKS': str(nodes * per_node),
      'SLURM_NTASKS_PER_NODE': str(per_node),
      'SLURM_GPUS_ON_NODE': str(gpus),
      'SLURM_RESTART_COUNT': str(restarts),
      'PYTHON': str(python),
    }
    script = [LAUNCH / 'slurm_gpu.sh', '--config', 'configs/X.py', '--workdir', 'a folder']
    result = subprocess.run(['bash', *script], env=commands.env | slurm, capture_output=True, text=True, timeout=60)
    log = tmp_path / 'scontrol'
    result.requeued = log.exists() and log.read_text() == 'requeue 8200\n'
    return result

  return run


SHOW = 'echo "$FMCV_COORDINATOR $FMCV_PROCESSES $FMCV_PROCESS $JAX_LOCAL_DEVICE_IDS"'


def test_slurm_one_process_a_node_drives_all_of_its_gpus(sbatch):
  result = sbatch(SHOW)
  assert result.stdout.splitlines() == ['gpu07:61448 2 0 0,1,2,3,4,5,6,7', 'gpu07:61448 2 1 0,1,2,3,4,5,6,7']


def test_slurm_one_process_a_gpu_drives_its_own(sbatch):
  result = sbatch(SHOW, per_node=2, gpus=2)
  assert result.stdout.splitlines() == [f'gpu07:61448 4 {process} {process % 2}' for process in range(4)]


def test_slurm_processes_of_a_node_share_its_gpus_evenly_or_not_at_all(sbatch):
  result = sbatch(SHOW, nodes=1, per_node=2, gpus=8)
  assert [line.split()[-1] for line in result.stdout.splitlines()] == ['0,1,2,3', '4,5,6,7']
  result = sbatch(SHOW, nodes=1, per_node=3, gpus=8)
  assert result.returncode == 2
  assert '8 GPUs are not divisible by 3 processes' in result.stderr
  assert not result.requeued


def test_slurm_runs_the_training_command_with_its_arguments_intact(sbatch):
  result = sbatch('printf "<%s>" "$@"', nodes=1)
  assert result.stdout == '<-m><fmcv_jax><train><--config><configs/X.py><--workdir><a folder>'


@pytest.mark.parametrize(
  ('ending', 'restarts', 'requeued'),
  [
    ('exit 0', 0, False),
    ('exit 1', 0, False),
    ('exit 2', 0, False),
    ('exit 75', 0, True),
    ('exit 75', 50, True),
    ('kill -KILL $$', 0, True),
    ('kill -KILL $$', 5, False),
  ],
)
def test_slurm_requeues_what_was_preempted_or_killed_and_nothing_else(sbatch, ending, restarts, requeued):
  result = sbatch(ending, restarts=restarts)
  assert result.requeued == requeued
  assert result.returncode == (int(ending.split()[1]) if 'exit' in ending else 137)
