"""Augmentations that move pixels: horizontal flip and affine warp."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from fmcv_jax.augment.base import Augment, bernoulli_mask, check_bounds, check_share
from fmcv_jax.augment.warp import warp
from fmcv_jax.bounds import Fraction, NonNegativeFloat, PositiveFloat


@dataclasses.dataclass(frozen=True)
class Flip(Augment):
  """Mirrors left and right with the given probability."""

  probability: Fraction = 0.5

  def __post_init__(self):
    check_share('probability', self.probability)

  def __call__(self, images, rng):
    return jnp.where(bernoulli_mask(rng, self.probability, images), images[:, :, ::-1], images)


@dataclasses.dataclass(frozen=True)
class Affine(Augment):
  """Scales, rotates, translates and shears the image about its center, in one warp with bilinear sampling.

  scale      bounds of the zoom, drawn log-uniformly; 2 makes objects twice as large
  ratio      bounds of the change of width over height, drawn log-uniformly
  rotation   maximum angle in degrees; this and the next two are drawn uniformly from [-x, x]
  translate  maximum shift along each axis, as a fraction of that side
  shear      maximum horizontal shift per row
  fill       value outside the image: 1 is white; None replicates the nearest edge
  """

  scale: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
  ratio: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
  rotation: NonNegativeFloat = 0.0
  translate: NonNegativeFloat = 0.0
  shear: NonNegativeFloat = 0.0
  fill: Fraction | None = 1.0

  def __post_init__(self):
    check_bounds('scale', self.scale)
    check_bounds('ratio', self.ratio)
    for name in ('rotation', 'translate', 'shear'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}: expected at least 0, drawn on both sides of it; got {getattr(self, name)}')
    if self.fill is not None:
      check_share('fill', self.fill)

  def __call__(self, images, rng):
    batch, height, width, _ = images.shape
    return warp(images, self.matrices(batch, height, width, rng), self.fill)

  def matrices(self, batch: int, height: int, width: int, rng: jax.Array) -> jax.Array:
    """One matrix per image [B, 2, 3], from output coordinates (x, y) to input coordinates."""
    rngs = jax.random.split(rng, 6)

    def within_bounds(rng, bounds):
      return jnp.exp(jax.random.uniform(rng, (batch,), minval=math.log(bounds[0]), maxval=math.log(bounds[1])))

    def around_zero(rng, most):
      return jax.random.uniform(rng, (batch,), minval=-most, maxval=most)

    scale, stretch = within_bounds(rngs[0], self.scale), jnp.sqrt(within_bounds(rngs[1], self.ratio))
    angle, shear = around_zero(rngs[2], math.radians(self.rotation)), around_zero(rngs[3], self.shear)
    right, down = around_zero(rngs[4], self.translate * width), around_zero(rngs[5], self.translate * height)

    # From output to input, so every step is the inverse of the forward transform.
    across, along = 1 / (scale * stretch), stretch / scale
    a, b = jnp.cos(angle) * across, (shear - jnp.sin(angle)) * along
    c, d = jnp.sin(angle) * across, jnp.cos(angle) * along
    x, y = width / 2, height / 2
    rows = [[a, b, x - a * (x + right) - b * (y + down)], [c, d, y - c * (x + right) - d * (y + down)]]
    return jnp.stack([jnp.stack(row, -1) for row in rows], -2)
