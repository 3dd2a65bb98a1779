"""RandAugment (Cubuk et al. 2020) in the recipes of timm."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from fmcv_jax.augment.base import Augment, check_share
from fmcv_jax.augment.randaugment_ops import INCREASING, OPERATIONS, RECIPES, apply_operations


@dataclasses.dataclass(frozen=True)
class RandAugment(Augment):
  """A few operations on each image, drawn with replacement, all of one magnitude (Cubuk et al. 2020).

  layers         operations one after the other
  magnitude      10 is the largest published; beyond it the scale goes on, as in big_vision's randaug(2, 15)
  magnitude_std  each operation draws its magnitude around it (timm's mstd), from 0 to the larger of it and 10
  probability    of each operation (timm's p)
  recipe         which operations and which scale: 'paper' and 'big_vision' Google's, on which posterize and solarize
                 grow weaker with the magnitude, 'timm' the increasing one ('inc1'), to use with probability=0.5,
                 magnitude_std=0.5
  operations     the operations to draw from, instead of the recipe's
  fill           what lies outside of a warped image, and in a cutout

  Works on, and returns, multiples of 1/255. Warps are bilinear (nearest or bicubic in the sources), and posterize keeps
  at least one bit of eight.
  """

  layers: int = 2
  magnitude: float = 10.0
  magnitude_std: float = 0.0
  probability: float = 1.0
  recipe: Literal['paper', 'big_vision', 'timm'] = 'big_vision'
  operations: tuple[str, ...] | None = None
  fill: float = 0.5

  def __post_init__(self):
    if self.layers < 1:
      raise ValueError(f'layers: expected at least 1, got {self.layers}')
    for name in ('magnitude', 'magnitude_std'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}: expected at least 0, got {getattr(self, name)}')
    if self.recipe not in RECIPES:
      raise ValueError(f'recipe: {self.recipe!r} is not one of {", ".join(RECIPES)}')
    if unknown := set(self.operations or ()) - set(OPERATIONS):
      raise ValueError(f'operations: unknown {", ".join(sorted(unknown))}; known: {", ".join(OPERATIONS)}')
    if self.operations is not None and (not self.operations or len(set(self.operations)) < len(self.operations)):
      raise ValueError(f'operations: expected different names, at least one; got {self.operations}')
    check_share('probability', self.probability)
    check_share('fill', self.fill)

  def __call__(self, images, rng):
    names = self.operations or RECIPES[self.recipe]
    batch = images.shape[:1]

    def layer(pixels, rng):
      rngs = jax.random.split(rng, 5)
      operation = jax.random.randint(rngs[0], batch, 0, len(names))
      magnitude = self.magnitude + self.magnitude_std * jax.random.normal(rngs[2], batch)
      pixels = apply_operations(
        pixels,
        jnp.where(jax.random.bernoulli(rngs[1], self.probability, batch), operation, -1),
        level=jnp.clip(magnitude, 0, max(10.0, self.magnitude)) / 10,
        sign=jax.random.rademacher(rngs[3], batch, jnp.float32),
        centre=jax.random.uniform(rngs[4], (*batch, 2)),
        names=names,
        increasing=INCREASING[self.recipe],
        fill=round(self.fill * 255),
      )
      return pixels, None

    pixels, _ = jax.lax.scan(layer, jnp.round(images * 255), jax.random.split(rng, self.layers))
    return pixels / 255
