"""Any config that is accepted trains: two steps at toy size, or one clear line, never another exception."""

import collections.abc
import dataclasses
import math
import types
import typing

import numpy as np
import pytest

from fmcv_jax import config as config_lib
from fmcv_jax import experiment, trainer
from fmcv_jax.augment.base import Augment
from fmcv_jax.bounds import Interval
from fmcv_jax.data.transforms import ImageTransform
from fmcv_jax.errors import UserError
from fmcv_jax.registry import KINDS
from fmcv_jax.train.optim import UpdateRule
from fmcv_jax.train.schedules import Schedule
from tests import runs

BASES = {
  'classification': runs.classification,
  'contrastive': runs.contrastive,
  'text_to_image': runs.text_to_image,
  'class_to_image': runs.class_to_image,
  'controlnet': runs.controlnet,
  'inpainting': runs.inpainting,
  'autoencoder': runs.autoencoder,
}
REPLACED = (UpdateRule, Schedule, Augment, ImageTransform)  # kinds of which any other member may stand there
# What makes a run long, needs other processes, or is the data itself.
FIXED = (
  'config.train.steps',
  'config.train.batch_size',
  'config.data.workers',
  'config.data.timeout',
  'config.topology',
)


def places(annotation, value, path='config'):
  """(path, annotation) of every field of a resolved config that may be changed."""
  if typing.get_origin(annotation) in (typing.Union, types.UnionType) and value is not None:
    inner = [part for part in typing.get_args(annotation) if part in KINDS or dataclasses.is_dataclass(part)]
    annotation = inner[0] if inner and isinstance(value, dict) else annotation
  if path in FIXED or path.endswith('.source') or path == 'config.tokenizer':
    return
  if annotation in KINDS:
    if annotation in REPLACED:
      yield path, annotation
    made = KINDS[annotation][value['name']]
  elif isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
    made = annotation
  else:
    if typing.get_origin(annotation) in (collections.abc.Mapping, dict):
      for key, item in value.items():
        yield from places(typing.get_args(annotation)[1], item, f'{path}.{key}')
    else:
      yield path, annotation
    return
  for name, (inner, _) in config_lib._parameters(made).items():
    yield from places(inner, value[name], f'{path}.{name}')


def drawn(annotation, rng):
  """A value that an annotation allows, often at an end of its range; None for one that is left alone, as a path."""
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is typing.Annotated:
    interval = next((bound for bound in arguments[1:] if isinstance(bound, Interval)), None)
    return None if interval is None else number(arguments[0], interval, rng)
  if origin is typing.Literal:
    return arguments[rng.integers(len(arguments))]
  if annotation is bool:
    return bool(rng.integers(2))
  if origin in (typing.Union, types.UnionType):
    return drawn(next(part for part in arguments if part is not types.NoneType), rng)
  if origin is tuple:
    each = arguments[:1] * int(rng.integers(0, 3)) if arguments[1:] == (...,) else arguments
    values = tuple(drawn(part, rng) for part in each)
    return None if any(value is None for value in values) else values
  if annotation in REPLACED:
    names = [name for name in KINDS[annotation] if name not in ('pillow_resize', 'resize_to_multiple')]
    name = names[rng.integers(len(names))]
    required = {'size': 16} if annotation is ImageTransform else {'peak_lr': 1e-3} if annotation is Schedule else {}
    return {'name': name, **required}
  return None


def number(kind, interval, rng):
  low = interval.low if math.isfinite(interval.low) else -3
  high = interval.high if math.isfinite(interval.high) else low + 4
  if kind is int:
    return int(min(low + rng.integers(0, 4), high)) + int(interval.above)
  ends = [low + 1e-3 if interval.above else low, high - 1e-3 if interval.below else high]
  return float([*ends, rng.uniform(*ends), rng.uniform(*ends)][rng.integers(4)])


def changed(base, seed, folder):
  """A config of a toy run with up to three fields drawn at random, and these fields. UserError if it is refused."""
  rng = np.random.default_rng(seed)
  config = BASES[base](folder, train__steps=2, train__batch_size=16, optimizer__schedule__warmup_steps=1)
  if base == 'text_to_image':
    config = {**config, 'evaluators': {}}  # denoising at ten noise levels takes longer than training
  found = list(places(experiment.Experiment, config))
  drawings = {found[at][0]: drawn(found[at][1], rng) for at in rng.choice(len(found), 3, replace=False)}
  fields = {path.removeprefix('config.'): value for path, value in drawings.items() if value is not None}
  return config_lib.override(config, [f'{path}={value!r}' for path, value in fields.items()]), fields


def outcome(base, seed, folder, workdir):
  """'trained', or the message of the error that a random config is refused with."""
  config, fields = changed(base, seed, folder)
  try:
    state = trainer.train(experiment.resolve(config), workdir)
  except UserError as error:
    return str(error)
  except Exception as error:
    raise AssertionError(f'{base} with {fields}: {type(error).__name__}: {error}') from error
  assert (int(state.step), max(runs.steps_of(workdir))) == (2, 2), fields
  return 'trained'


def test_the_fields_that_are_drawn_are_those_of_the_whole_config(tmp_path):
  found = dict(places(experiment.Experiment, runs.classification(tmp_path)))
  named = ('train.ema_decay', 'optimizer.rule.b1', 'objective.network.drop_path', 'objective.mixup', 'data.image.scale')
  assert {f'config.{path}' for path in named} <= set(found)
  assert len(found) > 80


@pytest.mark.parametrize('base', ['classification', 'contrastive', 'class_to_image'])
def test_a_config_with_random_fields_trains(base, tmp_path):
  folder = runs.image_folder(tmp_path / 'images')
  outcomes = (outcome(base, seed, folder, tmp_path / str(seed)) for seed in range(100, 110))
  assert 'trained' in outcomes  # up to the first that is accepted


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('base', BASES)
def test_any_config_with_random_fields_trains_or_is_one_line(base, seed, tmp_path):
  assert len(outcome(base, seed, runs.image_folder(tmp_path / 'images'), tmp_path / 'run').splitlines()) == 1
