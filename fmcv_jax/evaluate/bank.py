"""Frozen features of an evaluation set and of the labeled bank that it is compared with."""

from typing import Any, Protocol

import numpy as np

from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.evaluate.base import EvaluatedModel
from fmcv_jax.evaluate.labels import align_labels, check_labels


class BankEvaluator(Protocol):
  """Fields of an evaluator that classifies `data` by the labeled features of `train_data`."""

  @property
  def data(self) -> Pipeline:
    """Images to classify."""

  @property
  def train_data(self) -> Pipeline:
    """Labeled images, the bank."""

  @property
  def features(self) -> str:
    """Name of the output that is compared."""

  @property
  def batch_size(self) -> int:
    """Images (of all processes) in one pass."""


def check_bank(model: EvaluatedModel, evaluator: BankEvaluator) -> None:
  """Raises the UserErrors of `queries_and_bank` that are known before a pass over the data."""
  for pipeline in (evaluator.data, evaluator.train_data):
    model.check_dataset(evaluator.features, pipeline, evaluator.batch_size, truth=('label',))


def queries_and_bank(model: EvaluatedModel, evaluator: BankEvaluator) -> tuple[Any, np.ndarray, Any, np.ndarray]:
  """Features [N, D] and labels [N] of `data`, features [M, D] and labels [M] of `train_data`.

  The labels of `data` are in the numbering of `train_data`, joined by class name where both have names.
  """
  queries, bank = (
    model.map_dataset(evaluator.features, pipeline, evaluator.batch_size, truth=('label',))
    for pipeline in (evaluator.data, evaluator.train_data)
  )
  names, bank_names = (pipeline.source.names for pipeline in (evaluator.data, evaluator.train_data))
  labels = align_labels(queries.truth['label'], names, bank_names, 'train_data')
  bank_labels = bank.truth['label']
  check_labels(np.concatenate([labels, bank_labels]), len(bank_names) or int(max(labels.max(), bank_labels.max())) + 1)
  return queries.values, labels, bank.values, bank_labels
