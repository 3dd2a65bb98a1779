"""3-Augment (Touvron et al. 2022, DeiT III)."""

import dataclasses

import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.augment.base import Augment, check_bounds, check_share
from fmcv_jax.augment.color import Blur, ColorJitter, Solarize
from fmcv_jax.bounds import Fraction, PositiveFloat


@dataclasses.dataclass(frozen=True)
class ThreeAugment(Augment):
  """Gray, solarized or blurred, each image one of the three (DeiT III, Touvron et al. 2022, section 3)."""

  threshold: Fraction = 0.5
  sigma: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)

  def __post_init__(self) -> None:
    check_share('threshold', self.threshold)
    check_bounds('sigma', self.sigma)

  @override
  def __call__(self, images: jax.Array, rng: jax.Array) -> jax.Array:
    choice_rng, blur_rng = jax.random.split(rng)
    choice = jax.random.randint(choice_rng, (images.shape[0], 1, 1, 1), 0, 3)
    gray = ColorJitter(grayscale=1.0)(images, rng)
    negative = Solarize(self.threshold, probability=1.0)(images, rng)
    return jnp.select([choice == 0, choice == 1], [gray, negative], Blur(1.0, self.sigma)(images, blur_rng))
