"""Zero-shot classification by names (Radford et al. 2021, section 3.1)."""

import dataclasses

import numpy as np

from fmcv_jax.data.loader import Pipeline
from fmcv_jax.evaluate.base import EvaluatedModel, Evaluator, topk_accuracy


@dataclasses.dataclass(frozen=True)
class ZeroShot(Evaluator):
  """Names every image by the nearest of the source's class names, each the mean of its `templates`' embeddings."""

  data: Pipeline
  templates: tuple[str, ...] = ('{}',)
  batch_size: int = 256
  every: int = 0

  def __call__(self, subject):
    images, _, labels = subject.map_dataset('embed_image', self.data, self.batch_size)
    scores = images @ class_embeddings(subject, self.data.source.names, self.templates, self.batch_size).T
    return {'top1': topk_accuracy(scores, labels, 1), 'top5': topk_accuracy(scores, labels, 5)}


def class_embeddings(subject: EvaluatedModel, names, templates, batch: int) -> np.ndarray:
  """float32 [classes, E]: the unit-length mean over templates of the text embeddings of each name."""
  if not names:
    raise ValueError('zero-shot classification needs a source with class names')
  texts = [template.format(name) for name in names for template in templates]
  embeddings = subject.embed_texts(texts, batch).reshape(len(names), len(templates), -1).mean(axis=1)
  return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
