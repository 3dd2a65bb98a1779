"""Completes a config for fine-tuning by the fields that follow from the data and the model, and prints them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from fmcv_jax import config as config_lib
from fmcv_jax.apps.finetune_data import parts_of, source_of
from fmcv_jax.apps.finetune_model import HEAD, Pretrained
from fmcv_jax.console import make_console
from fmcv_jax.data.sources.account import Account
from fmcv_jax.data.sources.base import Source
from fmcv_jax.data.sources.random_split import RandomSplit
from fmcv_jax.errors import UserError
from fmcv_jax.fields import ImageSize
from fmcv_jax.objectives.base import Objective
from fmcv_jax.parallel.distributed import is_main
from fmcv_jax.registry import KINDS

EVALUATIONS = 10  # of the held-out data during a run
MIN_STEPS = 200
_EPOCHS = ((20_000, 20), (200_000, 10), (math.inf, 3))  # up to so many images, at least so many epochs
_SHOWN = 3


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
  """The config with every field that it leaves open and that follows from `data.source` and `init_from.params.workdir`.

  Fields that are set win. Prints the choices. Raises UserError if the data or the model does not suit: no images, one
  class, captions for a model without a text encoder.
  """
  data = _Data.open(config)
  model = Pretrained.open(_workdir(config))
  fields = model.classification(data.classes) if data.labeled else model.contrastive()
  fields['init_from'] = _merged(fields['init_from'], config.get('init_from', {}))
  given = config.get('train', {})
  ways = jax.device_count()
  batch = given.get('batch_size') or data.batch(ways)
  steps = given.get('steps') or data.steps(batch)
  every = max(1, steps // EVALUATIONS)
  fields |= {
    'optimizer': _optimizer(model, steps, labeled=data.labeled),
    'train': {'batch_size': batch, 'steps': steps},
    'log': {'every': max(1, min(50, steps // 20))},
    'data': {'image': _training_crop(0.5 if data.labeled else 0.9)},
  }
  whole = _merged(fields, config)
  size = _image_size(whole['objective'])
  image = {'size': size, **whole['data']['image']}
  whole['data'] = {**whole['data'], 'image': image, 'source': data.training}
  if config.get('evaluators') != {}:
    whole['evaluators'] = _merged(data.evaluators(every, size, ways), config.get('evaluators', {}))
    first = next(iter(data.evaluated))
    best = f'{first}/{"top1" if data.labeled else "image_to_text_r1"}'
    whole['checkpoint'] = _merged({'every': every, 'keep': 1, 'best': best}, config.get('checkpoint', {}))
  head = f', with a new head of {data.classes} classes' if data.labeled else ''
  if is_main():
    for line in [*data.lines(), f'model: {model.workdir}{head}', _schedule_line(whole, data)]:
      make_console().print(f'finetune: {line}', highlight=False, soft_wrap=True, markup=False)
  return whole


@dataclasses.dataclass(frozen=True)
class _Data:
  """The data to train and to evaluate on: specs of their sources, and the opened sources."""

  path: str
  training: dict[str, Any]
  evaluated: dict[str, dict[str, Any]]
  source: Source
  held_out: dict[str, Source]
  account: Account

  @classmethod
  def open(cls, config: Mapping[str, Any]) -> '_Data':
    spec = config.get('data', {}).get('source', {})
    spec = {'name': spec} if isinstance(spec, str) else dict(spec)
    path = str(spec.get('path') or '')
    if spec.get('name') == 'image_folder':
      if not path:
        raise UserError('config.data.source.path: missing; give the folder of your images, or a table that names them')
      if not spec.get('captions'):
        spec = source_of(path, {field: value for field, value in spec.items() if field not in ('name', 'path')})
    training, evaluated = parts_of(spec)
    source, held_out = _open(training), {name: _open(part) for name, part in evaluated.items()}
    data = cls(path, training, evaluated, source, held_out, source.account())
    data.check()
    return data

  @property
  def labeled(self) -> bool:
    return self.account.label_range is not None

  @property
  def records(self) -> int:
    """Images to train on, and held out by a random split."""
    return self.account.records + len(self.held_out.get('held_out', ()))

  @property
  def classes(self) -> int:
    assert self.account.label_range is not None
    return len(self.account.classes) or self.account.label_range[1] + 1

  def check(self) -> None:
    """Raises UserError for data that cannot be learned or measured."""
    account = self.account
    if not account.records:
      left = '; '.join(map(str, account.left_out))
      raise UserError(f'{self.path}: no image can be used to train{f" ({left})" if left else ""}; add images')
    if not self.labeled and 'text' not in account.fields:
      raise UserError(
        f'{self.path}: {self.records} images have neither classes nor captions; put them into class folders, or '
        f'write a table metadata.csv with the columns file_name and text'
      )
    if self.labeled and self.classes < 2:
      name = f' ({account.classes[0]!r})' if account.classes else ''
      raise UserError(f'{self.path}: has one class{name}; at least two are needed to tell images apart')
    empty = [name for name, count in zip(account.classes, account.class_counts or ()) if not count]
    if empty:
      raise UserError(
        f'{self.path}: {len(empty)} of {self.classes} classes have no image to train on ({", ".join(empty[:_SHOWN])}); '
        f'add images, or remove their folders'
      )
    for name, source in self.held_out.items():
      if not len(source):
        raise UserError(
          f'{self.path}: no image is left to hold out for evaluation; give every class at least two different images'
        )
      if unknown := sorted(set(source.names) - set(account.classes)) if account.classes else []:
        raise UserError(
          f'{self.path}: {name} has classes that training has not ({", ".join(unknown[:_SHOWN])}); rename or move them'
        )

  def batch(self, ways: int) -> int:
    """A power of two, up to a third of the images (half of pairs) and 64 (256 of at least 10,000, and of pairs)."""
    records = self.account.records
    most = 256 if records >= 10_000 or not self.labeled else 64
    batch = 2 ** int(math.log2(max(1, min(records / (3 if self.labeled else 2), most))))
    return math.ceil(batch / ways) * ways

  def steps(self, batch: int) -> int:
    epochs = next(epochs for most, epochs in _EPOCHS if self.account.records <= most)
    return max(MIN_STEPS, math.ceil(epochs * self.account.records / batch))

  def evaluators(self, every: int, size: ImageSize, ways: int) -> dict[str, Any]:
    kind = 'accuracy' if self.labeled else 'retrieval'
    found = {}
    for at, (name, spec) in enumerate(self.evaluated.items()):
      batch = min(256, 2 ** math.ceil(math.log2(max(1, len(self.held_out[name])))))
      image = {'name': 'resize_crop', 'size': size, 'crop': 1.0}  # as `Model` reads images of this run
      own = {'data': {'source': spec, 'image': image}, 'batch_size': math.ceil(batch / ways) * ways}
      found[name] = {'name': kind, 'every': 0 if at else every, **own}
    return found

  def lines(self) -> list[str]:
    account, names = self.account, self.account.classes
    counts = {name: len(source) for name, source in self.held_out.items()}
    kinds = f' of {self.classes} classes' if self.labeled else ' with captions'
    shown = f' ({", ".join(names[:_SHOWN])}{", ..." if len(names) > _SHOWN else ""})' if names else ''
    how = ', '.join(f'{count} {name.replace("_", " ")}' for name, count in counts.items())
    own = '' if 'held_out' not in counts else f' ({"stratified, " if self.labeled else ""}seed 0)'
    lines = [f'{self.records} images{kinds}{shown}: {account.records} to train, {how}{own}']
    read = self.training['source'].get('path', self.path)
    lines += [f'the data is read from {read}'] if read.rstrip('/').startswith(f'{self.path.rstrip("/")}/') else []
    origin = 'label' if self.labeled else 'text'
    lines += [f'{origin}: {account.fields[origin]}'] if origin in account.fields else []
    lines += account.doubts()
    for name, source in self.held_out.items():
      lacking = sorted(set(names) - {names[label] for label in _labels(source)}) if names else []
      if lacking:
        some = f'{", ".join(lacking[:_SHOWN])}{", ..." if len(lacking) > _SHOWN else ""}'
        lines.append(f'{len(lacking)} classes have no image in {name.replace("_", " ")}: {some}')
      if shared := _shared(self.source, source):
        lines.append(f'{shared} images of {name} are also images to train on: its figures are too good by that')
    lines += [line for line in account.lines() if line.startswith('left out: ')]
    return lines + _copies(self.source)


def _open(spec: Mapping[str, Any]) -> Source:
  with config_lib.config_path_context('config.data.source'):
    return config_lib.build(Source, config_lib.resolve(Source, spec, KINDS, 'config.data.source'), KINDS)


def _labels(source: Source) -> set[int]:
  counts = source.account().class_counts
  return {label for label, count in enumerate(counts or ()) if count}


def _shared(training: Source, held_out: Source) -> int:
  """Number of held-out records whose pixels are also in the training data; 0 by construction in a random split."""
  if not isinstance(training, RandomSplit) or not isinstance(held_out, RandomSplit) or training.part != 'all':
    return 0
  own = set(training.scan.groups)
  return sum(len(rows) for content, rows in held_out.scan.groups.items() if content in own)


def _copies(source: Source) -> list[str]:
  """Lines about images that occur several times, and about those under several classes."""
  if not isinstance(source, RandomSplit):
    return []
  scan = source.scan
  groups = [rows for rows in scan.groups.values() if len(rows) > 1]
  copies = sum(len(rows) - 1 for rows in groups)
  kept = '' if source.part == 'all' else '; all copies are on the same side of the split'
  lines = [f'{copies} images are copies of others{kept}'] if copies else []
  if scan.labels is not None:
    mixed = [rows for rows in groups if len({int(scan.labels[row]) for row in rows}) > 1]
    if mixed:
      first = ' and '.join(source.source.key_of(row) for row in mixed[0][:2])
      lines.append(f'{len(mixed)} images are in several classes, first {first}')
  return lines


def _workdir(config: Mapping[str, Any]) -> str:
  workdir = config.get('init_from', {}).get('params', {}).get('workdir')
  if not workdir:
    raise UserError(
      'config.init_from.params.workdir: missing; give the model to fine-tune, a workdir of `fmcv train` or '
      '`fmcv import`'
    )
  return str(workdir)


def _optimizer(model: Pretrained, steps: int, *, labeled: bool) -> dict[str, Any]:
  """Small rates, smaller in earlier layers; a new head learns faster than the pretrained network."""
  schedule = {
    'name': 'cosine',
    'peak_lr': 1e-4 if labeled else 1e-5,
    'warmup_steps': min(max(1, steps // 10), max(0, steps - 1)),
  }
  head = {'lr_multipliers': tuple((pattern, 10.0) for pattern in HEAD)} if labeled else {}
  return {'schedule': schedule, **head} | ({'layer_decay': 0.75} if model.has_blocks() else {})


def _training_crop(least: float) -> dict[str, Any]:
  return {'name': 'random_resized_crop', 'scale': (least, 1.0)}


def _image_size(objective: Mapping[str, Any]) -> ImageSize:
  resolved = config_lib.resolve(Objective, objective, KINDS, 'config.objective')
  built: Objective = config_lib.build(Objective, resolved, KINDS, 'config.objective')
  if built.input_size is None:
    raise UserError('config.objective: takes no images of a fixed size, and cannot be fine-tuned here')
  return built.input_size


def _schedule_line(config: Mapping[str, Any], data: _Data) -> str:
  train, warmup = config['train'], config['optimizer']['schedule'].get('warmup_steps', 0)
  epochs = train['steps'] * train['batch_size'] / data.account.records
  return f'batch {train["batch_size"]}; {train["steps"]} steps = {epochs:.4g} epochs, the first {warmup} warm up'


def _merged(derived: Any, given: Any) -> Any:
  """Nested fields of both, where `given` wins, as a whole if it is a dict with another `name`."""
  if not isinstance(derived, Mapping) or not isinstance(given, Mapping):
    return given
  if 'name' in derived and given.get('name', derived['name']) != derived['name']:
    return given
  both = {key: _merged(derived[key], given[key]) for key in derived.keys() & given.keys()}
  return {**derived, **given, **both}
