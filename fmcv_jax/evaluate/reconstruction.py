"""How well an autoencoder gives pictures back: PSNR, and SSIM (Wang et al. 2004)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fmcv_jax.data.loader import Pipeline
from fmcv_jax.evaluate.base import Evaluator
from fmcv_jax.evaluate.distances import fid
from fmcv_jax.evaluate.feature_extractor import FeatureExtractor


@dataclasses.dataclass(frozen=True)
class Reconstruction(Evaluator):
  """Means over the images of PSNR (dB) and SSIM; latent_std is the standard deviation of all latents' values, whose
  inverse is the `latent_space.scale` for a diffusion on them. With the workdir of a `judge`, also 'rfid', the FID of
  what is given back, by its features."""

  data: Pipeline
  judge: str | None = None
  batch_size: int = 256
  every: int = 0

  def prepare(self, subject):
    if self.judge is not None:
      FeatureExtractor(subject, self.judge, self.batch_size)

  def __call__(self, subject):
    made, _, fields = subject.map_dataset('reconstruction', self.data, self.batch_size, truth=('image',))
    true = fields['image'].astype(np.float32) / 255
    latent = subject.map_dataset('latent', self.data, self.batch_size).values
    figures = {
      'psnr': float(psnr(true, made).mean()),
      'ssim': float(np.mean([ssim(a, b) for a, b in zip(true, made, strict=True)])),
      'latent_std': float(latent.std()),
    }
    if self.judge is not None:
      look = FeatureExtractor(subject, self.judge, self.batch_size)
      figures['rfid'] = fid(*(look(np.round(255 * x).astype(np.uint8)) for x in (made, true)))
    return figures


def psnr(true: np.ndarray, made: np.ndarray) -> np.ndarray:
  """Peak signal-to-noise ratio in dB of images [N, H, W, C] in [0, 1], [N]; 100 for equal ones."""
  error = np.square(true.astype(np.float64) - made).mean((1, 2, 3))
  return -10 * np.log10(np.maximum(error, 1e-10))


def ssim(true: np.ndarray, made: np.ndarray) -> float:
  """Structural similarity of two images [H, W, C] in [0, 1], both sides at least 11: the mean over channels and over
  windows, Gaussian of 11 x 11 pixels and standard deviation 1.5, that lie within."""
  return float(_ssim(jnp.asarray(true), jnp.asarray(made)))


@jax.jit
def _ssim(true, made):
  weights = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
  line = jnp.asarray(weights / weights.sum(), jnp.float32)

  def blurred(x):
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
