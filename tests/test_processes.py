"""Runs of several real processes, joined over loopback by launch/local.py."""

import json
import subprocess
import sys

import numpy as np
import pytest

from fmcv_jax import trainer
from fmcv_jax.data.images.decode import decode
from fmcv_jax.data.sources.array_record import ArrayRecord
from fmcv_jax.train.storage import read_metrics
from tests import runs
from tests.train.tiny import shaken


def test_two_processes_of_two_devices_give_the_losses_of_one_process(tmp_path):
  config = runs.classification(runs.image_folder(tmp_path / 'images'), train__steps=6)
  two = runs.start(config, tmp_path / 'two', launcher=runs.LOCAL)
  _, errors = two.communicate(timeout=300)
  assert two.returncode == 0, errors[-2000:]
  trainer.train(config, tmp_path / 'one')
  one, two = (read_metrics(tmp_path / name / 'metrics.jsonl') for name in ('one', 'two'))
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
  config = runs.classification(runs.image_folder(tmp_path / 'images'), train__batch_size=18, evaluators={})
  run = runs.start(config, tmp_path / 'run', launcher=runs.LOCAL)
  output, errors = run.communicate(timeout=300)
  assert run.returncode == 2
  assert 'config.train.batch_size: 18 is not divisible by data=4; use a multiple of 4' in errors + output
  assert 'Traceback' not in errors


@pytest.mark.slow
def test_two_processes_generate_the_images_of_one_and_the_first_writes_them(tmp_path):
  model = runs.untrained(runs.text_to_image(runs.image_folder(tmp_path / 'images')), tmp_path / 'model', changed=shaken)
  (tmp_path / 'prompts.txt').write_text('red\nblue\na green image\n')

  def command(launcher, *args):
    options = ('--model', model, '-n', '2', '--steps', '2', '--seed', '3')
    line = [sys.executable, *launcher, *args, *options]
    done = subprocess.run([str(x) for x in line], cwd=runs.REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout

  made = []
  for to, launcher in ((tmp_path / 'two', runs.LOCAL), (tmp_path / 'one', ('-m', 'fmcv_jax'))):
    printed = command(launcher, 'synthesize', '--prompts', tmp_path / 'prompts.txt', '--to', to)
    assert ' '.join(printed.split()).count('6 images of 3 prompts') == 1
    source = ArrayRecord(str(to))
    made.append(np.stack([decode(source[index]['image']) for index in range(6)]).astype(int))
  assert np.abs(made[0][0] - made[0][3]).max() > 8  # the same prompt by another number
  assert np.abs(made[0] - made[1]).max() <= 1
  printed = command(runs.LOCAL, 'generate', 'red', '--output', tmp_path / 'generated')
  assert ' '.join(printed.split()).count('2 images and') == 1
