"""Segments of images, with a model of the objective `mask_prediction` or `segmentation`."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from fmcv_jax.data.geometry import Geometry
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.evaluate.base import EvaluatedModel
from fmcv_jax.evaluate.segments import (
  THRESHOLD,
  Segments,
  class_segments,
  instance_segments,
  panoptic_segments,
  resized_segments,
)
from fmcv_jax.fields import height_width
from fmcv_jax.objectives.base import Objective
from fmcv_jax.objectives.mask_prediction import MaskPrediction, Task
from fmcv_jax.objectives.outputs import listed


class Segmenter:
  """The segmentation of an `EvaluatedModel`, over all of its devices; `batch` is the global batch size.

  objective  that of the model, which says what its segments are
  names      of the classes by number; () where they have none

  UserError for a model that does not segment images.
  """

  def __init__(self, subject: EvaluatedModel, objective: Objective, names: Sequence[str], batch: int):
    self._subject, self._names, self._batch = subject, tuple(names), batch
    self._objective = getattr(objective, 'objective', objective)  # of one that trains a part of another's parameters
    if 'mask_queries' in subject.outputs:
      self._outputs: tuple[str, ...] = ('mask_queries',)
    elif {'segments', 'segment_scores'} <= set(subject.outputs):
      self._outputs = ('segments', 'segment_scores')
    else:
      raise UserError(f'this model does not segment images; its outputs are {listed(subject.outputs)}')

  def segment(self, data: Pipeline, task: Task | None, threshold: float | None) -> Iterator[Segments | None]:
    """The segments of each image; None for one that cannot be read. See `Model.segment` for the arguments."""
    own, of_queries = self._objective, isinstance(self._objective, MaskPrediction)
    task = task or (own.task if isinstance(own, MaskPrediction) else 'semantic')
    known = get_args(Task) if of_queries else ('semantic',)
    if task not in known:
      raise UserError(f'task: {task!r} is not one of {", ".join(known)}; {did_you_mean(task, known)}')
    if threshold is not None and task == 'semantic':
      raise UserError('threshold: semantic segments have none; every pixel has a class')
    if threshold is not None and not 0 <= threshold <= 1:
      raise UserError(f'threshold: expected a number from 0 to 1, got {threshold}')
    return self._segments(data, task, THRESHOLD if threshold is None else threshold)

  def _segments(self, data: Pipeline, task: Task, threshold: float) -> Iterator[Segments | None]:
    size = height_width(self._subject.image_size or (1, 1))
    for record in self._subject.map_records(self._outputs, data, self._batch, ('geometry',)):
      if record is None:
        yield None
        continue
      found = self._of_image(record, Geometry.of(record['geometry'], size), task, threshold)
      names = tuple(self._names[label] if label < len(self._names) else str(label) for label in found.labels.tolist())
      yield dataclasses.replace(found, names=names)

  def _of_image(self, record: Mapping[str, Any], geometry: Geometry, task: Task, threshold: float) -> Segments:
    if 'mask_queries' not in record:
      return resized_segments(record['segments'], record['segment_scores'], geometry)
    queries, stuff = record['mask_queries'], getattr(self._objective, 'stuff', ())
    logits = queries['class_logits'], queries['mask_logits']
    if task == 'semantic':
      return class_segments(*logits, geometry)
    return (panoptic_segments if task == 'panoptic' else instance_segments)(*logits, geometry, threshold, stuff)
