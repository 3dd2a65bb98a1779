"""Runs of several real processes, joined over loopback by launch/local.py."""

import json

import numpy as np

from fmcv_jax import training
from fmcv_jax.train import metrics
from tests import runs


def test_two_processes_of_two_devices_give_the_losses_of_one_process(tmp_path):
  config = runs.classification(runs.image_folder(tmp_path / 'images'), train__steps=6)
  two = runs.start(config, tmp_path / 'two', launcher=runs.LOCAL)
  _, errors = two.communicate(timeout=300)
  assert two.returncode == 0, errors[-2000:]
  training.train(config, tmp_path / 'one')
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
  run = runs.start(config, tmp_path / 'run', launcher=runs.LOCAL)
  output, errors = run.communicate(timeout=300)
  assert run.returncode == 2
  assert 'config.train.batch: 18 does not divide over data=4; use a multiple of 4' in errors + output
  assert 'Traceback' not in errors
