"""PatchGAN discriminator (Isola et al. 2017)."""

import flax.linen as nn
import jax

from fmcv_jax.models.common.conv_blocks import conv, group_norm
from fmcv_jax.models.common.layers import NORM_AXES


class PatchDiscriminator(nn.Module):
  """Images [B, H, W, 3] -> float32 logits [B, h, w, 1], positive for real images; h is about H / 2^layers.

  The receptive field of a logit is 70 x 70 pixels with three layers. Group norm replaces the batch norm of the
  original, so that the logits of an image do not depend on the rest of the batch, on any mesh.
  """

  logical_axes = (
    (r'(.*/)?conv\d+/kernel', (None, None, None, 'embed')),
    (r'(.*/)?conv_logit/kernel', (None, None, 'embed', None)),
    (r'(.*/)?conv(\d+|_logit)/bias', (None,)),
    NORM_AXES,
  )

  width: int = 64
  layers: int = 3
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.initializers.normal(0.02)
    pad = [(1, 1), (1, 1)]
    x = conv(self.width, self.dtype, 'conv0', size=4, stride=2, padding=pad, init=init)(x)
    for layer in range(1, self.layers + 1):
      stride = 2 if layer < self.layers else 1
      features = self.width * min(2**layer, 8)
      x = nn.leaky_relu(x, 0.2)
      x = conv(features, self.dtype, f'conv{layer}', size=4, stride=stride, padding=pad, init=init)(x)
      x = group_norm(features, self.dtype, f'norm{layer}')(x)
    x = nn.leaky_relu(x, 0.2)
    return conv(1, self.dtype, 'conv_logit', size=4, padding=pad, init=init)(x).astype(jax.numpy.float32)
