"""Image conditions of a denoiser: the control image of a ControlNet, or the masked image for inpainting."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.augment.control_maps import Control
from fmcv_jax.augment.inpaint_masks import RandomInpaintMask
from fmcv_jax.models.generative.controlnet import ControlNet, controlnet
from fmcv_jax.models.generative.unet import UNet


@dataclasses.dataclass(frozen=True)
class ImageCondition:
  """Condition computed from the training images; it is never dropped for classifier-free guidance.

  control     computes control maps for a ControlNet. Only the ControlNet is trained, starting from a copy of the
              encoder of the network ('params/control/encoder'); the network is frozen ('extra/network')
  inpainting  draws inpainting masks for a UNet with `extra_in_channels`: the mask and x of the masked image are
              concatenated to x, as in Stable Diffusion's inpainting model
  """

  control: Control | None = None
  inpainting: RandomInpaintMask | None = None

  @property
  def keys(self) -> tuple[str, ...]:
    """Keys of the condition that this provides."""
    control = () if self.control is None else ('control', 'control_scale')
    return control + (() if self.inpainting is None else ('image',))

  @property
  def active(self) -> bool:
    """True if there is a condition from images."""
    return bool(self.keys)

  def check(self, network: Any, image_shape: tuple[int, ...]) -> None:
    """Raises ValueError for a network that does not support this condition."""
    extra = getattr(network, 'extra_in_channels', 0)
    expected = 0 if self.inpainting is None else 1 + network.input_shape[-1]
    if extra != expected:
      raise ValueError(
        f'network: extra_in_channels is {extra}, but {expected} channels are concatenated to x '
        f'{"(the mask, and x of the masked image)" if expected else "(there is no inpainting)"}'
      )
    if self.control is not None:
      if not isinstance(network, UNet):
        raise ValueError('control: needs a convolutional network; use network.name=unet')
      self.controlnet(network, image_shape)

  def controlnet(self, network: nn.Module, image_shape: tuple[int, ...]) -> ControlNet:
    """The ControlNet of a network whose images have `image_shape` (H, W, 3)."""
    unet: Any = network
    return controlnet(unet, image_shape[0] // unet.input_shape[0])

  def __call__(
    self, images: jax.Array, keys: jax.Array, encode: Callable[[jax.Array], jax.Array], fill: Any
  ) -> dict[str, jax.Array]:
    """The condition for images [B, H, W, 3] in [0, 1]; masks are drawn from one rng key per image, [B]."""
    condition = {}
    if self.control is not None:
      condition['control'] = self.control(images)
    if self.inpainting is not None:
      masks = self.inpainting(keys, images.shape[1:-1])
      condition['image'] = inpaint_condition(images, masks, encode, fill)
    return condition


def inpaint_condition(
  images: jax.Array, masks: jax.Array, encode: Callable[[jax.Array], jax.Array], fill: Any
) -> jax.Array:
  """The mask and x of the masked image, float32 [B, ..., 1 + C].

  images  [B, H, W, 3] in [0, 1]
  masks   bool [B, H, W], True where pixels are missing
  encode  images -> x
  fill    color of masked pixels, broadcast to [3]
  """
  x = encode(jnp.where(masks[..., None], jnp.array(fill), images))
  strides = (size // own for size, own in zip(masks.shape[1:], x.shape[1:-1], strict=True))
  mask = masks[(slice(None), *(slice(None, None, stride) for stride in strides))]
  return jnp.concatenate([mask[..., None].astype(jnp.float32), x], axis=-1)
