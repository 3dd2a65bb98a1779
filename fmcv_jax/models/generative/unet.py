"""Convolutional denoisers of DDPM (Ho et al. 2020) and latent diffusion (Rombach et al. 2022), and their sizes.

Letters in shapes: B batch, C channels of the image or latent, L text tokens, E their width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.bounds import Decay, NonNegativeInt, PositiveInt
from fmcv_jax.diffusion.condition import UNCONDITIONAL, Condition
from fmcv_jax.errors import did_you_mean
from fmcv_jax.fields import ImageSize, height_width
from fmcv_jax.models.common.attention.dispatch import Backend
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
  Attention,
  BlockConfig,
  Dtype,
  Mlp,
  dense,
  layer_norm,
)
from fmcv_jax.models.common.scan import Remat, rematerialize, scan_layers
from fmcv_jax.models.generative.conditioning import ClassEmbedding, MLPEmbedder, timestep_embedding
from fmcv_jax.parallel.rules import with_logical_constraint


class TransformerBlock(nn.Module):
  """Self-attention of pixels [B, T, D], cross-attention to the text [B, L, E], and an MLP; a scan body."""

  logical_axes = (NORM_AXES,)

  config: BlockConfig

  @nn.compact
  def __call__(self, x: jax.Array, words: jax.Array | None, mask: jax.Array | None) -> tuple[jax.Array, None]:
    c = self.config
    x = with_logical_constraint(x, 'batch', 'tokens', 'width')
    x = x + Attention(c, name='attention')(layer_norm(c.eps, c.dtype, 'norm1')(x)).astype(x.dtype)
    y = layer_norm(c.eps, c.dtype, 'cross_norm')(x)
    x = x + Attention(c, name='cross_attention')(y, words, mask=mask).astype(x.dtype)
    x = x + Mlp(c, name='mlp')(layer_norm(c.eps, c.dtype, 'norm2')(x)).astype(x.dtype)
    return with_logical_constraint(x, 'batch', 'tokens', 'width'), None


class Transformer(nn.Module):
  """`depth` blocks over the pixels of [B, H, W, C] with a residual connection; zero-initialized output projection."""

  logical_axes = (
    (r'(.*/)?(enter|leave)/kernel', ('embed', None)),
    (r'(.*/)?(enter|leave)/bias', (None,)),
    NORM_AXES,
  )

  config: BlockConfig
  depth: int

  @nn.compact
  def __call__(self, x: jax.Array, words: jax.Array | None, mask: jax.Array | None) -> jax.Array:
    batch, height, width, channels = x.shape
    dtype = self.config.dtype
    y = group_norm(channels, dtype, 'norm')(x).reshape(batch, height * width, channels)
    y = dense(channels, dtype, 'enter')(y)
    blocks = scan_layers(TransformerBlock, self.depth, (nn.broadcast, nn.broadcast))(self.config, name='blocks')
    y = dense(channels, dtype, 'leave', init=nn.initializers.zeros)(blocks(y, words, mask)[0])
    return x + y.reshape(x.shape)


class BlockCondition(NamedTuple):
  """Condition of every block: time embedding (with class or pooled text) [B, D], and text [B, L, E] with its mask."""

  time: jax.Array
  words: jax.Array | None = None
  mask: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """Options shared by the encoder and decoder of a UNet.

  block_out_channels   channels per level, from the highest resolution; each level halves the side
  depths               attention per level: number of transformer blocks, or (without text) 1 for self-attention
  num_heads            attention heads per level
  layers               residual blocks per level of the encoder; the decoder has one more
  family               'ddpm' (Ho et al. 2020): norm eps 1e-6, downsampling pads at the bottom and right, timestep
                       frequencies end at 1 / 10,000. 'ldm' (Rombach et al. 2022): 1e-5, padding on all sides,
                       frequencies end before it
  cross_attention_dim  width of the text embeddings; 0 for a network without text
  """

  block_out_channels: tuple[int, ...]
  depths: tuple[int, ...]
  num_heads: tuple[int, ...]
  layers: int
  family: Literal['ddpm', 'ldm']
  cross_attention_dim: int = 0
  dropout: float = 0.0
  attention: Backend = 'auto'
  remat: Remat = 'none'
  dtype: Dtype = 'float32'

  @property
  def eps(self) -> float:
    """Epsilon of the group norms of residual blocks, as published for each family."""
    return 1e-6 if self.family == 'ddpm' else 1e-5

  def residual(self, x: jax.Array, c: BlockCondition, features: int, train: bool, name: str) -> jax.Array:
    """A residual block; to be called, like `attend`, in the compact method that owns its scope."""
    block = rematerialize(ResidualBlock, self.remat)
    return block(features, self.eps, self.dropout if train else 0.0, self.dtype, name=name)(x, c.time)

  def attend(self, x: jax.Array, c: BlockCondition, level: int, name: str) -> jax.Array:
    """The transformer (or the plain self-attention, without cross-attention) of a level, on x [B, H, W, C]."""
    depth = max(1, self.depths[level])
    if not self.cross_attention_dim:
      return rematerialize(SpatialAttention, self.remat)(self.num_heads[level], self.eps, self.dtype, name=name)(x)
    config = BlockConfig(
      self.num_heads[level],
      4 * x.shape[-1],
      gated_mlp=True,
      qkv_bias=False,
      eps=1e-5,
      attention=self.attention,
      dtype=self.dtype,
    )
    return rematerialize(Transformer, self.remat)(config, depth, name=name)(x, c.words, c.mask)


class ControlResiduals(NamedTuple):
  """Outputs of a ControlNet, added to the skip connections of the decoder and to the lowest level."""

  skips: list[jax.Array]
  middle: jax.Array


class Encoder(nn.Module):
  """x [B, H, W, C] -> skip connections for the decoder, one per block and convolution; the lowest level [B, h, w, D];
  BlockCondition.

  `hint` [B, H, W, block_out_channels[0]] is added to the output of the first convolution.
  """

  logical_axes = (
    # Images and latents have few channels, which are not sharded.
    (r'(.*/)?encoder/conv_in/kernel', (None, None, None, 'embed')),
    (r'(.*/)?encoder/conv_in/bias', (None,)),
  )

  config: UNetConfig
  num_classes: int = 0
  pooled_text: bool = False

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    time: jax.Array,
    condition: Condition = UNCONDITIONAL,
    *,
    hint: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[list[jax.Array], jax.Array, BlockCondition]:
    p = self.config
    c = self._block_condition(time, condition)
    x = conv(p.block_out_channels[0], p.dtype, 'conv_in')(with_logical_constraint(x, 'batch', None, None, None))
    if hint is not None:
      x = x + hint
    skips = [x]
    for level, features in enumerate(p.block_out_channels):
      for layer in range(p.layers):
        x = p.residual(x, c, features, train, f'down{level}_block{layer}')
        if p.depths[level]:
          x = p.attend(x, c, level, f'down{level}_attention{layer}')
        skips.append(x)
      if level < len(p.block_out_channels) - 1:
        x = Downsample(p.family == 'ldm', p.dtype, name=f'down{level}_down')(x)
        skips.append(x)
    x = p.residual(x, c, p.block_out_channels[-1], train, 'middle_block0')
    x = p.attend(x, c, len(p.block_out_channels) - 1, 'middle_attention0')
    return skips, p.residual(x, c, p.block_out_channels[-1], train, 'middle_block1'), c

  def _block_condition(self, time: jax.Array, condition: Condition) -> BlockCondition:
    p, width = self.config, 4 * self.config.block_out_channels[0]
    c = timestep_embedding(time, p.block_out_channels[0], include_last=p.family == 'ddpm').astype(p.dtype)
    c = MLPEmbedder(width, p.dtype, name='time_embedding')(c)
    if self.pooled_text:
      c = c + MLPEmbedder(width, p.dtype, name='text_embedding')(condition['pooled_text'])
    if self.num_classes:
      label = ClassEmbedding(self.num_classes, p.cross_attention_dim or width, name='classes')(
        condition['label']
      ).astype(p.dtype)
      return BlockCondition(c, label[:, None]) if p.cross_attention_dim else BlockCondition(c + label)
    if not p.cross_attention_dim:
      return BlockCondition(c)
    words: Any = condition['text']
    if words.shape[-1] != p.cross_attention_dim:
      raise ValueError(
        f'cross_attention_dim: text embedding width {words.shape[-1]} does not match {p.cross_attention_dim}'
      )
    return BlockCondition(c, words, condition['text_mask'][:, None, None, :] if 'text_mask' in condition else None)


class Decoder(nn.Module):
  """Outputs of an Encoder -> [B, H, W, out_channels]; levels are counted from the highest resolution."""

  logical_axes = (
    (r'(.*/)?decoder/conv_out/kernel', (None, None, 'embed', None)),
    (r'(.*/)?decoder/conv_out/bias', (None,)),
    NORM_AXES,
  )

  config: UNetConfig
  out_channels: int

  @nn.compact
  def __call__(self, skips: Sequence[jax.Array], x: jax.Array, c: BlockCondition, *, train: bool = False) -> jax.Array:
    p, remaining = self.config, [*skips]
    for level in reversed(range(len(p.block_out_channels))):
      for layer in range(p.layers + 1):
        x = jnp.concatenate([x, remaining.pop()], axis=-1)
        x = p.residual(x, c, p.block_out_channels[level], train, f'up{level}_block{layer}')
        if p.depths[level]:
          x = p.attend(x, c, level, f'up{level}_attention{layer}')
      if level:
        x = Upsample(p.dtype, name=f'up{level}_up')(x)
    x = jax.nn.silu(group_norm(x.shape[-1], p.dtype, 'norm', p.eps)(x))
    return conv(self.out_channels, p.dtype, 'conv_out', init=nn.initializers.zeros)(x)


class UNet(nn.Module):
  """Noisy images or latents [B, H, W, channels], time [B] (in steps, 0 to 1000), Condition -> [B, H, W, out_channels].

  `num_classes` is 0 for a network without labels; with cross-attention a class is a text of one token, otherwise its
  embedding is added to the time embedding. `pooled_text` adds the condition's `pooled_text` to the time embedding;
  `extra_in_channels` is the number of channels of the condition's `image`. `residuals` are the outputs of a ControlNet.
  With dropout, training needs the rng 'dropout'.
  """

  config: UNetConfig
  channels: int
  out_channels: int
  image_size: ImageSize
  num_classes: int = 0
  pooled_text: bool = False
  extra_in_channels: int = 0

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """Shape of one x."""
    return (*height_width(self.image_size), self.channels)

  @property
  def condition_keys(self) -> tuple[str, ...]:
    """Keys of the condition that the network reads."""
    text = ('text', 'text_mask') if self.config.cross_attention_dim and not self.num_classes else ()
    label, image = ('label',) * bool(self.num_classes), ('image',) * bool(self.extra_in_channels)
    return label + text + ('pooled_text',) * self.pooled_text + image

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    time: jax.Array,
    condition: Condition = UNCONDITIONAL,
    *,
    residuals: ControlResiduals | None = None,
    train: bool = False,
  ) -> jax.Array:
    if self.extra_in_channels:
      extra: Any = condition['image']
      x = jnp.concatenate([x, extra.astype(x.dtype)], axis=-1)
    encoder = Encoder(self.config, self.num_classes, self.pooled_text, name='encoder')
    skips, x, c = encoder(x, time, condition, train=train)
    if residuals is not None:
      skips = [skip + more for skip, more in zip(skips, residuals.skips, strict=True)]
      x = x + residuals.middle
    return Decoder(self.config, self.out_channels, name='decoder')(skips, x, c, train=train).astype(jnp.float32)


class Size(NamedTuple):
  """Row of the table of sizes; `num_heads` per level or, if that is 0, `head_dim` channels per head."""

  block_out_channels: tuple[int, ...]
  depths: tuple[int, ...]
  num_heads: int
  head_dim: int
  cross_attention_dim: int
  channels: int
  image_size: int
  family: Literal['ddpm', 'ldm'] = 'ldm'
  pooled_text: bool = False


# ddpm-*: Ho et al. 2020, appendix B (CIFAR-10; LSUN and CelebA-HQ). ldm*: Rombach et al. 2022, tables 12 and 13, for
# f4 and f8 latents. sd*: Stable Diffusion 1, 2 and XL (Podell et al. 2023). mu is for tests.
SIZES: dict[str, Size] = {
  'mu': Size((16, 32), (1, 0), 2, 0, 16, 4, 8),
  'ddpm-32': Size((128, 256, 256, 256), (0, 1, 0, 0), 1, 0, 0, 3, 32, 'ddpm'),
  'ddpm-256': Size((128, 128, 256, 256, 512, 512), (0, 0, 0, 0, 1, 0), 1, 0, 0, 3, 256, 'ddpm'),
  'ldm4': Size((224, 448, 672, 896), (0, 1, 1, 1), 0, 32, 0, 3, 64),
  'ldm4-classes': Size((192, 384, 576, 960), (0, 1, 1, 1), 1, 0, 512, 3, 64),
  'ldm8-classes': Size((256, 512, 1024), (1, 1, 1), 0, 32, 512, 4, 32),
  'ldm8-text': Size((320, 640, 1280, 1280), (1, 1, 1, 0), 8, 0, 1280, 4, 32),
  'sd1': Size((320, 640, 1280, 1280), (1, 1, 1, 0), 8, 0, 768, 4, 64),
  'sd2': Size((320, 640, 1280, 1280), (1, 1, 1, 0), 0, 64, 1024, 4, 64),
  'sdxl': Size((320, 640, 1280), (0, 2, 10), 0, 64, 2048, 4, 128, pooled_text=True),
}


def unet(
  variant: str = 'sd1',
  *,
  image_size: ImageSize | None = None,
  channels: PositiveInt | None = None,
  out_channels: PositiveInt | None = None,
  num_classes: NonNegativeInt = 0,
  cross_attention_dim: NonNegativeInt | None = None,
  pooled_text: bool | None = None,
  extra_in_channels: NonNegativeInt = 0,
  dropout: Decay = 0.0,
  block_out_channels: tuple[PositiveInt, ...] | None = None,
  depths: tuple[NonNegativeInt, ...] | None = None,
  num_heads: tuple[PositiveInt, ...] | None = None,
  layers: PositiveInt = 2,
  attention: Backend = 'auto',
  remat: Remat = 'none',
  dtype: Dtype = 'float32',
) -> UNet:
  """A named UNet; image_size is the side, or the (height, width), of x: 64 for 512 pixels with kl-f8.

  out_channels         output channels, by default those of x; twice as many for a learned variance
  cross_attention_dim  width of the text embeddings
  extra_in_channels    channels concatenated to x: 5 for inpainting, the mask and the latent of the masked image
  """
  if variant not in SIZES:
    raise ValueError(f'unknown UNet variant {variant!r}; {did_you_mean(variant, SIZES)}')
  size = SIZES[variant]
  block_out_channels, depths = block_out_channels or size.block_out_channels, depths or size.depths
  image_size, channels = image_size or size.image_size, channels or size.channels
  if len(block_out_channels) != len(depths):
    raise ValueError(f'depths: {depths} must have one entry per level of block_out_channels, {block_out_channels}')
  if any(side % 2 ** (len(block_out_channels) - 1) for side in height_width(image_size)):
    raise ValueError(f'image_size: {image_size} is not divisible by {2 ** (len(block_out_channels) - 1)}')
  if any(w % groups_of(w) for w in block_out_channels):
    raise ValueError(f'block_out_channels: {block_out_channels} must be multiples of 32, or of 4 below 128')
  num_heads = num_heads or tuple(size.num_heads or w // size.head_dim for w in block_out_channels)
  if len(num_heads) != len(block_out_channels):
    raise ValueError(
      f'num_heads: {num_heads} must have one entry per level of block_out_channels, {block_out_channels}'
    )
  if any(w % h for w, h in zip(block_out_channels, num_heads, strict=True)):
    raise ValueError(f'block_out_channels: {block_out_channels} are not divisible by {num_heads} heads')
  config = UNetConfig(
    block_out_channels=block_out_channels,
    depths=depths,
    num_heads=num_heads,
    layers=layers,
    family=size.family,
    cross_attention_dim=size.cross_attention_dim if cross_attention_dim is None else cross_attention_dim,
    dropout=dropout,
    attention=attention,
    remat=remat,
    dtype=dtype,
  )
  return UNet(
    config=config,
    channels=channels,
    out_channels=out_channels or channels,
    image_size=image_size,
    num_classes=num_classes,
    pooled_text=size.pooled_text if pooled_text is None else pooled_text,
    extra_in_channels=extra_in_channels,
  )
