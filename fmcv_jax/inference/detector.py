"""Objects in images by texts or by example images, with a model of the objective `detection`."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fmcv_jax.data.geometry import original_boxes
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel
from fmcv_jax.evaluate.zero_shot import class_embeddings
from fmcv_jax.fields import height_width
from fmcv_jax.objectives.outputs import listed


class DetectedObject(NamedTuple):
  """An object in an image.

  label  the text, or the name of the example image, that it was found by
  score  from 0 to 1
  box    left, top, right, bottom in pixels of the upright image
  """

  label: str
  score: float
  box: tuple[float, float, float, float]


def check_queries(labels: Sequence[str], threshold: float) -> None:
  """Raises UserError for a text or example that is empty or given twice, and a threshold outside of 0 to 1."""
  for at, label in enumerate(labels):
    if not label.strip():
      raise UserError('texts: one of them is empty; remove it')
    if label in labels[:at]:
      raise UserError(f'texts: {label!r} is given twice, and its objects would be found twice; remove one')
  if not 0 <= threshold <= 1:
    raise UserError(f'threshold: expected a number from 0 to 1, got {threshold}')


class Detector:
  """The detector of an `EvaluatedModel`, over all of its devices; `batch` is the global batch size.

  UserError for a model that does not detect objects by texts.
  """

  def __init__(self, subject: EvaluatedModel, batch: int):
    if 'detections' not in subject.outputs or 'query_embeddings' not in subject.outputs['detections'].reads:
      raise UserError(f'this model does not detect objects by texts; its outputs are {listed(subject.outputs)}')
    self._subject, self._batch = subject, batch

  def embed_texts(self, texts: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """float32 [N, E], each the mean over the templates."""
    return class_embeddings(self._subject, texts, templates, self._batch)

  def embed_examples(self, data: Pipeline) -> np.ndarray:
    """float32 [N, E] of images that each show an example of what to find."""
    if 'embed_object' not in self._subject.outputs:
      raise UserError('like: this model was trained without objectness, and cannot tell the object of an example image')
    found, indices, _ = self._subject.map_dataset('embed_object', data, self._batch)
    if len(indices) < len(data.source):
      lost = min(set(range(len(data.source))) - set(indices.tolist()))
      raise UserError(f'like: {data.source.key_of(lost)} cannot be read')
    return found

  def detect(
    self, data: Pipeline, queries: np.ndarray, labels: Sequence[str], threshold: float
  ) -> Iterator[list[DetectedObject] | None]:
    """For each image the objects with at least the score `threshold`, best first; None for one that cannot be read.

    Boxes are cut at the edges of the image, and those that lie in its padding are left out.

    queries  float32 [Q, E], `labels` their Q names
    """
    size, remaining = height_width(self._subject.image_size or (1, 1)), len(data.source)
    shared = {'query_embeddings': queries}
    batches = self._subject.map_batches(('detections',), data, self._batch, ('geometry',), shared=shared)
    for values, fields in batches:
      found = values['detections']
      boxes = original_boxes(found['boxes'], fields['geometry'], size)
      for row in range(min(self._batch, remaining)):
        if not fields['mask'][row]:
          yield None
          continue
        inside = (boxes[row][:, 2:] > boxes[row][:, :2]).all(axis=-1)
        kept = inside & (found['scores'][row] >= threshold)
        scores, classes = found['scores'][row][kept], found['classes'][row][kept]
        yield [
          DetectedObject(labels[number], float(score), (float(left), float(top), float(right), float(bottom)))
          for (left, top, right, bottom), score, number in zip(boxes[row][kept], scores, classes, strict=True)
        ]
      remaining -= self._batch
