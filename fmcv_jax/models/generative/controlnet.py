"""ControlNet (Zhang et al. 2023): a trainable copy of the encoder of a UNet that conditions the frozen UNet on images.

Letters in shapes: B batch, H, W sides of x.
"""

import flax.linen as nn
import jax

from fmcv_jax.diffusion.condition import Condition
from fmcv_jax.models.common.conv_blocks import conv
from fmcv_jax.models.common.layers import dense
from fmcv_jax.models.generative.unet import ControlResiduals, Encoder, UNet, UNetConfig

WIDTHS = (16, 32, 96, 256)  # channels per level of the hint encoder, as released


class Hint(nn.Module):
  """Control image [B, rows, columns, 3] -> [B, H, W, outputs], halving both sides per level; zero at initialization."""

  logical_axes = (
    (r'(.*/)?hint/conv\w+/kernel', (None, None, None, None)),
    (r'(.*/)?hint/conv\w+/bias', (None,)),
  )

  widths: tuple[int, ...]
  out_channels: int
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = jax.nn.silu(conv(self.widths[0], self.dtype, 'conv_in')(x))
    for level, (width, wider) in enumerate(zip(self.widths, self.widths[1:])):
      x = jax.nn.silu(conv(width, self.dtype, f'conv{2 * level}')(x))
      x = conv(wider, self.dtype, f'conv{2 * level + 1}', stride=2, padding=[(1, 1), (1, 1)])(x)
      x = jax.nn.silu(x)
    return conv(self.out_channels, self.dtype, 'conv_out', init=nn.initializers.zeros)(x)


class ControlNet(nn.Module):
  """x [B, H, W, C], time [B], a condition with `control` -> ControlResiduals, all zero at initialization.

  Its 'encoder' has the same parameters as the encoder of the UNet, and is initialized from them.
  """

  logical_axes = (
    (r'(.*/)?zero_\w+/kernel', ('embed', None)),
    (r'(.*/)?zero_\w+/bias', (None,)),
  )

  config: UNetConfig
  widths: tuple[int, ...]
  num_classes: int = 0
  pooled_text: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array, condition: Condition, *, train: bool = False) -> ControlResiduals:
    dtype = self.config.dtype
    hint = Hint(self.widths, self.config.block_out_channels[0], dtype, name='hint')(condition['control'])
    encoder = Encoder(self.config, self.num_classes, self.pooled_text, name='encoder')
    skips, x, _ = encoder(x, time, condition, hint=hint, train=train)

    def zero(x: jax.Array, name: str) -> jax.Array:
      y = dense(x.shape[-1], dtype, f'zero_{name}', init=nn.initializers.zeros)(x)
      return (
        y if 'control_scale' not in condition else y * condition['control_scale'][:, None, None, None].astype(y.dtype)
      )

    return ControlResiduals([zero(skip, str(index)) for index, skip in enumerate(skips)], zero(x, 'middle'))


def controlnet(unet: UNet, factor: int) -> ControlNet:
  """The ControlNet of a UNet, for control images whose sides are `factor` times those of x: 1, 2, 4 or 8."""
  if factor not in (1, 2, 4, 8):
    raise ValueError(f'control: images must be 1, 2, 4 or 8 times as large as x, not {factor}')
  if unet.extra_in_channels:
    raise ValueError('network: ControlNet is not supported for inpainting UNets (extra_in_channels)')
  return ControlNet(unet.config, WIDTHS[: factor.bit_length()], unet.num_classes, unet.pooled_text)
