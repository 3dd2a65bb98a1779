"""RandAugment (Cubuk et al. 2020) in the recipes of timm."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.augment.base import Augment, check_share
from fmcv_jax.augment.randaugment_ops import INCREASING, MOVING, OPERATIONS, RECIPES, apply_operations
from fmcv_jax.bounds import Fraction, NonNegativeFloat, NonNegativeInt


@dataclasses.dataclass(frozen=True)
class RandAugment(Augment):
  """Applies random operations, drawn with replacement, at one magnitude (Cubuk et al. 2020).

  layers         number of operations applied in sequence
  magnitude      10 is the paper's maximum; the scale extends beyond it, as in big_vision's randaug(2, 15)
  magnitude_std  standard deviation of the magnitude of each operation (timm's mstd), clipped to [0, max(magnitude, 10)]
  probability    probability of each operation (timm's p)
  recipe         operations and scale: 'paper' and 'big_vision' are Google's, in which posterize and solarize get weaker
                 with the magnitude; 'timm' is the increasing scale ('inc1'), for use with probability=0.5,
                 magnitude_std=0.5
  operations     operations to draw from, in place of the recipe's
  fill           value outside a warped image, and inside a cutout

  Inputs and outputs are multiples of 1/255. Warps are bilinear (nearest or bicubic in the sources), and posterize keeps
  at least one of eight bits.
  """

  layers: NonNegativeInt = 2
  magnitude: NonNegativeFloat = 10.0
  magnitude_std: NonNegativeFloat = 0.0
  probability: Fraction = 1.0
  recipe: Literal['paper', 'big_vision', 'timm'] = 'big_vision'
  operations: tuple[str, ...] | None = None
  fill: Fraction = 0.5

  def __post_init__(self) -> None:
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

  @property
  @override
  def moves(self) -> bool:
    return bool(MOVING & set(self.operations or RECIPES[self.recipe]))

  @override
  def __call__(self, images: jax.Array, rng: jax.Array) -> jax.Array:
    names = self.operations or RECIPES[self.recipe]
    batch = images.shape[:1]

    def layer(pixels: jax.Array, rng: jax.Array) -> tuple[jax.Array, None]:
      rngs = jax.random.split(rng, 5)
      operation = jax.random.randint(rngs[0], batch, 0, len(names))
      magnitude = self.magnitude + self.magnitude_std * jax.random.normal(rngs[2], batch)
      pixels = apply_operations(
        pixels,
        jnp.where(jax.random.bernoulli(rngs[1], self.probability, batch), operation, -1),
        level=jnp.clip(magnitude, 0, max(10.0, self.magnitude)) / 10,
        sign=jax.random.rademacher(rngs[3], batch, jnp.float32),
        center=jax.random.uniform(rngs[4], (*batch, 2)),
        names=names,
        increasing=INCREASING[self.recipe],
        fill=round(self.fill * 255),
      )
      return pixels, None

    pixels, _ = jax.lax.scan(layer, jnp.round(images * 255), jax.random.split(rng, self.layers))
    return pixels / 255
