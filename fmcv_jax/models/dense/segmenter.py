"""A class for every pixel from an encoder's last tokens, by one linear layer (Strudel et al. 2021, section 3.2).

It is the published decoder that tells most about the features: there is nothing between them and the answer.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.bounds import PositiveInt
from fmcv_jax.fields import ImageSize
from fmcv_jax.models.common.layers import HEAD_AXES, dense
from fmcv_jax.models.common.outputs import PatchNetwork
from fmcv_jax.parallel.rules import with_logical_constraint


class Segmenter(nn.Module):
  """Normalized images [B, H, W, 3] -> float32 logits of each pixel [B, H, W, num_classes]; `head` is the linear layer.

  The logits of the patches, row by row, are interpolated bilinearly to the size of the image.
  """

  logical_axes = (*HEAD_AXES,)

  encoder: nn.Module
  num_classes: int

  @property
  def image_size(self) -> ImageSize:
    """Side, or (height, width), of the images in pixels."""
    return self.encoder.image_size  # type: ignore[attr-defined]

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """(height, width, channels) of the images that the network is made for."""
    return self.encoder.input_shape  # type: ignore[attr-defined]

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    encoder: Any = self.encoder
    batch, height, width, _ = images.shape
    tokens = encoder(images, train=train).tokens[:, encoder.prefix :]
    x = tokens.reshape(batch, height // encoder.patch_size, width // encoder.patch_size, -1)
    logits = dense(self.num_classes, x.dtype.name, 'head', init=nn.initializers.zeros)(x)
    logits = with_logical_constraint(logits.astype(jnp.float32), 'batch', None, None, None)
    return jax.image.resize(logits, (batch, height, width, self.num_classes), 'bilinear')


def segmenter(encoder: nn.Module, num_classes: PositiveInt) -> Segmenter:
  """A segmenter on a network of patches (vit, swin); `num_classes` includes the ground, where that is one."""
  if not isinstance(encoder, PatchNetwork):
    raise ValueError('encoder: a class for every pixel needs a network of patches: encoder.name is vit or swin')
  if encoder.num_classes:  # type: ignore[attr-defined]
    raise ValueError('encoder: outputs has no use here; leave it out')
  return Segmenter(encoder, num_classes)
