"""Normalization of images by channel, with the statistics that published networks were trained with."""

import dataclasses

import jax
import jax.numpy as jnp

from fmcv_jax.bounds import Finite, PositiveFloat

# ImageNet's statistics, with which most published networks were trained; CLIP has its own.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


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
