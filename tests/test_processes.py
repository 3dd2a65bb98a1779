"""Runs of several real processes, joined over loopback by launch/local.py."""

import json
import pathlib
import subprocess
import sys

import numpy as np

from fmcv_jax import experiment
from fmcv_jax.train import metrics
from tests import runs

REPOSITORY = pathlib.Path(__file__).parent.parent


def launch(config, workdir, *, processes, devices):
  file = workdir.parent / f'{workdir.name}.py'
  file.write_text(f'import json\n\ndef get_config():\n  return json.loads({json.dumps(config)!r})\n')
  command = ['launch/local.py', '--processes', str(processes), '--devices', str(devices), '--']
  train = ['train', '--config', str(file), '--workdir', str(workdir)]
  return subprocess.run([sys.executable, *command, *train], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


def test_two_processes_of_two_devices_give_the_losses_of_one_process(tmp_path):
  config = runs.classification(runs.image_folder(tmp_path / 'images'), train__steps=6)
  done = launch(config, tmp_path / 'two', processes=2, devices=2)
  assert done.returncode == 0, done.stderr[-2000:]
  experiment.train(config, tmp_path / 'one')
  one, two = (metrics.read(tmp_path / name / 'metrics.jsonl') for name in ('one', 'two'))
  assert [row['step'] for row in two] == [row['step'] for row in one]
  for name in ('train/loss', 'train/gradient_norm', 'train/accuracy', 'val/top1'):
    np.testing.assert_allclose(
      [row[name] for row in two if name in row], [row[name] for row in one if name in row], rtol=2e-5
    )
  assert json.loads((tmp_path / 'two' / 'run.json').read_text())['devices'] == {
    'kind': 'cpu',
    'count': 4,
    'processes': 2,
  }


def test_a_users_error_in_every_process_is_one_line_and_status_2(tmp_path):
  config = runs.classification(runs.image_folder(tmp_path / 'images'), train__batch=18, evaluators={})
  done = launch(config, tmp_path / 'run', processes=2, devices=2)
  assert done.returncode == 2
  assert 'config.train.batch: 18 does not divide over data=4; use a multiple of 4' in done.stderr + done.stdout
  assert 'Traceback' not in done.stderr
