"""Blocks of convolutional autoencoders and UNets, on images [B, H, W, C].

Shapes follow Rombach et al. 2022; 1 x 1 convolutions are dense layers.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.models.common.layers import NORM_AXES, Attention, BlockConfig, cast_param, dense
from fmcv_jax.models.common.patches import unpatchify
from fmcv_jax.parallel.rules import with_logical_constraint

# Groups of every group norm; narrow networks have fewer, of four channels each: groups of one would remove the colors.
GROUPS = 32
GLOROT = nn.initializers.xavier_uniform()


def conv(
  features: int,
  dtype: str,
  name: str,
  *,
  size: int = 3,
  stride: int = 1,
  padding: str | Sequence[tuple[int, int]] = 'SAME',
  init: nn.initializers.Initializer = GLOROT,
) -> nn.Conv:
  """Convolution with bias, padded to keep the size for a stride of 1; parameters float32, products in `dtype`."""
  return nn.Conv(
    features, (size, size), (stride, stride), padding=padding, dtype=jnp.dtype(dtype), kernel_init=init, name=name
  )


def groups_of(channels: int) -> int:
  """Number of groups of a group norm."""
  return min(GROUPS, max(1, channels // 4))


def group_norm(channels: int, dtype: str, name: str, eps: float = 1e-6) -> nn.GroupNorm:
  """Group norm with the number of groups of `groups_of`; statistics float32, with a two-pass variance."""
  return nn.GroupNorm(groups_of(channels), epsilon=eps, dtype=jnp.dtype(dtype), name=name, use_fast_variance=False)


class ResidualBlock(nn.Module):
  """Two convolutions with a residual connection: [B, H, W, C] -> [B, H, W, features].

  With a time embedding [B, E], the last convolution is initialized to zero (Ho et al. 2020). `dropout` needs the rng
  'dropout'.
  """

  logical_axes = (
    (r'(.*/)?\w*block\d+/conv[12]/kernel', (None, None, None, 'embed')),
    (r'(.*/)?\w*block\d+/(modulation|shortcut)/kernel', ('embed', None)),
    (r'(.*/)?\w*block\d+/(conv[12]|modulation|shortcut)/bias', (None,)),
    NORM_AXES,
  )

  features: int
  eps: float = 1e-6
  dropout: float = 0.0
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
    y = jax.nn.silu(group_norm(x.shape[-1], self.dtype, 'norm1', self.eps)(x))
    y = conv(self.features, self.dtype, 'conv1')(y)
    last = GLOROT
    if time is not None:
      y = y + dense(self.features, self.dtype, 'modulation')(jax.nn.silu(time))[:, None, None]
      last = nn.initializers.zeros
    y = jax.nn.silu(group_norm(self.features, self.dtype, 'norm2', self.eps)(y))
    if self.dropout:
      y = nn.Dropout(self.dropout, deterministic=False)(y)
    y = conv(self.features, self.dtype, 'conv2', init=last)(y)
    if x.shape[-1] != self.features:
      x = dense(self.features, self.dtype, 'shortcut')(x)
    return with_logical_constraint(x + y, 'batch', None, None, None)


class SpatialAttention(nn.Module):
  """Self-attention over pixels with a residual connection: [B, H, W, C] -> [B, H, W, C]."""

  logical_axes = (NORM_AXES,)

  num_heads: int = 1
  eps: float = 1e-6
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    config = BlockConfig(self.num_heads, 0, dtype=self.dtype)  # type: ignore[arg-type]
    y = group_norm(channels, self.dtype, 'norm', self.eps)(x).reshape(batch, height * width, channels)
    return x + Attention(config, name='attention')(y).reshape(x.shape)


class Downsample(nn.Module):
  """Halves both sides; `centered` pads on all sides, else below and to the right only."""

  logical_axes = (
    (r'(.*/)?\w+_down/conv/kernel', (None, None, None, 'embed')),
    (r'(.*/)?\w+_down/conv/bias', (None,)),
  )

  centered: bool = False
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    padding = (1, 1) if self.centered else (0, 1)
    return conv(x.shape[-1], self.dtype, 'conv', stride=2, padding=[padding, padding])(x)


class Upsample(nn.Module):
  """Doubles both sides: nearest-neighbor upsampling, then a convolution."""

  logical_axes = (
    (r'(.*/)?\w+_up/conv/kernel', (None, None, None, 'embed')),
    (r'(.*/)?\w+_up/conv/bias', (None,)),
  )

  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return conv(channels, self.dtype, 'conv')(x.reshape(batch, 2 * height, 2 * width, channels))


class PixelExpand(nn.Module):
  """A transposed convolution with a stride of its size: each pixel becomes `factor` x `factor` pixels.

  [B, H, W, C] -> [B, factor * H, factor * W, features]; `kernel` is [C, factor * factor * features].
  """

  features: int
  factor: int
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    batch, rows, columns, channels = x.shape
    kernel = self.param('kernel', GLOROT, (channels, self.factor**2 * self.features))
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    dtype = jnp.dtype(self.dtype)
    y = jnp.dot(x.astype(dtype), cast_param(kernel, dtype)).reshape(batch, rows * columns, -1)
    y = unpatchify(y, (rows, columns), self.factor)
    return (y.astype(bias.dtype) + bias).astype(dtype)
