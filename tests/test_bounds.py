"""A number outside its range, a pattern without a match and a metric that does not exist are one line before a run."""

import re

import pytest

from fmcv_jax import trainer
from fmcv_jax.errors import UserError
from fmcv_jax.run import Run
from tests import runs


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'train__grad_accum_steps': 0}, 'config.train.grad_accum_steps: expected a number at least 1, got 0'),
    ({'train__ema_decay': 1.5}, 'config.train.ema_decay: expected a number at least 0 and below 1, got 1.5'),
    ({'train__ema_decay': -0.5}, 'config.train.ema_decay: expected a number at least 0 and below 1, got -0.5'),
    ({'log__every': 0}, 'config.log.every: expected a number at least 1, got 0'),
    ({'checkpoint__every': 0}, 'config.checkpoint.every: expected a number at least 1, got 0'),
    ({'checkpoint__keep': 0}, 'config.checkpoint.keep: expected a number at least 1, got 0'),
    ({'checkpoint__keep': -1}, 'config.checkpoint.keep: expected a number at least 1, got -1'),
    ({'seed': -1}, 'config.seed: expected a number at least 0 and at most 4.29497e+09, got -1'),
    ({'optimizer__clip_norm': 0}, 'config.optimizer.clip_norm: expected a number above 0, got 0.0'),
    ({'optimizer__clip_norm': -1.0}, 'config.optimizer.clip_norm: expected a number above 0, got -1.0'),
    ({'optimizer__schedule__peak_lr': -1e-3}, 'config.optimizer.schedule.peak_lr: expected a number at least 0'),
    ({'optimizer__schedule__peak_lr': 1e999}, "peak_lr: expected float, got str 'inf'"),
    ({'optimizer__weight_decay_mask': ('(',)}, "config.optimizer.weight_decay_mask.0: '(' is not a regular expression"),
  ],
)
def test_a_value_outside_its_range_is_named(tmp_path, change, message):
  with pytest.raises(UserError, match=re.escape(message)):
    runs.classification(tmp_path, **change)


def test_a_learning_rate_of_zero_is_refused(tmp_path):
  config = runs.classification(runs.image_folder(tmp_path / 'images'), optimizer__schedule__peak_lr=0.0)
  with pytest.raises(UserError, match=r'config\.optimizer\.schedule: peak_lr is 0: nothing would be learned'):
    trainer.train(config, tmp_path / 'run')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'checkpoint__best': 'vall/top1'},
      "config.checkpoint.best: 'vall/top1' is not of the form 'evaluator/metric'",
    ),
    (
      {'optimizer__weight_decay': 0.1, 'optimizer__weight_decay_mask': ('.*/kernels',)},
      "config.optimizer: weight_decay_mask: '.*/kernels' matches no parameter",
    ),
    ({'optimizer__lr_multipliers': (('heads/.*', 0.1),)}, "config.optimizer: lr_multipliers: 'heads/.*' matches no"),
  ],
)
def test_names_and_patterns_without_a_match_are_refused_before_the_first_step(tmp_path, change, message):
  config = runs.classification(runs.image_folder(tmp_path / 'images'), **change)
  with pytest.raises(UserError, match=re.escape(message)):
    trainer.train(config, tmp_path / 'run')
  assert not (tmp_path / 'run' / 'metrics.jsonl').exists() or not (tmp_path / 'run' / 'metrics.jsonl').read_text()


def test_a_run_resumes_with_fields_that_say_only_how_it_runs(tmp_path):
  folder = runs.image_folder(tmp_path / 'images')
  saved = runs.classification(folder, train__grad_accum_steps=1)
  changed = runs.classification(
    folder,
    train__grad_accum_steps=2,
    train__max_nonfinite_steps=5,
    data__timeout=60.0,
    objective__network__remat='dots',
  )
  assert trainer.first_difference(saved, changed) is None
  other = runs.classification(folder, objective__network__eps=1e-5)
  assert trainer.first_difference(saved, other) == ('objective.network.eps', 1e-6, 1e-5)
  assert Run(changed).experiment.train.grad_accum_steps == 2
