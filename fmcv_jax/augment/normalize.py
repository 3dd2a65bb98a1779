"""Normalization of images by channel; published statistics are in `fmcv_jax.dataset_statistics`."""

import dataclasses

import jax
import jax.numpy as jnp

from fmcv_jax.bounds import Finite, PositiveFloat


@dataclasses.dataclass(frozen=True)
class Normalize:
  """(x - mean) / std by channel of images in [0, 1]; the default maps them to [-1, 1].

  mean, std  one number per channel
  """

  mean: tuple[Finite, ...] = (0.5, 0.5, 0.5)
  std: tuple[PositiveFloat, ...] = (0.5, 0.5, 0.5)

  def __post_init__(self) -> None:
    if len(self.mean) != len(self.std):
      raise ValueError(f'mean and std: expected as many numbers, got {len(self.mean)} and {len(self.std)}')

  def __call__(self, images: jax.Array) -> jax.Array:
    """images float [..., C] -> the same shape; ValueError unless there is one mean per channel."""
    if images.shape[-1] != len(self.mean):
      raise ValueError(f'normalize: {len(self.mean)} means for images of {images.shape[-1]} channels; set mean and std')
    return (images - jnp.array(self.mean, images.dtype)) / jnp.array(self.std, images.dtype)

  def undo(self, images: jax.Array) -> jax.Array:
    """Back to [0, 1]."""
    return images * jnp.array(self.std, images.dtype) + jnp.array(self.mean, images.dtype)
