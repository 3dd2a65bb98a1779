"""Augmentation on the device, inside the train step: pure functions of images [B, H, W, 3] in [0, 1] and a key.

The host decodes and crops only; what is here costs no host time, differs for every example and step, and is the same on
any mesh.
"""

import abc
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


class Augment(abc.ABC):
  """One random change of a batch of images, drawn for each image anew."""

  @abc.abstractmethod
  def __call__(self, images: jax.Array, rng: jax.Array) -> jax.Array:
    """images float32 [B, H, W, 3] in [0, 1] -> the same shape and range."""


def apply_augments(images: jax.Array, augments: Sequence[Augment], rng: jax.Array) -> jax.Array:
  """uint8 [B, H, W, 3] or clips [B, T, H, W, 3] -> float32 in [0, 1], after every augmentation in order.

  All frames of a clip are changed alike: the random numbers are drawn once for each example.
  """
  images = images.astype(jnp.float32) / 255
  for index, augment in enumerate(augments):
    call: Callable[[jax.Array, jax.Array], jax.Array] = augment
    for _ in range(images.ndim - 4):
      call = jax.vmap(call, in_axes=(1, None), out_axes=1)
    images = call(images, jax.random.fold_in(rng, index))
  return images


def bernoulli_mask(rng, probability, images):
  return jax.random.bernoulli(rng, probability, (images.shape[0], 1, 1, 1))


def check_share(name: str, value: float) -> None:
  if not 0 <= value <= 1:
    raise ValueError(f'{name}: expected a number between 0 and 1, got {value}')


def check_bounds(name: str, bounds: tuple[float, float], most: float = math.inf) -> None:
  if not 0 < bounds[0] <= bounds[1] <= most:
    raise ValueError(f'{name}: expected 0 < low <= high{"" if most == math.inf else f" <= {most:g}"}, got {bounds}')


def within(low: jax.Array, high: jax.Array, size: int) -> jax.Array:
  """low, high [B] -> bool [B, size]: low <= position < high."""
  position = jnp.arange(size)
  return (position >= low[:, None]) & (position < high[:, None])
