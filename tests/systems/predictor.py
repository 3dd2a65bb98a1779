"""A world model in small: the next frame by diffusion from past frames and an action (Alonso et al. 2024, DIAMOND)."""

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.fields import Field
from fmcv_jax.models.common.layers import HEAD_AXES, NORM_AXES, BlockConfig, Stack, dense, layer_norm
from fmcv_jax.models.common.patches import PATCH_AXES, patchify, unpatchify
from fmcv_jax.models.generative.conditioning import MLPEmbedder, timestep_embedding


class FramePredictor(nn.Module):
  """The next frame x [B, H, W, 3], noisy, with past frames uint8 [B, P, H, W, 3] as further channels and an action
  float32 [B, 2] -> the denoised x."""

  logical_axes = (
    *PATCH_AXES,
    *HEAD_AXES,
    NORM_AXES,
    (r'(.*/)?position', (None, 'embed')),
  )
  condition_keys: ClassVar[tuple[str, ...]] = ('action', 'past_frames')
  never_dropped: ClassVar[tuple[str, ...]] = ('past_frames',)
  condition_kinds: ClassVar[Mapping[str, Field]] = {'past_frames': Field('clip')}

  image_size: int
  past: int
  patch_size: int
  width: int

  @property
  def input_shape(self):
    return (self.image_size, self.image_size, 3)

  @property
  def condition_shapes(self):
    return {
      'action': jax.ShapeDtypeStruct((2,), jnp.float32),
      'past_frames': jax.ShapeDtypeStruct((self.past, *self.input_shape), jnp.uint8),
    }

  @nn.compact
  def __call__(self, x, time, condition, *, train=False):
    block = BlockConfig(num_heads=2, mlp_dim=2 * self.width)
    past = jnp.moveaxis(condition['past_frames'].astype(jnp.float32) / 127.5 - 1, 1, 3)
    x = jnp.concatenate([x, past.reshape(*x.shape[:3], -1)], axis=-1)
    x, grid = patchify(x, self.patch_size)
    x = dense(self.width, block.dtype, 'patch')(x)
    x = x + self.param('position', nn.initializers.normal(0.02), x.shape[1:])
    c = MLPEmbedder(self.width, block.dtype, name='time_embedding')(timestep_embedding(time, 32))
    c = c + MLPEmbedder(self.width, block.dtype, name='action_embedding')(condition['action'])
    x = layer_norm(block.eps, block.dtype, 'norm')(Stack(1, block)(x + c[:, None], train=train))
    x = dense(self.patch_size**2 * 3, block.dtype, 'head', init=nn.initializers.zeros)(x)
    return unpatchify(x.astype(jnp.float32), grid, self.patch_size)


def frame_predictor(image_size: int = 8, past: int = 2, patch_size: int = 2, width: int = 32) -> FramePredictor:
  return FramePredictor(image_size, past, patch_size, width)
