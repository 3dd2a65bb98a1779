"""A decoder block, which the captioner and the detector share."""

import flax.linen as nn

from fmcv_jax.models.common.layers import NORM_AXES, Attention, BlockConfig, Mlp, layer_norm
from fmcv_jax.parallel.rules import with_logical_constraint


class DecoderBlock(nn.Module):
  """Pre-norm decoder block (Vaswani et al. 2017): x [B, T, D] attends to itself and to `context` [B, S, D]."""

  logical_axes = (NORM_AXES,)

  config: BlockConfig

  @nn.compact
  def __call__(self, x, context):
    c = self.config
    x = with_logical_constraint(x, 'batch', 'tokens', 'width')
    x = x + Attention(c, name='attention')(layer_norm(c.eps, c.dtype, 'norm1')(x))
    x = x + Attention(c, name='cross_attention')(layer_norm(c.eps, c.dtype, 'norm2')(x), context)
    return x + Mlp(c, name='mlp')(layer_norm(c.eps, c.dtype, 'norm3')(x))
