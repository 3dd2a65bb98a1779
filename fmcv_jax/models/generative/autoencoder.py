"""Convolutional autoencoder with a Gaussian latent (Rombach et al. 2022, section 3.1), and its table of sizes.

Letters in shapes: B batch, h, w rows and columns of the latent, z its channels.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.bounds import PositiveInt
from fmcv_jax.errors import did_you_mean
from fmcv_jax.fields import ImageSize, height_width
from fmcv_jax.models.common.conv_blocks import (
  Downsample,
  ResidualBlock,
  SpatialAttention,
  Upsample,
  conv,
  group_norm,
  groups_of,
)
from fmcv_jax.models.common.layers import (
  NORM_AXES,
  Dtype,
  dense,
)
from fmcv_jax.models.common.scan import Remat, rematerialize
from fmcv_jax.parallel.rules import with_logical_constraint


class Gaussian(NamedTuple):
  """Diagonal Gaussian: mean and log-variance, float32 [B, ..., z]."""

  mean: jax.Array
  log_variance: jax.Array

  def sample(self, rng: jax.Array) -> jax.Array:
    """A sample mean + exp(log_variance / 2) * noise, [B, h, w, z]."""
    return self.mean + jnp.exp(0.5 * self.log_variance) * jax.random.normal(rng, self.mean.shape)

  def kl(self) -> jax.Array:
    """KL divergence from the standard normal, [B], summed over the latent."""
    terms = jnp.square(self.mean) + jnp.exp(self.log_variance) - 1 - self.log_variance
    return 0.5 * terms.sum(axis=tuple(range(1, terms.ndim)))


class MidBlock(nn.Module):
  """Residual block, attention, residual block at the lowest resolution."""

  attention: bool
  dtype: str
  remat: Remat

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    block, attention = (rematerialize(module, self.remat) for module in (ResidualBlock, SpatialAttention))
    x = block(x.shape[-1], dtype=self.dtype, name='block0')(x)
    if self.attention:
      x = attention(dtype=self.dtype, name='attention0')(x)
    return block(x.shape[-1], dtype=self.dtype, name='block1')(x)


class Encoder(nn.Module):
  """Images [B, H, W, C] -> [B, h, w, outputs], halving both sides between levels."""

  logical_axes = (
    # Images and latents have few channels, which are not sharded.
    (r'(.*/)?encoder/conv_in/kernel', (None, None, None, 'embed')),
    (r'(.*/)?encoder/conv_in/bias', (None,)),
    (r'(.*/)?encoder/conv_out/kernel', (None, None, 'embed', None)),
    (r'(.*/)?encoder/conv_out/bias', (None,)),
    NORM_AXES,
  )

  channels: tuple[int, ...]
  layers: int
  attention: tuple[bool, ...]
  middle_attention: bool
  out_channels: int
  dtype: str
  remat: Remat

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    block, attention = (rematerialize(module, self.remat) for module in (ResidualBlock, SpatialAttention))
    x = conv(self.channels[0], self.dtype, 'conv_in')(x)
    for level, features in enumerate(self.channels):
      for layer in range(self.layers):
        x = block(features, dtype=self.dtype, name=f'level{level}_block{layer}')(x)
        if self.attention[level]:
          x = attention(dtype=self.dtype, name=f'level{level}_attention{layer}')(x)
      if level < len(self.channels) - 1:
        x = Downsample(dtype=self.dtype, name=f'level{level}_down')(x)
    x = MidBlock(self.middle_attention, self.dtype, self.remat, name='middle')(x)
    x = jax.nn.silu(group_norm(x.shape[-1], self.dtype, 'norm')(x))
    return conv(self.out_channels, self.dtype, 'conv_out')(x)


class Decoder(nn.Module):
  """Latents [B, h, w, z] -> input of the last convolution, [B, H, W, channels[0]]; levels are counted from the highest
  resolution, as in the encoder."""

  logical_axes = (
    (r'(.*/)?decoder/conv_in/kernel', (None, None, None, 'embed')),
    (r'(.*/)?decoder/conv_in/bias', (None,)),
    NORM_AXES,
  )

  channels: tuple[int, ...]
  layers: int
  attention: tuple[bool, ...]
  middle_attention: bool
  dtype: str
  remat: Remat

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    block, attention = (rematerialize(module, self.remat) for module in (ResidualBlock, SpatialAttention))
    x = conv(self.channels[-1], self.dtype, 'conv_in')(z)
    x = MidBlock(self.middle_attention, self.dtype, self.remat, name='middle')(x)
    for level in reversed(range(len(self.channels))):
      for layer in range(self.layers + 1):
        x = block(self.channels[level], dtype=self.dtype, name=f'level{level}_block{layer}')(x)
        if self.attention[level]:
          x = attention(dtype=self.dtype, name=f'level{level}_attention{layer}')(x)
      if level:
        x = Upsample(dtype=self.dtype, name=f'level{level}_up')(x)
    return jax.nn.silu(group_norm(x.shape[-1], self.dtype, 'norm')(x))


class Autoencoder(nn.Module):
  """encode: images [B, H, W, 3] -> Gaussian [B, h, w, z]; decode: latents -> images; the sides of latents are
  2^(levels - 1) times smaller.

  `quantize` adds the two 1 x 1 convolutions next to the latent of the published LDM autoencoders.
  """

  logical_axes = (
    (r'(autoencoder/)?conv_out/kernel', (None, None, 'embed', None)),
    (r'(autoencoder/)?conv_out/bias', (None,)),
    (r'(.*/)?(quantize|unquantize)/kernel', (None, None)),
    (r'(.*/)?(quantize|unquantize)/bias', (None,)),
  )

  channels: tuple[int, ...]
  layers: int
  latent_channels: int
  attention: tuple[bool, ...]
  middle_attention: bool = True
  quantize: bool = True
  image_size: ImageSize = 256
  dtype: str = 'float32'
  remat: Remat = 'none'

  @override
  def setup(self) -> None:
    shape = (self.channels, self.layers, self.attention, self.middle_attention)
    self.encoder = Encoder(*shape, 2 * self.latent_channels, self.dtype, self.remat)
    self.decoder = Decoder(*shape, self.dtype, self.remat)
    self.conv_out = conv(3, self.dtype, 'conv_out')
    if self.quantize:
      self.quant_conv = dense(2 * self.latent_channels, self.dtype, 'quantize')
      self.post_quant_conv = dense(self.latent_channels, self.dtype, 'unquantize')

  @property
  def factor(self) -> int:
    """Downsampling factor: image side / latent side."""
    return 2 ** (len(self.channels) - 1)

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """Shape of one image."""
    return (*height_width(self.image_size), 3)

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """Shape of one latent, (h, w, z)."""
    height, width = height_width(self.image_size)
    return (height // self.factor, width // self.factor, self.latent_channels)

  def encode(self, images: jax.Array) -> Gaussian:
    """Gaussian over latents [B, h, w, z] of normalized images [B, H, W, 3]; ValueError for sides not divisible by
    `factor`."""
    if images.shape[1] % self.factor or images.shape[2] % self.factor:
      raise ValueError(f'images: {images.shape[1]} x {images.shape[2]} pixels are not divisible by {self.factor}')
    x = self.encoder(with_logical_constraint(images, 'batch', None, None, None))
    x = (self.quant_conv(x) if self.quantize else x).astype(jnp.float32)
    mean, log_variance = jnp.split(x, 2, axis=-1)
    return Gaussian(mean, jnp.clip(log_variance, -30.0, 20.0))

  def features(self, z: jax.Array) -> jax.Array:
    """Input of the last convolution, [B, H, W, channels[0]]."""
    return self.decoder(self.post_quant_conv(z) if self.quantize else z)

  def to_rgb(self, features: jax.Array) -> jax.Array:
    """Applies the last convolution: [B, H, W, channels[0]] -> float32 [B, H, W, 3]."""
    return self.conv_out(features).astype(jnp.float32)

  def decode(self, z: jax.Array) -> jax.Array:
    """Latents [B, h, w, z] -> normalized images, float32 [B, H, W, 3]."""
    return self.to_rgb(self.features(z))

  def __call__(self, images: jax.Array, rng: jax.Array | None = None) -> tuple[jax.Array, Gaussian]:
    """Reconstruction from the mean of the latent or, with an rng, from a sample; and the Gaussian."""
    latent = self.encode(images)
    return self.decode(latent.mean if rng is None else latent.sample(rng)), latent


# Channels per level, residual blocks per level, latent channels, levels with attention, `quantize`. kl-*: Rombach et
# al. 2022, table 8 (kl-f8 is the one of Stable Diffusion 1 and 2); 16ch: Stable Diffusion 3 (Esser et al. 2024).
SIZES: dict[str, tuple[tuple[int, ...], int, int, tuple[int, ...], bool]] = {
  'kl-f4': ((128, 256, 512), 2, 3, (), True),
  'kl-f8': ((128, 256, 512, 512), 2, 4, (), True),
  'kl-f16': ((128, 128, 256, 256, 512), 2, 16, (4,), True),
  'kl-f32': ((128, 128, 256, 256, 512, 512), 2, 64, (4, 5), True),
  'f8-16ch': ((128, 256, 512, 512), 2, 16, (), False),
}


def autoencoder(
  variant: str = 'kl-f8',
  *,
  image_size: ImageSize = 256,
  channels: tuple[PositiveInt, ...] | None = None,
  layers: PositiveInt | None = None,
  latent_channels: PositiveInt | None = None,
  middle_attention: bool = True,
  dtype: Dtype = 'float32',
  remat: Remat = 'none',
) -> Autoencoder:
  """A named autoencoder; channels, layers and latent override the variant's."""
  if variant not in SIZES:
    raise ValueError(f'unknown autoencoder {variant!r}; {did_you_mean(variant, SIZES)}')
  own_channels, own_layers, own_latent, attention, quantize = SIZES[variant]
  channels = channels or own_channels
  if any(side % 2 ** (len(channels) - 1) for side in height_width(image_size)):
    raise ValueError(f'image_size: {image_size} is not divisible by {2 ** (len(channels) - 1)}')
  if any(c % groups_of(c) for c in channels):
    raise ValueError(f'channels: {channels} must be multiples of 32, or of 4 below 128')
  return Autoencoder(
    channels=channels,
    layers=layers or own_layers,
    latent_channels=latent_channels or own_latent,
    attention=tuple(level in attention for level in range(len(channels))),
    middle_attention=middle_attention,
    quantize=quantize,
    image_size=image_size,
    dtype=dtype,
    remat=remat,
  )
