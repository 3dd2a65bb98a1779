"""Adapter files (LoRA and its relatives) on the model of a workdir."""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel
from fmcv_jax.parallel.rules import path_of
from fmcv_jax.pretrained.families import FAMILIES, family_of, variant_of
from fmcv_jax.pretrained.layout import Layout, has_places, renamed
from fmcv_jax.pretrained.lora import metadata
from fmcv_jax.pretrained.lora.adapter_file import AdapterFile
from fmcv_jax.pretrained.lora.merge import merge
from fmcv_jax.pretrained.textual_inversion import is_inversion
from fmcv_jax.run import Run

logger = logging.getLogger(__name__)

Adapters = Sequence[str | os.PathLike[str] | tuple[str | os.PathLike[str], float]]
_NOT_OF_TORCH = ('augreg', 'big_vision')  # formats of JAX programs, for which no adapters are published


def file_and_scale(given: str) -> tuple[str, float]:
  """'FILE:0.8' -> ('FILE', 0.8), and 'FILE' -> ('FILE', 1.0); a file whose name has the colon comes first."""
  file, colon, number = given.rpartition(':')
  if not colon or os.path.exists(given):
    return given, 1.0
  try:
    return file, float(number)
  except ValueError:
    return given, 1.0


def add_adapters(run: Run, subject: EvaluatedModel, adapters: Adapters) -> None:
  """Merges adapters, in their order, into the weights of a restored model, and logs what was assumed.

  adapters  files or folders, each alone (scale 1) or with its scale

  The sum is computed in float32 and rounded once to the dtype of the weights. UserError for a file of another network,
  and for a model whose layers no layout names.
  """
  if not (given := _pairs(adapters)):
    return
  objective: Any = run.experiment.objective
  if hasattr(objective, 'objective'):
    raise UserError(
      f'{run.workdir}: is a run of partial fine-tuning; export it as a whole model, import that, and give its folder'
    )
  leaves = by_path(subject.params, subject.extra)
  own = {path: leaf for path, leaf in leaves.items() if path.split('/')[0] not in objective.training_only}
  if any(path.startswith('control/') for path in own):  # which has layers of the same names as its UNet
    raise UserError(f'{run.workdir}: is a ControlNet; merge adapters into its base model, and take that by init_from')
  family, named = family_and_layouts(run, own)
  layouts = [layout for _, layout in named]
  process = getattr(objective, 'process', None)
  current: dict[str, Any] = dict(own)
  changed: dict[str, Any] = {}
  for file, scale in given:
    if is_inversion(file):
      raise UserError(f'{file}: is a textual inversion: it adds words to a model; import it with --onto')
    adapter = AdapterFile(file)
    prediction = None if process is None else process.prediction
    metadata.check(adapter.metadata, family, prediction, adapter.file, str(run.workdir))
    merged = merge(adapter, scale, layouts, current, str(run.workdir))
    for note in adapter.notes:
      logger.warning('%s', note)
    current |= merged
    changed |= merged
  placed = {path: jax.device_put(x.astype(leaves[path].dtype), leaves[path].sharding) for path, x in changed.items()}
  _replace(subject, placed)


def _pairs(adapters: Adapters) -> list[tuple[str, float]]:
  """(file, scale) of each; UserError for anything but paths and pairs of a path and a number."""
  found = []
  for one in [adapters] if isinstance(adapters, str | os.PathLike) else adapters:
    file, scale = one if isinstance(one, tuple | list) and len(one) == 2 else (one, 1.0)
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool) and math.isfinite(scale)
    if not isinstance(file, str | os.PathLike) or not is_number:
      raise UserError(f'lora: expected paths, or pairs of a path and a scale, got {one!r}')
    found.append((os.fspath(file), float(scale)))
  return found


def family_and_layouts(run: Run, own: Mapping[str, Any]) -> tuple[str, list[tuple[str, Layout]]]:
  """The family of a model, and (format, layout) of those that have places for all that it trains.

  own  arrays of the whole network by path, see `by_path`
  """
  params = {path: tuple(x.shape) for path, x in own.items() if not path.startswith('extra/')}
  frozen = {path: tuple(x.shape) for path, x in own.items() if path.startswith('extra/')}
  family = family_of(params, variant_of(run.config['objective']))
  found = []
  for format, layout in FAMILIES[family].layouts:
    if format in _NOT_OF_TORCH:
      continue
    if any(path.startswith('text/') for path in params):  # a text tower that is trained with its UNet
      layout = renamed(layout, {'extra/text/': 'text/'})
    placed = {row.ours for row in layout.rows}
    if has_places(layout, params | {path: shape for path, shape in frozen.items() if path in placed}):
      found.append((format, layout))
  if not found:
    raise UserError(f'{run.workdir}: no layout of {family!r} has names for all layers of this network')
  return family, found


def by_path(params: Any, extra: Any) -> dict[str, Any]:
  """Arrays by path, 'extra/...' for those of frozen networks."""
  flat = jax.tree_util.tree_flatten_with_path({'params': params, 'extra': extra})[0]
  return {path_of(path).removeprefix('params/'): leaf for path, leaf in flat}


def _replace(subject: EvaluatedModel, new: Mapping[str, jax.Array]) -> None:
  tree = jax.tree_util.tree_map_with_path(
    lambda path, leaf: new.get(path_of(path).removeprefix('params/'), leaf),
    {'params': subject.params, 'extra': subject.extra},
  )
  subject.params, subject.extra = tree['params'], tree['extra']
