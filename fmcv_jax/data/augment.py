"""Augmentation on the device, inside the train step: pure functions of images [B, H, W, 3] in [0, 1] and a key.

The host decodes and crops only; what is here costs no host time, differs for every example and step, and is the same on
any mesh.
"""

import abc
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# ImageNet's statistics, with which most published networks were trained; CLIP has its own.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Normalize:
  """(x - mean) / std by channel of images in [0, 1]; the default maps them to [-1, 1]."""

  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)

  def __call__(self, images: jax.Array) -> jax.Array:
    return (images - jnp.array(self.mean, images.dtype)) / jnp.array(self.std, images.dtype)

  def undo(self, images: jax.Array) -> jax.Array:
    """Back to [0, 1]."""
    return images * jnp.array(self.std, images.dtype) + jnp.array(self.mean, images.dtype)


class Augment(abc.ABC):
  """One random change of a batch of images, drawn for each image anew."""

  @abc.abstractmethod
  def __call__(self, images: jax.Array, rng: jax.Array) -> jax.Array:
    """images float32 [B, H, W, 3] in [0, 1] -> the same shape and range."""


def augmented(images: jax.Array, augments: Sequence[Augment], rng: jax.Array) -> jax.Array:
  """uint8 [B, H, W, 3] -> float32 in [0, 1], after every augmentation in order."""
  images = images.astype(jnp.float32) / 255
  for index, augment in enumerate(augments):
    images = augment(images, jax.random.fold_in(rng, index))
  return images


@dataclasses.dataclass(frozen=True)
class Flip(Augment):
  """Mirrors left and right with the given probability."""

  probability: float = 0.5

  def __call__(self, images, rng):
    flipped = jax.random.bernoulli(rng, self.probability, (images.shape[0], 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


AUGMENTS: dict[str, type[Augment]] = {'flip': Flip}
