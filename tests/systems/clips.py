"""Video diffusion: a denoiser of clips with joint attention over space and time (Ho et al. 2022, in small)."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from fmcv_jax.models.common.layers import HEAD_AXES, NORM_AXES, BlockConfig, Stack, dense, layer_norm
from fmcv_jax.models.common.patches import PATCH_AXES, patchify, unpatchify
from fmcv_jax.models.generative.conditioning import ClassEmbedding, MLPEmbedder, timestep_embedding


class ClipDenoiser(nn.Module):
  """Clips x [B, T, H, W, 3], conditioned on a class -> the same shape; all patches of all frames are one sequence."""

  logical_axes = (
    *PATCH_AXES,
    *HEAD_AXES,
    NORM_AXES,
    (r'(.*/)?position', (None, 'embed')),
  )
  condition_keys: ClassVar[tuple[str, ...]] = ('label',)

  frames: int
  image_size: int
  patch_size: int
  width: int
  num_classes: int

  @property
  def input_shape(self):
    return (self.frames, self.image_size, self.image_size, 3)

  @nn.compact
  def __call__(self, x, time, condition, *, train=False):
    block = BlockConfig(num_heads=2, mlp_dim=2 * self.width)
    shape = x.shape
    x, grid = patchify(x.reshape(-1, *shape[2:]), self.patch_size)
    x = dense(self.width, block.dtype, 'patch')(x.reshape(shape[0], -1, x.shape[-1]))
    x = x + self.param('position', nn.initializers.normal(0.02), x.shape[1:])
    c = MLPEmbedder(self.width, block.dtype, name='time_embedding')(timestep_embedding(time, 32))
    c = c + ClassEmbedding(self.num_classes, self.width, name='classes')(condition['label'])
    x = layer_norm(block.eps, block.dtype, 'norm')(Stack(1, block)(x + c[:, None], train=train))
    x = dense(self.patch_size**2 * 3, block.dtype, 'head', init=nn.initializers.zeros)(x)
    x = x.reshape(shape[0] * shape[1], -1, x.shape[-1])
    return unpatchify(x.astype(jnp.float32), grid, self.patch_size).reshape(shape)


def clip_denoiser(
  frames: int = 3, image_size: int = 8, patch_size: int = 4, width: int = 32, num_classes: int = 2
) -> ClipDenoiser:
  return ClipDenoiser(frames, image_size, patch_size, width, num_classes)
