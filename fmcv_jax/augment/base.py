"""Augmentation on the device, inside the train step: pure functions of images [B, H, W, C] in [0, 1] and a key.

The host decodes and crops only; what is here costs no host time, differs for every example and step, and is the same on
any mesh.
"""

import abc
import math

import jax
import jax.numpy as jnp
from typing_extensions import override


class Augment(abc.ABC):
  """One random change of a batch of images, drawn for each image anew."""

  @property
  def moves(self) -> bool:
    """True if pixels change their place, so that maps, boxes and points of the image no longer fit."""
    return False

  @abc.abstractmethod
  def __call__(self, images: jax.Array, rng: jax.Array) -> jax.Array:
    """images float32 [B, H, W, C] in [0, 1] -> the same shape and range."""


class GeometricAugment(Augment):
  """A change of geometry, drawn as one matrix per example, which moves everything that belongs to the image.

  Coordinates are (x, y) in pixels from the top left corner; the center of the first pixel is (0.5, 0.5).
  """

  @property
  @override
  def moves(self) -> bool:
    return True

  @abc.abstractmethod
  def draw(self, batch: int, height: int, width: int, rng: jax.Array) -> jax.Array:
    """Matrices [B, 2, 3] from coordinates in the output to coordinates in the input."""

  @abc.abstractmethod
  def images(self, images: jax.Array, matrix: jax.Array) -> jax.Array:
    """images float32 [B, H, W, C] changed by the matrices of `draw`."""

  @abc.abstractmethod
  def maps(self, maps: jax.Array, matrix: jax.Array, fill: float) -> jax.Array:
    """maps [B, H, W, ...] of any dtype: the value of the nearest pixel, and `fill` outside of the image."""

  @override
  def __call__(self, images: jax.Array, rng: jax.Array) -> jax.Array:
    batch, height, width, _ = images.shape
    return self.images(images, self.draw(batch, height, width, rng))


def bernoulli_mask(rng: jax.Array, probability: float, images: jax.Array) -> jax.Array:
  """bool [B, 1, 1, 1], True with `probability`, for a batch of images."""
  return jax.random.bernoulli(rng, probability, (images.shape[0], 1, 1, 1))


def check_share(name: str, value: float) -> None:
  """Raises ValueError unless 0 <= value <= 1."""
  if not 0 <= value <= 1:
    raise ValueError(f'{name}: expected a number between 0 and 1, got {value}')


def check_bounds(name: str, bounds: tuple[float, float], most: float = math.inf) -> None:
  """Raises ValueError unless 0 < low <= high <= most."""
  if not 0 < bounds[0] <= bounds[1] <= most:
    raise ValueError(f'{name}: expected 0 < low <= high{"" if most == math.inf else f" <= {most:g}"}, got {bounds}')


def within(low: jax.Array, high: jax.Array, size: int) -> jax.Array:
  """low, high [B] -> bool [B, size]: low <= position < high."""
  position = jnp.arange(size)
  return (position >= low[:, None]) & (position < high[:, None])
