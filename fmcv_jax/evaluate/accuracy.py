"""Top-1 and top-5 accuracy of a classifier."""

import dataclasses

from typing_extensions import override

from fmcv_jax.bounds import NonNegativeInt, PositiveInt
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.evaluate.base import EvaluatedModel, Evaluator, Metrics, topk_accuracy
from fmcv_jax.evaluate.labels import align_labels, check_labels


@dataclasses.dataclass(frozen=True)
class Accuracy(Evaluator):
  """Fraction of images whose label has the largest logit, or one of the five largest.

  The labels are matched with the training classes by name, where both have names.
  """

  data: Pipeline
  batch_size: PositiveInt = 256
  every: NonNegativeInt = 0

  @override
  def prepare(self, subject: EvaluatedModel) -> None:
    subject.check_dataset('logits', self.data, self.batch_size, truth=('label',))

  @override
  def __call__(self, subject: EvaluatedModel) -> Metrics:
    logits, _, truth = subject.map_dataset('logits', self.data, self.batch_size, truth=('label',))
    labels = align_labels(truth['label'], self.data.source.names, subject.class_names(), 'the training data')
    check_labels(labels, logits.shape[1])
    return {'top1': topk_accuracy(logits, labels, 1), 'top5': topk_accuracy(logits, labels, 5)}
