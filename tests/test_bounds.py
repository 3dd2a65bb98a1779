"""A number outside its range, a pattern without a match and a metric that does not exist are one line before a run."""

import dataclasses
import re
import typing

import pytest

from fmcv_jax import config as config_lib
from fmcv_jax import experiment, trainer
from fmcv_jax.bounds import Interval
from fmcv_jax.errors import UserError
from fmcv_jax.registry import KINDS
from fmcv_jax.run import Run
from tests import runs


def constructors():
  """Every function and class that a config may describe, those of nested fields included."""
  todo, found = [experiment.Experiment, *(made for table in KINDS.values() for made in table.values())], []
  while todo:
    made = todo.pop()
    if made not in found:
      found.append(made)
      for annotation, _ in config_lib._parameters(made).values():
        todo += [part for part in parts(annotation) if isinstance(part, type) and dataclasses.is_dataclass(part)]
  return found


def parts(annotation):
  return [annotation, *(part for inner in typing.get_args(annotation) for part in parts(inner))]


def unbounded(annotation):
  """True if a number of any size, an infinity or NaN fits an annotation."""
  if typing.get_origin(annotation) is typing.Annotated:
    inner, *bounds = typing.get_args(annotation)
    return not any(isinstance(bound, Interval) for bound in bounds) and unbounded(inner)
  if typing.get_origin(annotation) is typing.Literal:
    return False
  return annotation in (int, float) or any(unbounded(inner) for inner in typing.get_args(annotation))


def test_every_number_of_every_constructor_has_a_range():
  found = constructors()
  assert len(found) > 90
  missing = [
    f'{made.__module__}.{made.__name__}: {name}'
    for made in found
    for name, (annotation, _) in config_lib._parameters(made).items()
    if unbounded(annotation)
  ]
  assert not missing, 'use a type of fmcv_jax/bounds.py; Finite where any finite number has a meaning'


def test_every_default_is_inside_its_range():
  for made in constructors():
    for name, (annotation, default) in config_lib._parameters(made).items():
      if any(typing.get_origin(part) is typing.Annotated for part in parts(annotation)) and isinstance(
        default, (int, float, tuple)
      ):
        config_lib.resolve(annotation, default, KINDS, f'{made.__name__}.{name}')


@pytest.mark.parametrize(
  ('kind', 'fields', 'message'),
  [
    ('knn', {'ks': (0,)}, 'config.evaluators.val.ks.0: expected a number at least 1, got 0'),
    ('knn', {'temperature': 0.0}, 'config.evaluators.val.temperature: expected a number above 0, got 0.0'),
    ('linear_probe', {'strengths': (0.0,)}, 'config.evaluators.val.strengths.0: expected a number above 0'),
    ('few_shot', {'shots': (-1,)}, 'config.evaluators.val.shots.0: expected a number at least 1, got -1'),
    ('accuracy', {'batch_size': 0}, 'config.evaluators.val.batch_size: expected a number at least 1, got 0'),
    ('accuracy', {'every': -1}, 'config.evaluators.val.every: expected a number at least 0, got -1'),
  ],
)
def test_evaluators_name_a_value_outside_its_range(tmp_path, kind, fields, message):
  config = runs.classification(tmp_path)
  data = config['evaluators']['val']['data']
  more = {'data': data} | ({'train_data': data} if kind in ('knn', 'linear_probe') else {})
  with pytest.raises(UserError, match=re.escape(message)):
    experiment.resolve({**config, 'evaluators': {'val': {'name': kind, **more, **fields}}})


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'objective__mixup': -1.0}, 'config.objective.mixup: expected a number at least 0, got -1.0'),
    ({'objective__label_smoothing': 1.5}, 'config.objective.label_smoothing: expected a number at least 0 and below 1'),
    (
      {'objective__network__drop_path': 1.0},
      'config.objective.network.drop_path: expected a number at least 0',
    ),
    ({'objective__network__width': 0}, 'config.objective.network.width: expected a number at least 1, got 0'),
    ({'objective__normalize__std': (0.5, 0.0, 0.5)}, 'config.objective.normalize.std.1: expected a number above 0'),
    (
      {'objective__augment': ({'name': 'flip', 'probability': 2.0},)},
      'probability: expected a number at least 0',
    ),
    ({'data__image__scale': (0.0, 1.0)}, 'config.data.image.scale.0: expected a number above 0 and at most 1, got 0.0'),
    ({'data__workers': -1}, 'config.data.workers: expected a number at least 0, got -1'),
    ({'data__timeout': 0}, 'config.data.timeout: expected a number above 0, got 0.0'),
    ({'mesh__tensor': -2}, 'config.mesh.tensor: expected a number at least -1, got -2'),
  ],
)
def test_a_number_outside_its_range_anywhere_is_named(tmp_path, change, message):
  with pytest.raises(UserError, match=re.escape(message)):
    runs.classification(tmp_path, **change)


def test_more_neighbors_than_labeled_images_are_refused_before_the_first_step(tmp_path):
  folder = runs.image_folder(tmp_path / 'images')
  config = runs.classification(folder)
  data = config['evaluators']['val']['data']
  knn = {'name': 'knn', 'data': data, 'train_data': data, 'ks': (10, 200), 'batch_size': 16}
  with pytest.raises(UserError, match=re.escape('knn.ks: 200 neighbors of 24 images of train_data; use at most 24')):
    trainer.train(experiment.resolve({**config, 'evaluators': {'knn': knn}}), tmp_path / 'run')
  assert not (tmp_path / 'run' / 'metrics.jsonl').exists() or not (tmp_path / 'run' / 'metrics.jsonl').read_text()


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


@pytest.mark.parametrize('field', ['steps', 'batch_size'])
def test_a_run_without_steps_or_examples_is_refused(field, tmp_path):
  config = runs.classification(runs.image_folder(tmp_path / 'images'), **{f'train__{field}': 0})
  with pytest.raises(UserError, match=rf'config\.train\.{field}: missing or 0; set at least 1'):
    trainer.train(config, tmp_path / 'run')


def test_a_learning_rate_of_zero_is_refused(tmp_path):
  config = runs.classification(runs.image_folder(tmp_path / 'images'), optimizer__schedule__peak_lr=0.0)
  with pytest.raises(UserError, match=r'config\.optimizer\.schedule: peak_lr is 0: nothing would be learned'):
    trainer.train(config, tmp_path / 'run')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'checkpoint__best': 'vall/top1'},
      "config.checkpoint.best: 'vall/top1' needs an evaluator 'vall' (None keeps no best checkpoint); did you mean",
    ),
    ({'checkpoint__best': 'val'}, "config.checkpoint.best: 'val' is not of the form 'evaluator/metric'"),
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
  saved = runs.classification(folder, train__grad_accum_steps=1, evaluators={}, train__steps=4)
  changed = runs.classification(
    folder,
    evaluators={},
    train__steps=4,
    train__grad_accum_steps=2,
    train__max_nonfinite_steps=5,
    data__timeout=60.0,
    objective__network__remat='dots',
  )
  assert trainer.first_difference(saved, changed) is None
  other = runs.classification(folder, evaluators={}, train__steps=4, objective__network__eps=1e-5)
  assert trainer.first_difference(saved, other) == ('objective.network.eps', 1e-6, 1e-5)
  runs.stopped(saved, tmp_path / 'run', 2)
  assert int(trainer.train(changed, tmp_path / 'run').step) == 4
  assert Run.reopen(tmp_path / 'run').experiment.train.grad_accum_steps == 2
