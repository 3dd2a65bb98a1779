"""An image and a key for the tests of augmentations, and augmentations compiled once."""

import functools

import jax
import numpy as np

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 21, 26
KEY = jax.random.key(0)


def photo(height=HEIGHT, width=WIDTH):
  """Noise over a slope whose colors do not reach every value, so that autocontrast and equalize have work to do."""
  slope = np.linspace(20, 130, height * width).reshape(height, width, 1) * [1.0, 0.8, 1.2]
  return (slope + RNG.integers(0, 70, (height, width, 3))).astype(np.uint8)


PHOTO = photo()


@functools.cache
def compiled(augment):
  return jax.jit(augment)
