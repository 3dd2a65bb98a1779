"""Masked autoencoder (He et al. 2022): an encoder of the visible patches, and a small decoder of all patches.

Letters in shapes: B batch, T patches, N visible patches, D width, P pixels of a patch times 3.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.bounds import PositiveInt
from fmcv_jax.fields import ImageSize
from fmcv_jax.models.backbones.vit import ViT
from fmcv_jax.models.common.layers import HEAD_AXES, NORM_AXES, BlockConfig, Stack, dense, layer_norm
from fmcv_jax.models.common.positions import sincos_2d
from fmcv_jax.parallel.rules import with_logical_constraint


class Reconstruction(NamedTuple):
  """Decoder output pixels [B, T, P] in row-major order; encoder features [B, D], pooled over the visible patches."""

  pixels: jax.Array
  features: jax.Array


class Decoder(nn.Module):
  """Restores the order of the visible tokens, inserts mask tokens, and predicts every patch."""

  logical_axes = (
    (r'(.*/)?embed/kernel', ('embed', None)),
    (r'(.*/)?embed/bias', (None,)),
    (r'(.*/)?mask_token', (None, 'embed')),
    *HEAD_AXES,
    NORM_AXES,
  )

  width: int
  stack: Stack
  out_dim: int

  @nn.compact
  def __call__(
    self, tokens: jax.Array, order: jax.Array, grid: tuple[int, int], *, prefix: int, train: bool = False
  ) -> jax.Array:
    """tokens [B, prefix + N, D] of the prefix and the patches order[:, :N]; order int32 [B, T] -> [B, T, P]."""
    block, batch, hidden = self.stack.block, order.shape[0], order.shape[1] - (tokens.shape[1] - prefix)
    x = dense(self.width, block.dtype, 'embed')(tokens)
    token = self.param('mask_token', nn.initializers.normal(0.02), (1, self.width)).astype(x.dtype)
    patches = jnp.concatenate([x[:, prefix:], jnp.broadcast_to(token, (batch, hidden, self.width))], axis=1)
    patches = jnp.take_along_axis(patches, jnp.argsort(order, axis=1)[..., None], axis=1)
    # Prefix tokens have no positional embedding: their rows of the published table are zero.
    x = jnp.concatenate([x[:, :prefix], patches + jnp.asarray(sincos_2d(*grid, self.width), x.dtype)], axis=1)
    x = self.stack(with_logical_constraint(x, 'batch', 'tokens', 'width'), train=train)
    x = layer_norm(block.eps, block.dtype, 'norm')(x)
    return dense(self.out_dim, block.dtype, 'head')(x)[:, prefix:]


class MaskedAutoencoder(nn.Module):
  """Normalized images [B, H, W, 3] and an order of their patches -> Reconstruction."""

  encoder: ViT
  decoder: Decoder

  @property
  def image_size(self) -> ImageSize:
    """Side, or (height, width), of the images in pixels."""
    return self.encoder.image_size

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """(height, width, channels) of the images that the network is made for."""
    return self.encoder.input_shape

  def __call__(self, images: jax.Array, order: jax.Array, *, visible: int, train: bool = False) -> Reconstruction:
    """order: int32 [B, T], a permutation of the patches of each image; the first `visible` go into the encoder."""
    features = self.encoder(images, keep=order[:, :visible], train=train)
    grid = (images.shape[1] // self.encoder.patch_size, images.shape[2] // self.encoder.patch_size)
    pixels = self.decoder(features.tokens, order, grid, prefix=self.encoder.prefix, train=train)
    return Reconstruction(pixels, features.pooled)


def mae(
  encoder: nn.Module, *, width: PositiveInt = 512, depth: PositiveInt = 8, num_heads: PositiveInt = 16
) -> MaskedAutoencoder:
  """A masked autoencoder of a ViT; the decoder takes its norms, dtype and remat from the encoder.

  The published B/16, L/16 and H/14 are vit(variant, pos_embed='sincos2d') with the default decoder.
  """
  if not isinstance(encoder, ViT):
    raise ValueError('encoder: masked autoencoding needs a network that can skip patches: encoder.name is vit')
  if encoder.num_classes or encoder.mask_token:
    raise ValueError('encoder: num_classes and mask_token are not supported by MAE; remove them')
  if width % num_heads or width % 4:
    raise ValueError(f'width: {width} is not divisible by 4 and by {num_heads} heads')
  own = encoder.stack.block
  block = BlockConfig(num_heads, 4 * width, own.activation, eps=own.eps, attention=own.attention, dtype=own.dtype)
  stack = dataclasses.replace(encoder.stack, depth=depth, block=block, drop_path=0.0)
  return MaskedAutoencoder(encoder, Decoder(width, stack, encoder.patch_size**2 * encoder.in_channels))
