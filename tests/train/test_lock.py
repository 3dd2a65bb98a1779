import subprocess
import sys

import pytest
from etils import epath

from fmcv_jax.errors import UserError
from fmcv_jax.train.lock import held

HOLD = """
import sys
from etils import epath
from fmcv_jax.train.lock import held
with held(epath.Path(sys.argv[1])):
  print('held', flush=True)
  sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
  command = [sys.executable, '-c', HOLD, str(tmp_path)]
  with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
    assert first.stdout.readline() == 'held\n'
    with pytest.raises(UserError, match=f'another run \\(process {first.pid}\\)'), held(epath.Path(tmp_path)):
      pass
    first.kill()
    first.wait()
  with held(epath.Path(tmp_path)):
    pass


def test_the_lock_is_given_back(tmp_path):
  for _ in range(2):
    with held(epath.Path(tmp_path)):
      pass
