"""Normalization of images by channel; published statistics are in `fmcv_jax.dataset_statistics`."""

import dataclasses

import jax
import jax.numpy as jnp

from fmcv_jax.bounds import Finite, PositiveFloat


@dataclasses.dataclass(frozen=True)
class Normalize:
  """(x - mean) / std by channel of images in [0, 1]; the default maps them to [-1, 1]."""

  mean: tuple[Finite, Finite, Finite] = (0.5, 0.5, 0.5)
  std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.5, 0.5, 0.5)

  def __call__(self, images: jax.Array) -> jax.Array:
    return (images - jnp.array(self.mean, images.dtype)) / jnp.array(self.std, images.dtype)

  def undo(self, images: jax.Array) -> jax.Array:
    """Back to [0, 1]."""
    return images * jnp.array(self.std, images.dtype) + jnp.array(self.mean, images.dtype)
