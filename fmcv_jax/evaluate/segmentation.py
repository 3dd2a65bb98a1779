"""Semantic segmentation as it is scored since PASCAL VOC (Everingham et al. 2010): mean intersection over union."""

import dataclasses

import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import NonNegativeInt, PositiveInt
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.evaluate.base import EvaluatedModel, Evaluator, Metrics


@dataclasses.dataclass(frozen=True)
class MeanIou(Evaluator):
  """Intersection over union of each class over all pixels of the data, and its mean over the classes that occur."""

  data: Pipeline
  batch_size: PositiveInt = 64
  every: NonNegativeInt = 0

  @override
  def prepare(self, subject: EvaluatedModel) -> None:
    subject.check_dataset('confusion', self.data, self.batch_size)

  @override
  def __call__(self, subject: EvaluatedModel) -> Metrics:
    counts = subject.map_dataset('confusion', self.data, self.batch_size).values
    return ious(counts.sum(0, dtype=np.int64))


def ious(confusion: np.ndarray) -> dict[str, float]:
  """From how many pixels of class i were taken for class j [i, j]; a class neither true nor found is left out."""
  right, true, found = np.diag(confusion), confusion.sum(1), confusion.sum(0)
  union = true + found - right
  iou = right[union > 0] / union[union > 0]
  return {'mean_iou': float(iou.mean()), 'pixel_accuracy': float(right.sum() / confusion.sum())}
