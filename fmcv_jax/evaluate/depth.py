"""Depth against measured depth, as it is scored since Eigen et al. 2014, after an alignment where depth is relative."""

import dataclasses
from typing import Literal

import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import NonNegativeInt, PositiveFloat, PositiveInt
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel, Evaluator, Metrics
from fmcv_jax.objectives.outputs import listed

Alignment = Literal['auto', 'none', 'median', 'least_squares']


@dataclasses.dataclass(frozen=True)
class Depth(Evaluator):
  """Errors of depth over the valid pixels of each image, averaged over the images that have any.

  `abs_rel` mean |p - t| / t, `rmse` in meters, `log10` mean |log10(p / t)|, and `delta1` to `delta3`, the shares of
  pixels with max(p / t, t / p) below 1.25, 1.25^2 and 1.25^3.

  alignment  'none'; 'median' scales the depth of each image to the median of the truth; 'least_squares' fits a scale
             and a shift for each image, in inverse depth where the model predicts that; 'auto' is 'least_squares' for
             inverse depth and 'none' for metric depth
  min_depth, max_depth  meters: pixels whose true depth lies outside are left out, and predictions are clipped to them

  The truth has the resolution of the network's input, each pixel that of the nearest measured one.
  """

  data: Pipeline
  alignment: Alignment = 'auto'
  min_depth: PositiveFloat = 1e-3
  max_depth: PositiveFloat = 80.0
  batch_size: PositiveInt = 16
  every: NonNegativeInt = 0

  def __post_init__(self) -> None:
    if self.min_depth >= self.max_depth:
      raise ValueError(f'min_depth: {self.min_depth:g} is not below max_depth={self.max_depth:g}')

  @override
  def prepare(self, subject: EvaluatedModel) -> None:
    name = self._output(subject)
    if name == 'inverse_depth' and self.alignment == 'none':
      raise UserError("alignment: inverse depth has no unit; 'least_squares' or 'median' aligns it to the truth")
    subject.check_dataset(name, self.data, self.batch_size, ('depth',))

  @override
  def __call__(self, subject: EvaluatedModel) -> Metrics:
    name = self._output(subject)
    rows = []
    for values, fields in subject.map_batches((name,), self.data, self.batch_size, ('depth',)):
      for found, truth, real in zip(values[name], fields['depth'], fields['mask'], strict=True):
        valid = np.isfinite(truth) & (truth >= self.min_depth) & (truth <= self.max_depth)
        if real and valid.any():
          aligned = self._aligned(found[valid].astype(np.float64), truth[valid].astype(np.float64), name)
          rows.append(depth_errors(np.clip(aligned, self.min_depth, self.max_depth), truth[valid]))
    if not rows:
      raise UserError(
        f'no image has a pixel with a depth from min_depth={self.min_depth:g} to max_depth={self.max_depth:g}'
      )
    means = {figure: float(np.mean([row[figure] for row in rows])) for figure in rows[0]}
    return {**means, 'images': float(len(rows))}

  def _output(self, subject: EvaluatedModel) -> str:
    for name in ('depth', 'inverse_depth'):
      if name in subject.outputs:
        return name
    raise UserError(f'this model does not predict depth; its outputs are {listed(subject.outputs)}')

  def _aligned(self, found: np.ndarray, truth: np.ndarray, name: str) -> np.ndarray:
    """Depth in meters of the valid pixels of an image, float64 [N]."""
    alignment = self.alignment
    inverse = name == 'inverse_depth'
    if alignment == 'auto':
      alignment = 'least_squares' if inverse else 'none'
    if alignment == 'least_squares':
      scale, shift = fit(found, 1 / truth if inverse else truth)
      found = scale * found + shift
    depth = 1 / np.maximum(found, 1 / self.max_depth if alignment == 'least_squares' else 1e-9) if inverse else found
    return depth * (np.median(truth) / np.median(depth)) if alignment == 'median' else depth


def fit(x: np.ndarray, target: np.ndarray) -> tuple[float, float]:
  """(scale, shift) that minimize the squared error of scale * x + shift; (0, mean of the target) for constant x."""
  spread = x - x.mean()
  variance = float(spread @ spread)
  scale = float(spread @ (target - target.mean())) / variance if variance > 0 else 0.0
  return scale, float(target.mean() - scale * x.mean())


def depth_errors(found: np.ndarray, truth: np.ndarray) -> Metrics:
  """Errors of positive depths [N] in meters; see `Depth`."""
  ratio = np.maximum(found / truth, truth / found)
  return {
    'abs_rel': float(np.mean(np.abs(found - truth) / truth)),
    'rmse': float(np.sqrt(np.mean((found - truth) ** 2))),
    'log10': float(np.mean(np.abs(np.log10(found / truth)))),
    **{f'delta{power}': float(np.mean(ratio < 1.25**power)) for power in (1, 2, 3)},
  }
