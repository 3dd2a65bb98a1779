"""Augmentations that move pixels: horizontal flip and affine warp."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.augment.base import GeometricAugment, check_bounds, check_share
from fmcv_jax.augment.warp import nearest_warp, warp
from fmcv_jax.bounds import Fraction, NonNegativeFloat, PositiveFloat


@dataclasses.dataclass(frozen=True)
class Flip(GeometricAugment):
  """Mirrors left and right with the given probability."""

  probability: Fraction = 0.5

  def __post_init__(self) -> None:
    check_share('probability', self.probability)

  @override
  def draw(self, batch: int, height: int, width: int, rng: jax.Array) -> jax.Array:
    mirrored = jax.random.bernoulli(rng, self.probability, (batch,))
    across = jnp.array([[-1.0, 0.0, width], [0.0, 1.0, 0.0]])
    return jnp.where(mirrored[:, None, None], across, jnp.eye(2, 3))

  @override
  def images(self, images: jax.Array, matrix: jax.Array) -> jax.Array:
    return self.maps(images, matrix, 0.0)

  @override
  def maps(self, maps: jax.Array, matrix: jax.Array, fill: float) -> jax.Array:
    mirrored = (matrix[:, 0, 0] < 0).reshape(-1, *(1,) * (maps.ndim - 1))
    return jnp.where(mirrored, maps[:, :, ::-1], maps)


@dataclasses.dataclass(frozen=True)
class Affine(GeometricAugment):
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

  def __post_init__(self) -> None:
    check_bounds('scale', self.scale)
    check_bounds('ratio', self.ratio)
    for name in ('rotation', 'translate', 'shear'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}: expected at least 0, drawn on both sides of it; got {getattr(self, name)}')
    if self.fill is not None:
      check_share('fill', self.fill)

  @override
  def images(self, images: jax.Array, matrix: jax.Array) -> jax.Array:
    return warp(images, matrix, self.fill)

  @override
  def maps(self, maps: jax.Array, matrix: jax.Array, fill: float) -> jax.Array:
    return nearest_warp(maps, matrix, None if self.fill is None else fill)

  @override
  def draw(self, batch: int, height: int, width: int, rng: jax.Array) -> jax.Array:
    rngs = jax.random.split(rng, 6)

    def within_bounds(rng: jax.Array, bounds: tuple[float, float]) -> jax.Array:
      return jnp.exp(jax.random.uniform(rng, (batch,), minval=math.log(bounds[0]), maxval=math.log(bounds[1])))

    def around_zero(rng: jax.Array, most: float) -> jax.Array:
      return jax.random.uniform(rng, (batch,), minval=-most, maxval=most)

    scale, stretch = within_bounds(rngs[0], self.scale), jnp.sqrt(within_bounds(rngs[1], self.ratio))
    angle, shear = around_zero(rngs[2], math.radians(self.rotation)), around_zero(rngs[3], self.shear)
    right, down = around_zero(rngs[4], self.translate * width), around_zero(rngs[5], self.translate * height)

    # From output to input, so every step is the inverse of the forward transform.
    x_scale, y_scale = 1 / (scale * stretch), stretch / scale
    a, b = jnp.cos(angle) * x_scale, (shear - jnp.sin(angle)) * y_scale
    c, d = jnp.sin(angle) * x_scale, jnp.cos(angle) * y_scale
    x, y = width / 2, height / 2
    rows = [[a, b, x - a * (x + right) - b * (y + down)], [c, d, y - c * (x + right) - d * (y + down)]]
    return jnp.stack([jnp.stack(row, -1) for row in rows], -2)
