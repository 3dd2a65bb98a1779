"""Reconstruction metrics of autoencoders: PSNR, SSIM (Wang et al. 2004) and rFID."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import NonNegativeInt, PositiveInt
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.evaluate.base import EvaluatedModel, Evaluator, Metrics
from fmcv_jax.evaluate.distances import fid
from fmcv_jax.evaluate.feature_extractor import FeatureExtractor


@dataclasses.dataclass(frozen=True)
class Reconstruction(Evaluator):
  """Mean PSNR (dB) and SSIM over the images, and 'latent_std', the standard deviation of all latent values, whose
  inverse is the `latent_space.scale` of a latent diffusion model. With the workdir of a `feature_extractor` also
  'rfid', the FID of the reconstructions."""

  data: Pipeline
  feature_extractor: str | None = None
  batch_size: PositiveInt = 256
  every: NonNegativeInt = 0

  @override
  def prepare(self, subject: EvaluatedModel) -> None:
    subject.check_dataset('reconstruction', self.data, self.batch_size, truth=('image',))
    if self.feature_extractor is not None:
      FeatureExtractor(subject, self.feature_extractor, self.batch_size)

  @override
  def __call__(self, subject: EvaluatedModel) -> Metrics:
    made, _, fields = subject.map_dataset('reconstruction', self.data, self.batch_size, truth=('image',))
    true = fields['image'].astype(np.float32) / 255
    latent = subject.map_dataset('latent', self.data, self.batch_size).values
    metrics = {
      'psnr': float(psnr(true, made).mean()),
      'ssim': float(np.mean([ssim(a, b) for a, b in zip(true, made, strict=True)])),
      'latent_std': float(latent.std()),
    }
    if self.feature_extractor is not None:
      extractor = FeatureExtractor(subject, self.feature_extractor, self.batch_size)
      metrics['rfid'] = fid(*(extractor(np.round(255 * x).astype(np.uint8)) for x in (made, true)))
    return metrics


def psnr(true: np.ndarray, made: np.ndarray) -> np.ndarray:
  """Peak signal-to-noise ratio in dB, [N], of images [N, H, W, C] in [0, 1]; 100 for identical images."""
  error = np.square(true.astype(np.float64) - made).mean((1, 2, 3))
  return -10 * np.log10(np.maximum(error, 1e-10))


def ssim(true: np.ndarray, made: np.ndarray) -> float:
  """Structural similarity of two images [H, W, C] in [0, 1], both sides at least 11: the mean over channels and over
  windows, Gaussian of 11 x 11 pixels and standard deviation 1.5, that lie within."""
  return float(_ssim(jnp.asarray(true), jnp.asarray(made)))


@jax.jit
def _ssim(true: jax.Array, made: jax.Array) -> jax.Array:
  weights = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
  line = jnp.asarray(weights / weights.sum(), jnp.float32)

  def blurred(x: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, -1, 0)[..., None]  # channels as a batch
    for shape in ((11, 1, 1, 1), (1, 11, 1, 1)):
      x = jax.lax.conv_general_dilated(
        x, line.reshape(shape), (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision='highest'
      )
    return x

  a, b = blurred(true), blurred(made)
  var_a, var_b = blurred(true * true) - a * a, blurred(made * made) - b * b
  covariance = blurred(true * made) - a * b
  c1, c2 = 0.01**2, 0.03**2
  return jnp.mean((2 * a * b + c1) * (2 * covariance + c2) / ((a * a + b * b + c1) * (var_a + var_b + c2)))
