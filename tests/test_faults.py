"""Whole runs that meet a fault of the machine: it kills them, loses one of their processes, or their files."""

import os
import pathlib
import resource
import signal
import time

import numpy as np
import pytest

from fmcv_jax import experiment
from tests import runs


def wait_for(process, workdir, step):
  """Returns when a run has written metrics of `step`."""
  while not any(found >= step for found in runs.steps_of(workdir)):
    assert process.poll() is None, process.stderr.read()[-2000:]
    time.sleep(0.02)


def finish(process, status=0):
  """The output and the errors of a run that must end with this status."""
  try:
    output, errors = process.communicate(timeout=600)
  finally:
    process.kill()
  assert process.returncode == status, errors[-2000:]
  return output, errors


def error_of(process):
  """The one line on stderr of a run that must end with status 2."""
  errors = finish(process, 2)[1]
  lines = [line for line in errors.splitlines() if line.startswith('fmcv train: ')]
  assert len(lines) == 1, errors
  assert 'Traceback' not in errors
  return lines[0]


def assert_equal_runs(one, other):
  parameters, others = runs.parameters(one), runs.parameters(other)
  assert parameters.keys() == others.keys()
  for name, value in parameters.items():
    np.testing.assert_array_equal(value, others[name], err_msg=name)
  assert runs.steps_of(one) == runs.steps_of(other)


@pytest.fixture
def config(tmp_path):
  return lambda steps: runs.classification(
    runs.image_folder(tmp_path / 'images'), evaluators={}, train__steps=steps, checkpoint__every=2, checkpoint__keep=3
  )


def test_a_full_disk_ends_the_run_with_the_last_good_step_and_it_resumes_there(config, tmp_path):
  run = runs.start(config(400), tmp_path / 'run')
  wait_for(run, tmp_path / 'run', 3)
  run.send_signal(signal.SIGTERM)
  finish(run, 75)
  reached = runs.steps_of(tmp_path / 'run')[-1]
  # No file can grow beyond this: a quota, as on a full disk.
  full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))  # noqa: E731
  line = error_of(runs.start(config(400), tmp_path / 'run', preexec_fn=full))
  assert 'could not be saved' in line
  assert f'step {reached} is the latest complete checkpoint' in line
  again = runs.start(config(400), tmp_path / 'run')
  begin = next(line for line in again.stdout if 'M parameters' in line)
  again.kill()
  again.communicate()
  assert begin.startswith(f'resumes at step {reached}')


def test_a_workdir_that_goes_away_is_one_line(config, tmp_path):
  run = runs.start(config(400), tmp_path / 'run')
  wait_for(run, tmp_path / 'run', 2)
  (tmp_path / 'run').rename(tmp_path / 'gone')
  assert str(tmp_path / 'run') in error_of(run)


def kill_at_random(config, workdir, kills, seed=0, **options):
  """Starts a run, and ends it by SIGKILL at a random moment of each of its lives; returns how often it did."""
  generator = np.random.default_rng(seed)
  for killed in range(kills):
    before = runs.steps_of(workdir)
    process = runs.start(config, workdir, **options)
    while process.poll() is None and runs.steps_of(workdir)[-1:] == before[-1:]:
      time.sleep(0.02)
    time.sleep(generator.uniform(0, 0.3))
    if process.poll() is not None:  # it came to its end
      return killed
    process.send_signal(signal.SIGKILL)
    process.communicate()
  return kills


ONE = ('-m', 'fmcv_jax')


@pytest.mark.parametrize(
  ('kills', 'launcher'),
  [(2, ONE), pytest.param(50, ONE, marks=pytest.mark.slow), pytest.param(5, runs.LOCAL, marks=pytest.mark.slow)],
  ids=['twice', 'fifty times', 'two processes'],
)
def test_runs_under_sigkill_end_bitwise_like_an_uninterrupted_one(kills, launcher, config, tmp_path):
  finish(runs.start(config(60), tmp_path / 'alone', launcher=launcher))
  killed = 0
  while killed < kills:  # a run of 60 steps has a few lives
    workdir = tmp_path / f'killed after {killed}'
    more = kill_at_random(config(60), workdir, kills - killed, seed=killed, launcher=launcher)
    assert more, 'the run came to its end before it could be killed'
    killed += more
    finish(runs.start(config(60), workdir, launcher=launcher))
    assert_equal_runs(tmp_path / 'alone', workdir)


