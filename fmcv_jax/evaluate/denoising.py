"""Held-out denoising error of a diffusion model, per noise level."""

import dataclasses

from fmcv_jax.bounds import NonNegativeInt, PositiveInt
from fmcv_jax.data.loader import Pipeline
from fmcv_jax.evaluate.base import Evaluator


@dataclasses.dataclass(frozen=True)
class Denoising(Evaluator):
  """Mean squared error of the network output over all images, and at several noise levels.

  'level0' is the lowest noise. The noise of each record is the same in every evaluation, so metrics are comparable.
  """

  data: Pipeline
  batch_size: PositiveInt = 256
  every: NonNegativeInt = 0

  def __call__(self, subject):
    errors = subject.map_dataset('denoising_errors', self.data, self.batch_size).values
    by_level = errors.mean(axis=0)
    return {'error': float(errors.mean()), **{f'level{i}': float(error) for i, error in enumerate(by_level)}}
