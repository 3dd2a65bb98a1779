"""Inpainting masks: random boxes and strokes, drawn on the device."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmcv_jax.bounds import Fraction, NonNegativeInt


@dataclasses.dataclass(frozen=True)
class RandomInpaintMask:
  """Boxes and one brush stroke of straight pieces (LaMa's wide masks, Suvorov et al. 2022).

  full_mask_probability  fraction of the images that are missing altogether, so that the model generates as well
  boxes    at most; each of a tenth to half of the side, in both directions
  strokes  at most; each up to a third of the side long, and a twentieth to a seventh wide
  """

  full_mask_probability: Fraction = 0.25
  boxes: NonNegativeInt = 3
  strokes: NonNegativeInt = 5

  def __post_init__(self) -> None:
    if not 0 <= self.full_mask_probability <= 1:
      raise ValueError(f'full_mask_probability: expected a number from 0 to 1, got {self.full_mask_probability}')
    if self.boxes < 0 or self.strokes < 0 or not self.boxes + self.strokes:
      raise ValueError(f'boxes, strokes: expected at least 0, and one of them above; got {self.boxes}, {self.strokes}')

  def __call__(self, keys: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """A mask for each key [B]: bool [B, height, width] for size (height, width), true where pixels are missing.

    Lengths are fractions of each side, so that in an image that is not square boxes and strokes are stretched.
    """
    if len(size) != 2:
      raise ValueError(f'inpainting: masks are of images, but these have {len(size)} axes before the channels')
    return jax.vmap(lambda key: self._one(key, size))(keys)

  def _one(self, key: jax.Array, size: tuple[int, int]) -> jax.Array:
    keys = jax.random.split(key, 9)
    y, x = ((np.arange(side) + 0.5) / side for side in size)
    y, x = y[:, None, None], x[None, :, None]

    sides = jax.random.uniform(keys[0], (self.boxes, 2), minval=0.1, maxval=0.5)
    starts = jax.random.uniform(keys[1], (self.boxes, 2)) * (1 - sides)
    # At least one of something: an image without a mask teaches nothing.
    boxes = jax.random.randint(keys[2], (), 0 if self.strokes else 1, self.boxes + 1)
    (top, left), (bottom, right) = starts.T, (starts + sides).T
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    mask = (inside & (np.arange(self.boxes) < boxes)).any(-1)

    pieces = jnp.where(boxes > 0, 0, 1) if self.strokes else 0
    pieces = jax.random.randint(keys[3], (), pieces, self.strokes + 1)
    angles = jax.random.uniform(keys[4], (self.strokes,), maxval=2 * np.pi)
    lengths = jax.random.uniform(keys[5], (self.strokes,), minval=0.1, maxval=1 / 3)
    radius = jax.random.uniform(keys[6], minval=1 / 40, maxval=1 / 14)
    turns = lengths[:, None] * jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)

    def walk(here: Any, turn: Any) -> Any:
      there = jnp.clip(here + turn, 0, 1)
      return there, (here, there)

    first = jax.random.uniform(keys[7], (2,), minval=0.1, maxval=0.9)
    _, (start, end) = jax.lax.scan(walk, first, turns)
    mask |= ((_distance(y, x, start.T, end.T) < radius) & (np.arange(self.strokes) < pieces)).any(-1)
    return mask | jax.random.bernoulli(keys[8], self.full_mask_probability)


def _distance(y: Any, x: Any, start: jax.Array, end: jax.Array) -> jax.Array:
  """From the points (y, x) to the lines between two others each, start and end [2, N]: [..., N]."""
  along = end - start
  fraction = ((y - start[0]) * along[0] + (x - start[1]) * along[1]) / jnp.maximum(jnp.square(along).sum(0), 1e-6)
  fraction = jnp.clip(fraction, 0, 1)
  return jnp.hypot(y - start[0] - fraction * along[0], x - start[1] - fraction * along[1])