VIT = {'name': 'vit', 'variant': 'mu/8', 'image_size': 16, 'depth': 1}
CODER = {
  'name': 'autoencoder',
  'channels': (4, 4),
  'layers': 1,
  'latent_channels': 4,
  'image_size': 16,
  'middle_attention': False,
}
VIEWS = {
  name: {'count': count, 'image': {'name': 'random_resized_crop', 'size': size}}
  for name, count, size in (('global_views', 2, 16), ('local_views', 1, 8))
}
SCENES = {'name': 'scattered', 'size': 16, 'clutter': 1}
OBJECTIVES = {
  'contrastive': runs.contrastive,
  'language': runs.language,
  'classes to pixels': runs.class_to_image,
  'texts to latents': runs.text_to_image,
  'controlnet': runs.controlnet,
  'inpainting': runs.inpainting,
  'mae': {
    'name': 'mae',
    'network': {'name': 'mae', 'encoder': {**VIT, 'pos_embed': 'sincos2d'}, 'width': 16, 'num_heads': 2, 'depth': 1},
  },
  'dino': {
    'name': 'dino',
    'network': {'name': 'dino', 'encoder': VIT, 'prototypes': 16, 'hidden': 16, 'bottleneck': 8},
    'local_views': 1,
    'local_size': 8,
    'koleo_weight': 0.1,
  },
  'autoencoding': {
    'name': 'autoencoding',
    'network': CODER,
    'discriminator_width': 8,
    'discriminator_layers': 1,
    'adversarial_start': 3,
  },
  'segmentation': {'name': 'segmentation', 'network': {'name': 'segmenter', 'num_classes': 11, 'encoder': VIT}},
  'adapted': {
    'name': 'finetune',
    'objective': {'name': 'classification', 'network': {**VIT, 'num_classes': 3}},
    'lora': {'rank': 2},
  },
  'distillation': {
    'name': 'classification',
    'network': {**VIT, 'num_classes': 3},
    'distillation': {'teacher': {**VIT, 'num_classes': 3}},
  },
  'batch norms': {
    'name': 'classification',
    'network': {'name': 'efficientnet', 'variant': 'mu', 'image_size': 16, 'num_classes': 3},
  },
}


@pytest.mark.slow
@pytest.mark.parametrize('launcher', [ONE, runs.LOCAL], ids=['one process', 'two processes'])
@pytest.mark.parametrize('objective', OBJECTIVES)
def test_every_objective_under_sigkill_ends_bitwise_like_an_uninterrupted_run(objective, launcher, tmp_path):
  folder, given = runs.image_folder(tmp_path / 'images'), OBJECTIVES[objective]
  changes = {'train__steps': 20, 'checkpoint__every': 2, 'checkpoint__keep': 3}
  if callable(given):
    config = given(folder, **changes)
  else:
    config = runs.class_to_image(folder, **changes)
    data = {'dino': {**config['data'], 'views': VIEWS}, 'segmentation': {'source': SCENES}}.get(
      objective, config['data']
    )
    config = experiment.resolve({**config, 'objective': given, 'data': data})
  config = {**config, 'evaluators': {}}
  finish(runs.start(config, tmp_path / 'alone', launcher=launcher))
  assert kill_at_random(config, tmp_path / 'killed', 3, launcher=launcher) >= 2
  finish(runs.start(config, tmp_path / 'killed', launcher=launcher))
  assert_equal_runs(tmp_path / 'alone', tmp_path / 'killed')


@pytest.mark.slow
def test_the_loss_of_one_process_is_named_and_all_start_again_from_the_last_checkpoint(config, tmp_path):
  run = runs.start(config(30), tmp_path / 'run', launcher=runs.LOCAL)
  wait_for(run, tmp_path / 'run', 6)
  children = pathlib.Path(f'/proc/{run.pid}/task/{run.pid}/children').read_text().split()
  second = next(pid for pid in children if b'FMCV_PROCESS=1\0' in pathlib.Path(f'/proc/{pid}/environ').read_bytes())
  os.kill(int(second), signal.SIGKILL)
  output, errors = finish(run)
  assert 'process 1 of 2 ended with -9' in errors
  assert 'starting again (1 of 3)' in errors
  assert 'resumes at step' in output
  finish(runs.start(config(30), tmp_path / 'alone', launcher=runs.LOCAL))
  assert_equal_runs(tmp_path / 'alone', tmp_path / 'run')
