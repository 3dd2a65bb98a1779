"""k-nearest-neighbour classification of frozen features (Wu et al. 2018, as in DINO, Caron et al. 2021)."""

import dataclasses

import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import NonNegativeInt, PositiveFloat, PositiveInt
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.bank import check_bank, queries_and_bank
from fmcv_jax.evaluate.base import EvaluatedModel, Evaluator, Metrics, chunks


@dataclasses.dataclass(frozen=True)
class Knn(Evaluator):
  """Accuracy of a vote of the k nearest training images, weighted by exp(cosine / temperature).

  ks        numbers of neighbors, at most the number of images of `train_data`
  features  the evaluated output; 'pixels' is the baseline
  """

  data: Pipeline
  train_data: Pipeline
  ks: tuple[PositiveInt, ...] = (10, 20)
  temperature: PositiveFloat = 0.07
  features: str = 'features'
  batch_size: PositiveInt = 256
  every: NonNegativeInt = 0

  @override
  def prepare(self, subject: EvaluatedModel) -> None:
    images = len(self.train_data.source)
    if max(self.ks) > images:
      raise UserError(
        f'config.evaluators: knn.ks: {max(self.ks)} neighbors of {images} images of train_data; use at most {images}'
      )
    check_bank(subject, self)

  @override
  def __call__(self, subject: EvaluatedModel) -> Metrics:
    self.prepare(subject)
    queries, labels, bank, bank_labels = queries_and_bank(subject, self)
    return {f'k{k}_top1': knn_accuracy(queries, labels, bank, bank_labels, k, self.temperature) for k in self.ks}


def knn_accuracy(
  queries: np.ndarray, labels: np.ndarray, bank: np.ndarray, bank_labels: np.ndarray, k: int, temperature: float
) -> float:
  """Features [N, D] and [M, D] with labels [N] and [M] -> accuracy of the weighted vote over the queries."""
  queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
  bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
  k, classes = min(k, len(bank)), int(max(labels.max(), bank_labels.max())) + 1
  right = 0
  for piece in chunks(len(queries), 1024):
    similarity = queries[piece] @ bank.T
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    weights = np.exp(np.take_along_axis(similarity, nearest, axis=1) / temperature)
    votes = np.zeros((len(nearest), classes))
    np.add.at(votes, (np.arange(len(nearest))[:, None], bank_labels[nearest]), weights)
    right += int((votes.argmax(axis=1) == labels[piece]).sum())
  return right / len(queries)
