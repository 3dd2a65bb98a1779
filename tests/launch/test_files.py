"""launch/: the shell files are clean, and every file begins with its command."""

import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / 'launch'


@pytest.mark.parametrize('path', sorted(LAUNCH.glob('*.sh')), ids=lambda path: path.name)
def test_shell_files_pass_shellcheck(path):
  shellcheck = Path(sys.executable).with_name('shellcheck')
  result = subprocess.run([shellcheck, path], capture_output=True, text=True)
  assert result.returncode == 0, result.stdout


@pytest.mark.parametrize('name', ['gke_jobset.yaml', 'local.py', 'slurm_gpu.sh', 'tpu_vm.sh'])
def test_every_launch_file_opens_with_what_it_does_and_its_command(name):
  head = (LAUNCH / name).read_text().splitlines()[:20]
  assert any('--config configs/X.py --workdir' in line for line in head)
  assert any(name in line for line in head)
