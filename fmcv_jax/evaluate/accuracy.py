"""Top-1 and top-5 accuracy of a classifier."""

import dataclasses

from fmcv_jax.data.loader import Pipeline
from fmcv_jax.evaluate.base import Evaluator, topk_accuracy


@dataclasses.dataclass(frozen=True)
class Accuracy(Evaluator):
  """Share of images whose label is the best, or among the five best, logits."""

  data: Pipeline
  batch_size: int = 256
  every: int = 0

  def __call__(self, subject):
    logits, _, labels = subject.map_dataset('logits', self.data, self.batch_size)
    return {'top1': topk_accuracy(logits, labels, 1), 'top5': topk_accuracy(logits, labels, 5)}
