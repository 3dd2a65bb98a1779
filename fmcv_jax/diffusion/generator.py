"""The part of a trained diffusion model that generates images."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from fmcv_jax.diffusion.condition import Condition
from fmcv_jax.diffusion.process import Process


class Generator(NamedTuple):
  """A denoiser with its parameters; x is an image (or clip, or volume) in the network's range, or a latent.

  image_shape        of one decoded image: (H, W, 3), or (T, H, W, 3) for a network of clips
  input_shape        of one x
  denoise            (x [B, *input_shape], time [B], Condition) -> the network's output
  condition          (batch with the `condition_fields`, conditional=True) -> Condition; conditional=False gives the
                     unconditional one of as many examples
  condition_fields   batch fields that `condition` reads: 'tokens', 'label', fields of the network's own, or none
  encode             images [B, *image_shape] in [0, 1] -> x
  decode             x -> images in [0, 1]
  control            images -> their control images (condition['control']); None for a model without ControlNet
  inpaint_condition  (images, masks bool [B, H, W]) -> condition['image'], for an inpainting model; None for others
  """

  process: Process
  image_shape: tuple[int, ...]
  input_shape: tuple[int, ...]
  denoise: Callable[[jax.Array, jax.Array, Condition], jax.Array]
  condition: Callable[..., Condition]
  condition_fields: tuple[str, ...]
  encode: Callable[[jax.Array], jax.Array]
  decode: Callable[[jax.Array], jax.Array]
  control: Callable[[jax.Array], jax.Array] | None = None
  inpaint_condition: Callable[[jax.Array, jax.Array], jax.Array] | None = None
