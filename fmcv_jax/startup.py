"""Startup report of a run: data, labels, texts, parameters and initial weights, before the first step.

Training on the wrong data fails silently, with a wrong metric. The report checks everything that can be checked without
decoding an image: a contradiction raises UserError, everything else is printed and written to the workdir.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.errors import ScopeParamShapeError

from fmcv_jax.config import to_plain_dict
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.account import Account
from fmcv_jax.data.tokenizers import truncated_texts
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import Evaluator
from fmcv_jax.evaluate.labels import same_by_wordnet
from fmcv_jax.experiment import resolve
from fmcv_jax.fields import height_width
from fmcv_jax.objectives.mask_prediction import MaskPrediction
from fmcv_jax.run import Run, parameter_count
from fmcv_jax.train.layer_decay import map_by_path

FILE = 'startup.txt'
TEXTS = 256  # evenly spaced records whose texts are tokenized

# Fields of a network that affect only its computation, or that a warm start reports itself.
_HOW = ('remat', 'unroll', 'attention', 'dtype', 'dropout', 'drop_path', 'drop_path_rise', 'num_classes', 'variant')


def account(run: Run) -> list[str]:
  """Lines that describe the data, the labels, the texts, the trained parameters and the initial weights of a run.

  Raises UserError for labels outside the classes of the network, for other classes of stuff than those of the data, and
  if only the template is left of all texts.
  """
  e = run.experiment
  training = e.data.source.account()
  lines = [f'data: {line}' for line in training.lines()]
  lines += _labels(run, training)
  _check_stuff(run)
  lines += _texts(run, e.data, 'data')
  for name, evaluator in e.evaluators.items():
    pipeline = getattr(evaluator, 'data', None)
    if isinstance(pipeline, Pipeline):
      _check_image_size(run, name, evaluator, pipeline)
      lines += _evaluator(name, pipeline.source.account(), training)
  lines += _parameters(run)
  for target, source in e.init_from.items():
    lines += [f'init_from.{target}: {source.part} of {source.workdir}']
    if new := _initialized(run, target, source.skip):
      lines += [f'init_from.{target}: {len(new)} arrays are new, not from there: {", ".join(new[:4])}']
    lines += [
      f'init_from.{target}: {difference}' for difference in _differences(run, target, source.workdir, source.part)
    ]
  return lines


def write(workdir: epath.Path, lines: Sequence[str]) -> None:
  """Keeps the account in the workdir, a line for each fact."""
  (workdir / FILE).write_text('\n'.join(lines) + '\n')


def check_labels(
  batch: Mapping[str, np.ndarray], counts: Mapping[str, tuple[int, int | None]], keys: Callable[[], Sequence[str]]
) -> None:
  """Raises UserError for a class of a batch that the network does not have.

  batch   this process's rows [b, ...]
  counts  field -> (number of classes, the number that stands for 'not labeled' or None), `Objective.class_counts`
  keys    gives the names that the source has for the records of these rows [b]
  """
  for field, (count, ignored) in counts.items():
    values = batch[field]
    outside = (values < 0) | (values >= count)
    if ignored is not None:
      outside &= values != ignored
    if outside.any():
      row = int(np.argwhere(outside)[0][0])
      raise UserError(
        f'data: {field} {values[outside][0]} of record {keys()[row]} is not one of the {count} classes of the network, '
        f'0 to {count - 1}'
      )


def _labels(run: Run, training: Account) -> list[str]:
  counts = run.experiment.objective.class_counts
  if 'label' not in counts:
    return []
  count, _ = counts['label']
  low, high = training.label_range or ((0, len(training.classes) - 1) if training.classes else (0, 0))
  if low < 0 or high >= count:
    raise UserError(
      f'config.data.source: labels go from {low} to {high}, but the network has {count} classes, 0 to {count - 1}; set '
      f'the number of classes of the network to {high + 1}'
    )
  if training.classes and len(training.classes) < count:
    return [f'labels: the network has {count} classes, the data {len(training.classes)}: the others are never learned']
  return []


def _check_stuff(run: Run) -> None:
  """Raises UserError if panoptic masks are learned of classes that the data divides otherwise into things and stuff."""
  outer: Any = run.experiment.objective
  objective, things = getattr(outer, 'objective', outer), getattr(run.experiment.data.source, 'things', None)
  if not isinstance(objective, MaskPrediction) or objective.task != 'panoptic' or things is None:
    return
  stuff = [number for number, thing in enumerate(things) if not thing]
  if differing := sorted(set(stuff) ^ set(objective.stuff)):
    first, kind = differing[0], 'stuff' if differing[0] in stuff else 'things'
    name = run.experiment.data.source.names[first]
    raise UserError(
      f'config.objective.stuff: class {first} ({name}) is one of {kind} in the data; set stuff to {stuff}'
    )


def _texts(run: Run, pipeline: Pipeline, where: str) -> list[str]:
  """The fraction of sampled texts that the tokenizer truncates; UserError if only the template is left of all."""
  e = run.experiment
  if 'tokens' not in e.objective.example_batch or e.tokenizer is None:
    return []
  source, template = pipeline.source, pipeline.caption_templates[0]
  rows = np.unique(np.linspace(0, len(source) - 1, min(TEXTS, len(source))).astype(int))
  captions = sorted({text for row in rows for text in source.texts_of(int(row))})
  if not captions:
    return []
  if len(captions) == 1 and len(rows) > 1:
    return [f'{where}: all {len(rows)} texts that were sampled are {captions[0]!r}: a model cannot tell images by them']
  left = truncated_texts(e.tokenizer, [template.replace('{}', caption) for caption in captions])
  if len(captions) > 1 and len(left) == len(captions) and len(set(left.values())) == 1:
    raise UserError(
      f'config.{where}.caption_templates: of {template!r} the tokenizer keeps {next(iter(left.values()))!r} for every '
      f'caption, so all texts are one; use a shorter template or a longer config.tokenizer.length'
    )
  if not left:
    return []
  return [f'{where}: {len(left) / len(captions):.0%} of {len(captions)} texts are cut to the length of the tokenizer']


def _check_image_size(run: Run, name: str, evaluator: Evaluator, pipeline: Pipeline) -> None:
  """Raises UserError for images of an evaluator that the network cannot take, such as 20 pixels for patches of 16."""
  size, own = getattr(pipeline.image, 'size', None), run.experiment.objective.input_size
  if size is None or own is None or getattr(evaluator, 'features', '') == 'pixels':
    return
  if height_width(size) == height_width(own):
    return
  outputs = run.experiment.objective.outputs().values()
  output = next((output for output in outputs if output.reads == ('image',) and output.encoder is not None), None)
  if output is None:
    return
  images = jax.ShapeDtypeStruct((run.placement.mesh.size, *height_width(size), pipeline.channels), jnp.uint8)
  state = run.abstract_state
  try:
    with run.placement.active():
      jax.eval_shape(output.call, state.params, state.extra, {'image': images})
  except (ValueError, TypeError, ScopeParamShapeError) as error:
    reason = str(error).strip().splitlines()[0]
    raise UserError(
      f'config.evaluators.{name}.data.image.size: {size}, but the network takes images of {own} pixels ({reason})'
    ) from error


def _evaluator(name: str, found: Account, training: Account) -> list[str]:
  lines = [f'evaluators.{name}: {found.lines()[0]}']
  if not found.classes or not training.classes or found.classes == training.classes:
    return lines
  if same_by_wordnet(found.classes, training.classes):
    lines.append(f'evaluators.{name}: WordNet ids and names of ImageNet-1k, the same classes in the same order')
  else:
    unknown = sorted(set(found.classes) - set(training.classes))
    lacking = sorted(set(training.classes) - set(found.classes))
    parts = [f'{len(lacking)} classes of the training data are not in it ({_some(lacking)})'] if lacking else []
    parts += [f'{len(unknown)} classes are not in the training data ({_some(unknown)})'] if unknown else []
    lines.append(
      f'evaluators.{name}: ' + ('; '.join(parts) or 'the same classes in another order') + '; aligned by name'
    )
  return lines


def _parameters(run: Run) -> list[str]:
  params, optimizer = run.abstract_state.params, run.experiment.optimizer
  lines = [f'parameters: {parameter_count(params):,} are trained']
  if optimizer.weight_decay:
    lines.append(f'parameters: {_matched(params, optimizer.weight_decay_mask):,} of them have weight decay')
  for pattern, factor in optimizer.lr_multipliers:
    lines.append(
      f'parameters: {_matched(params, (pattern,)):,} match {pattern!r}, at {factor:g} times the learning rate'
    )
  return lines


def _matched(params: Any, patterns: Sequence[str]) -> int:
  sizes: list[int] = []

  def visit(path: str, x: Any) -> None:
    if any(re.fullmatch(pattern, path) for pattern in patterns):
      sizes.append(int(np.prod(x.shape)))

  map_by_path(visit, params)
  return sum(sizes)


def _initialized(run: Run, target: str, skip: Sequence[str]) -> list[str]:
  """Paths below `target` that keep their initialization, such as those of a new head."""
  paths: list[str] = []
  state = run.abstract_state
  map_by_path(lambda path, x: paths.append(path), {'params': state.params, 'extra': state.extra})
  below = [path.removeprefix(f'{target}/') for path in paths if path.startswith(f'{target}/')]
  return sorted(path for path in below if any(re.fullmatch(pattern, path) for pattern in skip))


def _differences(run: Run, target: str, workdir: str, part: str) -> list[str]:
  """Fields in which the networks of a warm start differ although their parameters fit, such as eps or activation."""
  path = epath.Path(workdir) / 'config.json'
  if not path.exists():  # what opens the weights says so
    return []
  saved = resolve(to_plain_dict(json.loads(path.read_text())))
  ours, theirs = _network(run.config, target), _network(saved, part)
  if ours is None or theirs is None:
    return []
  lines = []
  for field in sorted(set(ours) & set(theirs) - set(_HOW)):
    if ours[field] != theirs[field] and not isinstance(ours[field], dict):
      lines.append(f'{field} is {theirs[field]!r} there and {ours[field]!r} here')
  normalize = [config['objective'].get('normalize') for config in (saved, run.config)]
  if None not in normalize and normalize[0] != normalize[1]:
    lines.append(f'normalize is {normalize[0]} there and {normalize[1]} here')
  return lines


def _network(config: Mapping[str, Any], path: str) -> dict[str, Any] | None:
  """The description of the network whose parameters stand at a path such as 'params/image'; None for another part."""
  first, *rest = path.split('/')
  node = config['objective'].get('network') if first in ('params', 'whole') else None
  for name in rest:
    node = node.get(name) if isinstance(node, dict) else None
  return node if isinstance(node, dict) else None


def _some(names: Sequence[str]) -> str:
  return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')
