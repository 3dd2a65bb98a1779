"""A run that is killed again and again, at moments nobody chose, ends as one that was left alone: to the last bit."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath

from fmcv_jax import experiment
from fmcv_jax.train import metrics
from tests import runs

KILLS = int(os.environ.get('FMCV_KILLS', '6'))
STEPS = 60


def start(folder, workdir):
  config = runs.classification(folder, evaluators={}, train__steps=STEPS, checkpoint__every=2)
  file = folder / 'config.py'
  file.write_text(f'import json\n\n\ndef get_config():\n  return json.loads({json.dumps(json.dumps(config))})\n')
  command = [sys.executable, '-m', 'fmcv_jax', 'train', '--config', str(file), '--workdir', str(workdir)]
  return subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=pathlib.Path(__file__).parent.parent)


def steps_of(workdir):
  return [row['step'] for row in metrics.read(epath.Path(workdir) / 'metrics.jsonl')]


def parameters(workdir):
  return {name: np.asarray(x) for name, x in _flat(experiment.trained_tree(str(workdir))['params'])}


def _flat(tree, path=''):
  for name, value in tree.items():
    yield from _flat(value, f'{path}/{name}') if isinstance(value, dict) else [(f'{path}/{name}', value)]


@pytest.mark.slow
def test_a_run_under_sigkill_ends_bitwise_as_one_left_alone(tmp_path):
  folder = runs.image_folder(tmp_path / 'images')
  assert start(folder, tmp_path / 'alone').wait(300) == 0
  generator, killed = np.random.default_rng(0), 0
  while killed < KILLS:
    process, before = start(folder, tmp_path / 'killed'), steps_of(tmp_path / 'killed')
    while process.poll() is None and steps_of(tmp_path / 'killed')[-1:] == before[-1:]:
      time.sleep(0.02)
    time.sleep(generator.uniform(0, 0.3))
    if process.poll() is not None:  # it came to its end
      break
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed += 1
  assert killed >= 3
  assert start(folder, tmp_path / 'killed').wait(300) == 0
  alone, other = parameters(tmp_path / 'alone'), parameters(tmp_path / 'killed')
  assert alone.keys() == other.keys()
  for name, value in alone.items():
    np.testing.assert_array_equal(value, other[name], err_msg=name)
  assert steps_of(tmp_path / 'killed') == steps_of(tmp_path / 'alone')
