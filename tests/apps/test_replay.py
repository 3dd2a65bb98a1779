"""A step that was not finite is computed again, with its records and the operation that did it."""

import re

import pytest

from fmcv_jax import trainer
from fmcv_jax.__main__ import main
from fmcv_jax.data.loader import TrainLoader
from fmcv_jax.errors import UserError
from fmcv_jax.run import Run
from tests import runs


def test_a_streak_stops_the_run_and_its_first_step_can_be_looked_at(tmp_path, capsys):
  folder = runs.image_folder(tmp_path / 'images')
  config = runs.classification(
    folder,
    evaluators={},
    train__steps=40,
    train__max_nonfinite_steps=3,
    checkpoint__every=100,
    optimizer__schedule={'name': 'cosine', 'peak_lr': 3e38, 'warmup_steps': 0},
  )
  with pytest.raises(UserError, match='loss or gradient was not finite since step') as caught:
    trainer.train(config, tmp_path / 'run')
  first = int(re.search(r'since step (\d+)', str(caught.value)).group(1))
  capsys.readouterr()

  assert main(['replay', '--workdir', str(tmp_path / 'run'), '--at', str(first)]) == 0
  said = ' '.join(capsys.readouterr().out.split())
  assert 'not finite in the gradient of: ' in said
  assert re.search(r'first in: .*(nan|inf)', said)
  run = Run.reopen(tmp_path / 'run')
  e = run.experiment
  loader = TrainLoader(e.data, batch=16, seed=e.seed, fields=('label',), start=(first - 1) * 16)
  labels = next(loader)['label']
  loader.close()
  shown = re.search(r'its records: (.*?) and', said).group(1).split(', ')
  assert ['abc'.index(name[0]) for name in shown] == labels[: len(shown)].tolist()

  assert main(['replay', '--workdir', str(tmp_path / 'run'), '--at', '0']) == 2
  assert 'step 0 is older than the available checkpoints' in capsys.readouterr().err


def test_a_sound_step_after_a_checkpoint_is_reached_by_training(tmp_path, capsys):
  config = runs.classification(runs.image_folder(tmp_path / 'images'), evaluators={}, train__steps=6)
  trainer.train(config, tmp_path / 'run')
  rows = capsys.readouterr().out
  assert main(['replay', '--workdir', str(tmp_path / 'run'), '--at', '5']) == 0
  said = capsys.readouterr().out
  loss = float(re.search(r'step 5: loss ([0-9.e+-]+)', said).group(1))
  assert loss == pytest.approx(float(re.search(r'step 5  loss (\S+)', rows).group(1)), abs=1e-4)
  assert 'all of the gradient is finite' in said
