"""The space in which a diffusion runs: pixels, or the latents of a frozen autoencoder (Rombach et al. 2022)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.bounds import Finite, PositiveFloat
from fmcv_jax.models.generative.autoencoder import Autoencoder, Gaussian


@dataclasses.dataclass(frozen=True)
class LatentSpace:
  """x = (latent - shift) * scale of an autoencoder's latents; x = the normalized image where there is no autoencoder.

  autoencoder  frozen, its parameters at 'extra/autoencoder' (by init_from)
  scale        usually one over the standard deviation of the latents
  shift        usually the mean of the latents
  precomputed  the batch holds `latents` (`moments`, written by `fmcv precompute latents`) instead of images
  """

  autoencoder: nn.Module | None = None
  scale: PositiveFloat = 1.0
  shift: Finite = 0.0
  precomputed: bool = False

  def __post_init__(self) -> None:
    if self.autoencoder is not None and not isinstance(self.autoencoder, Autoencoder):
      raise ValueError('autoencoder: needs autoencoder.name=autoencoder')
    if self.precomputed and self.autoencoder is None:
      raise ValueError('precomputed: latents are those of an autoencoder; set autoencoder')

  def check(self, input_shape: tuple[int, ...]) -> None:
    """ValueError unless a network whose x has this shape fits the latents."""
    coder: Any = self.autoencoder
    if coder is not None and coder.latent_shape != input_shape:
      raise ValueError(
        f'network: input_shape is {input_shape}, but the latents of the autoencoder have the shape {coder.latent_shape}'
      )

  def image_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one image whose x has `input_shape`."""
    coder: Any = self.autoencoder
    return input_shape if coder is None else coder.input_shape

  def example_fields(self, input_shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch field that x is made from."""
    if self.precomputed:
      *sides, channels = input_shape
      return {'latents': jax.ShapeDtypeStruct((*sides, 2 * channels), jnp.float16)}
    return {'image': jax.ShapeDtypeStruct(self.image_shape(input_shape), jnp.uint8)}

  def init(self, rng: jax.Array, images: jax.Array) -> dict[str, Any]:
    """Parameters, to be kept in `extra`."""
    assert self.autoencoder is not None
    return {'autoencoder': self.autoencoder.init(rng, images)['params']}

  def moments(self, extra: Any, images: jax.Array) -> jax.Array:
    """Means and log variances of the latents of normalized images: float32 [B, h, w, 2 z], what `latents` holds."""
    latent = self._encoded(extra, images)
    return jnp.concatenate([latent.mean, latent.log_variance], axis=-1)

  def encode(self, extra: Any, images: jax.Array, rng: jax.Array | None = None) -> jax.Array:
    """x of normalized images; with an rng from a sample of each latent, without one from its mean."""
    if self.autoencoder is None:
      return images
    latent = self._encoded(extra, images)
    return self._scaled(latent.mean if rng is None else latent.sample(rng))

  def sample(self, latents: jax.Array, rng: jax.Array) -> jax.Array:
    """x of precomputed `moments` [B, ..., 2 z] of any precision."""
    return self._scaled(Gaussian(*jnp.split(latents.astype(jnp.float32), 2, axis=-1)).sample(rng))

  def decode(self, extra: Any, x: jax.Array) -> jax.Array:
    """Normalized images of x."""
    if self.autoencoder is None:
      return x
    latent = x / self.scale + self.shift
    return self.autoencoder.apply({'params': extra['autoencoder']}, latent, method='decode')  # type: ignore[return-value]

  def _encoded(self, extra: Any, images: jax.Array) -> Gaussian:
    assert self.autoencoder is not None
    return self.autoencoder.apply({'params': extra['autoencoder']}, images, method='encode')  # type: ignore[return-value]

  def _scaled(self, latent: jax.Array) -> jax.Array:
    return (latent - self.shift) * self.scale
