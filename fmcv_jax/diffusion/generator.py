"""The part of a trained diffusion model that generates images."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from fmcv_jax.diffusion.condition import Condition
from fmcv_jax.diffusion.process import Process


class Generator(NamedTuple):
  """The part of a trained model that makes pictures; x is a picture in the network's range, or a latent.

  size        sides of a picture, in pixels
  shape       of one x
  denoise     (x [B, *shape], time [B], Condition) -> the network's output
  condition   (batch with what is in `told`, told=True) -> Condition; told=False is that of nothing
  told        'tokens', 'label', both or neither
  encode      images [B, H, W, 3] in [0, 1] -> x
  decode      x -> images in [0, 1]
  control     images -> the pictures that steer (Condition.control); None for a model that is not steered
  around      (images, masks bool [B, H, W]) -> Condition.beside, for a model that fills holes; None for others
  """

  process: Process
  size: int
  shape: tuple[int, ...]
  denoise: Callable[[jax.Array, jax.Array, Condition], jax.Array]
  condition: Callable[..., Condition]
  told: tuple[str, ...]
  encode: Callable[[jax.Array], jax.Array]
  decode: Callable[[jax.Array], jax.Array]
  control: Callable[[jax.Array], jax.Array] | None = None
  around: Callable[[jax.Array, jax.Array], jax.Array] | None = None
