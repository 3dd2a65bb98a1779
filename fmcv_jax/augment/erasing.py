"""Random erasing (Zhong et al. 2020)."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.augment.base import Augment, bernoulli_mask, check_bounds, check_share, within
from fmcv_jax.bounds import Finite, Fraction, PositiveFloat, PositiveFraction


@dataclasses.dataclass(frozen=True)
class RandomErasing(Augment):
  """Overwrites a random box with the given probability (Zhong et al. 2020).

  area    bounds of the box area as a fraction of the image area, drawn uniformly
  ratio   bounds of width / height, drawn log-uniformly from the values for which the box fits
  value   'noise' (uniform in [0, 1], independent for each value), or a constant

  Cutout (DeVries & Taylor 2017), its square inside the image: probability=1, area=(a, a), ratio=(1, 1), value=0.5.
  """

  probability: Fraction = 0.25
  area: tuple[PositiveFraction, PositiveFraction] = (0.02, 1 / 3)
  ratio: tuple[PositiveFloat, PositiveFloat] = (0.3, 1 / 0.3)
  value: Literal['noise'] | Finite = 'noise'

  def __post_init__(self) -> None:
    check_share('probability', self.probability)
    check_bounds('area', self.area, most=1.0)
    check_bounds('ratio', self.ratio)
    if self.value != 'noise':
      if isinstance(self.value, str):
        raise ValueError(f"value: expected 'noise' or a number, got {self.value!r}")
      check_share('value', self.value)

  @override
  def __call__(self, images: jax.Array, rng: jax.Array) -> jax.Array:
    rngs = jax.random.split(rng, 6)
    rows, columns = self.boxes(images.shape, rngs[:4])
    inside = bernoulli_mask(rngs[4], self.probability, images) & (rows[:, :, None] & columns[:, None])[..., None]
    value = jax.random.uniform(rngs[5], images.shape) if self.value == 'noise' else self.value
    return jnp.where(inside, value, images)

  def boxes(self, shape: tuple[int, ...], rngs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows bool [B, H] and columns bool [B, W] that the box covers."""
    (batch, height, width, _), square = shape, shape[1] / shape[2]
    share = jax.random.uniform(rngs[0], (batch,), minval=self.area[0], maxval=self.area[1])
    low = jnp.log(jnp.maximum(self.ratio[0], share / square))  # narrower than this the box would be too high
    high = jnp.log(jnp.minimum(self.ratio[1], 1 / (share * square)))
    ratio = jnp.exp(low + (high - low) * jax.random.uniform(rngs[1], (batch,)))

    def side(length: Any, size: int, rng: jax.Array) -> jax.Array:
      length = jnp.clip(jnp.round(length), 1, size)
      start = jnp.floor(jax.random.uniform(rng, (batch,)) * (size - length + 1))
      return within(start, start + length, size)

    pixels = share * (height * width)
    return side(jnp.sqrt(pixels / ratio), height, rngs[2]), side(jnp.sqrt(pixels * ratio), width, rngs[3])
