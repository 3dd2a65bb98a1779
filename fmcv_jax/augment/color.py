"""Augmentations of color and sharpness: invert, solarize, color jitter, Gaussian blur."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.augment.base import Augment, bernoulli_mask, check_bounds, check_share
from fmcv_jax.bounds import Fraction, HueShift, NonNegativeFloat, PositiveFloat
from fmcv_jax.shapes import AnyArray, Bool, Float


@dataclasses.dataclass(frozen=True)
class Invert(Augment):
  """The negative of the image, with the given probability."""

  probability: Fraction = 0.5

  def __post_init__(self) -> None:
    check_share('probability', self.probability)

  @override
  def __call__(self, images: jax.Array, rng: jax.Array) -> jax.Array:
    return jnp.where(bernoulli_mask(rng, self.probability, images), 1 - images, images)


@dataclasses.dataclass(frozen=True)
class Solarize(Augment):
  """Inverts pixel values at or above the threshold, with the given probability (as in BYOL and DINO)."""

  threshold: Fraction = 0.5
  probability: Fraction = 0.2

  def __post_init__(self) -> None:
    check_share('threshold', self.threshold)
    check_share('probability', self.probability)

  @override
  def __call__(self, images: jax.Array, rng: jax.Array) -> jax.Array:
    solarized = bernoulli_mask(rng, self.probability, images) & (images >= self.threshold)
    return jnp.where(solarized, 1 - images, images)


@dataclasses.dataclass(frozen=True)
class ColorJitter(Augment):
  """Brightness, contrast, saturation and hue with torchvision's factors, then optional conversion to grayscale.

  brightness, contrast, saturation   the factor is drawn uniformly from [max(0, 1 - x), 1 + x]
  hue                                fraction of a full turn, at most 0.5, drawn from [-x, x]
  probability                        probability that an image is jittered
  grayscale                          probability that an image is converted to grayscale, jittered or not

  All factors of an image are combined into one 3 x 3 matrix and one offset. Three differences from torchvision: the
  order is fixed (as listed) instead of random; values may leave [0, 1] in between and are clipped once, at the end; and
  hue rotates colors about the gray axis of the RGB cube instead of in HSV, which preserves the channel mean.
  """

  brightness: NonNegativeFloat = 0.0
  contrast: NonNegativeFloat = 0.0
  saturation: NonNegativeFloat = 0.0
  hue: HueShift = 0.0
  grayscale: Fraction = 0.0
  probability: Fraction = 1.0

  def __post_init__(self) -> None:
    for name in ('brightness', 'contrast', 'saturation'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}: expected at least 0, got {getattr(self, name)}')
    if not 0 <= self.hue <= 0.5:
      raise ValueError(f'hue: expected a fraction of a turn between 0 and 0.5, got {self.hue}')
    check_share('grayscale', self.grayscale)
    check_share('probability', self.probability)

  @override
  def __call__(self, images: jax.Array, rng: jax.Array) -> jax.Array:
    batch = images.shape[0]
    rngs = jax.random.split(rng, 6)
    jittered = jax.random.bernoulli(rngs[0], self.probability, (batch,))

    def factor(rng: jax.Array, width: float) -> jax.Array:
      drawn = jax.random.uniform(rng, (batch,), minval=max(0.0, 1 - width), maxval=1 + width)
      return jnp.where(jittered, drawn, 1.0)

    brightness, contrast = factor(rngs[1], self.brightness), factor(rngs[2], self.contrast)
    saturation = factor(rngs[3], self.saturation)
    turn = jnp.where(jittered, jax.random.uniform(rngs[4], (batch,), minval=-self.hue, maxval=self.hue), 0.0)
    grayscale = jax.random.bernoulli(rngs[5], self.grayscale, (batch,))
    return apply_color_matrix(images, brightness, contrast, saturation, turn, grayscale)


LUMA = (0.299, 0.587, 0.114)


def apply_color_matrix(
  images: Float[AnyArray, 'batch height width 3'],
  brightness: Float[AnyArray, ' batch'],
  contrast: Float[AnyArray, ' batch'],
  saturation: Float[AnyArray, ' batch'],
  turn: Float[AnyArray, ' batch'],
  grayscale: Bool[AnyArray, ' batch'],
) -> Float[jax.Array, 'batch height width 3']:
  """Applies per-image factors, hue turns and grayscale flags, each [B], to images [B, H, W, 3]."""
  identity, luma = jnp.eye(3), jnp.broadcast_to(jnp.array(LUMA), (3, 3))

  def from_gray(factor: jax.Array) -> jax.Array:
    factor = factor[:, None, None]
    return factor * identity + (1 - factor) * luma

  # Rodrigues' formula for the axis (1, 1, 1).
  cos, sin = jnp.cos(2 * math.pi * turn)[:, None, None], jnp.sin(2 * math.pi * turn)[:, None, None]
  across = jnp.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
  hue = cos * identity + (1 - cos) / 3 + sin * across

  matrix = jnp.matmul(hue, from_gray(saturation), precision='highest')
  matrix = jnp.matmul(from_gray(1 - grayscale.astype(jnp.float32)), matrix, precision='highest')
  matrix *= (brightness * contrast)[:, None, None]
  # Contrast interpolates towards the mean gray of the image, which no later step changes.
  offset = brightness * (1 - contrast) * (images * jnp.array(LUMA)).sum(-1).mean((1, 2))

  red, green, blue = (images[..., channel, None] * matrix[:, None, None, :, channel] for channel in range(3))
  return jnp.clip(red + green + blue + offset[:, None, None, None], 0, 1)


@dataclasses.dataclass(frozen=True)
class Blur(Augment):
  """Gaussian blur with the given probability; sigma in pixels is drawn uniformly (as in SimCLR and DINO).

  The kernel radius is a twentieth of the short side, which gives 23 taps at 224 pixels as in SimCLR; the border is
  reflected. Each image has its own kernel, applied as one band matrix from the left and one from the right.
  """

  probability: Fraction = 0.5
  sigma: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)

  def __post_init__(self) -> None:
    check_share('probability', self.probability)
    check_bounds('sigma', self.sigma)

  @override
  def __call__(self, images: jax.Array, rng: jax.Array) -> jax.Array:
    drawn, sigma_rng = jax.random.split(rng)
    sigma = jax.random.uniform(sigma_rng, images.shape[:1], minval=self.sigma[0], maxval=self.sigma[1])
    return jnp.where(bernoulli_mask(drawn, self.probability, images), blurred(images, sigma), images)


def blurred(
  images: Float[AnyArray, 'batch height width channels'], sigma: Float[AnyArray, ' batch']
) -> Float[jax.Array, 'batch height width channels']:
  """Images [B, H, W, C] blurred by a Gaussian of sigma [B] pixels."""
  radius = max(1, min(images.shape[1:3]) // 20)

  def weights(size: int) -> jax.Array:  # [B, size, size], from the pixel in the last axis to the one before it
    to, source = jnp.arange(size)[:, None], jnp.arange(size)

    def tap(distance: Any) -> jax.Array:
      return jnp.exp(-0.5 * jnp.square(distance / sigma[:, None, None])) * (jnp.abs(distance) <= radius)

    before, beyond = tap(to + source) * (source > 0), tap(2 * (size - 1) - to - source) * (source < size - 1)
    kernel = tap(to - source) + before + beyond
    return kernel / kernel.sum(-1, keepdims=True)

  height, width = images.shape[1:3]
  images = jnp.einsum('bij,bjwc->biwc', weights(height), images, precision='highest')
  return jnp.clip(jnp.einsum('bij,bhjc->bhic', weights(width), images, precision='highest'), 0, 1)
