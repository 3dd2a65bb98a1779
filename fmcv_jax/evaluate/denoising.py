"""Held-out denoising error of a diffusion model, per noise level."""

import dataclasses

from typing_extensions import override

from fmcv_jax.bounds import NonNegativeInt, PositiveInt
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.evaluate.base import EvaluatedModel, Evaluator, Metrics


@dataclasses.dataclass(frozen=True)
class Denoising(Evaluator):
  """Mean squared error of the network output over all images, and at several noise levels.

  'level0' is the lowest noise. The noise of each record is the same in every evaluation, so metrics are comparable.
  """

  data: Pipeline
  batch_size: PositiveInt = 256
  every: NonNegativeInt = 0

  @override
  def prepare(self, subject: EvaluatedModel) -> None:
    subject.check_dataset('denoising_errors', self.data, self.batch_size)

  @override
  def __call__(self, subject: EvaluatedModel) -> Metrics:
    errors = subject.map_dataset('denoising_errors', self.data, self.batch_size).values
    by_level = errors.mean(axis=0)
    return {'error': float(errors.mean()), **{f'level{i}': float(error) for i, error in enumerate(by_level)}}
