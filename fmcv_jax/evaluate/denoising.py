"""How well a diffusion model denoises what it has not seen, by how noisy that is."""

import dataclasses

from fmcv_jax.data.loader import Pipeline
from fmcv_jax.evaluate.base import Evaluator


@dataclasses.dataclass(frozen=True)
class Denoising(Evaluator):
  """Mean squared error of the network's output over all images, and at each of several levels of noise.

  'level0' is the least. Each record meets the same noise every time, so that figures can be compared.
  """

  data: Pipeline
  batch_size: int = 256
  every: int = 0

  def __call__(self, subject):
    errors = subject.map_dataset('denoising_errors', self.data, self.batch_size).values
    by_level = errors.mean(axis=0)
    return {'error': float(errors.mean()), **{f'level{i}': float(error) for i, error in enumerate(by_level)}}
