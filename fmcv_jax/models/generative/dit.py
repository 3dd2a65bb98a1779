"""Diffusion transformer (Peebles & Xie 2023), conditioned on classes or texts, and its table of sizes.

Letters in shapes: B batch, T patches, D width, L text tokens, E their width, C channels of the image or latent.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.bounds import NonNegativeInt, PositiveInt
from fmcv_jax.diffusion.condition import UNCONDITIONAL, Condition
from fmcv_jax.errors import did_you_mean
from fmcv_jax.fields import ImageSize, height_width
from fmcv_jax.models.common.attention.dispatch import Backend
from fmcv_jax.models.common.conv_blocks import conv
from fmcv_jax.models.common.layers import (
  HEAD_AXES,
  NORM_AXES,
  Activation,
  Attention,
  BlockConfig,
  Dtype,
  Mlp,
  dense,
  layer_norm,
)
from fmcv_jax.models.common.patches import PATCH_AXES, patchify
from fmcv_jax.models.common.positions import sincos_2d
from fmcv_jax.models.common.scan import Remat, Unroll, scan_layers
from fmcv_jax.models.generative.adaln import MODULATION_AXES, final_layer, modulated_layer_norm, modulation
from fmcv_jax.models.generative.conditioning import ClassEmbedding, MLPEmbedder, timestep_embedding
from fmcv_jax.parallel.rules import with_logical_constraint


class DiTBlock(nn.Module):
  """adaLN-Zero block of x [B, T, D] with c [B, D], and cross-attention to text [B, L, E] (Chen et al. 2024, PixArt)."""

  logical_axes = (
    *MODULATION_AXES,
    NORM_AXES,
  )

  config: BlockConfig

  @nn.compact
  def __call__(
    self, carry: Any, index: jax.Array, c: jax.Array, text: jax.Array | None, mask: jax.Array | None, tap: int | None
  ) -> tuple[Any, None]:
    config, (x, tapped) = self.config, carry
    x = with_logical_constraint(x, 'batch', 'tokens', 'width')
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation(c, 6, x.shape[-1], config.dtype)
    y = Attention(config, name='attention')(modulated_layer_norm(x, config, shift1, scale1))
    x = x + (gate1 * y).astype(x.dtype)
    if text is not None:
      y = layer_norm(config.eps, config.dtype, 'cross_norm')(x)
      x = x + Attention(config, name='cross_attention')(y, text, mask=mask).astype(x.dtype)
    y = Mlp(config, name='mlp')(modulated_layer_norm(x, config, shift2, scale2))
    x = with_logical_constraint(x + (gate2 * y).astype(x.dtype), 'batch', 'tokens', 'width')
    return (x, None if tapped is None else jnp.where(index == tap, x, tapped)), None


class DetailHead(nn.Module):
  """Convolutions over the pixels of all patches, so that the predictions of adjacent patches meet without seams.

  Features of the tokens [B, H, W, F] and the noisy x [B, H, W, C] -> [B, H, W, outputs]: the first `outputs` features
  and a correction, which is zero at first, from all features and x.
  """

  logical_axes = (
    (r'(.*/)?detail/conv\d/kernel', (None, None, None, None)),
    (r'(.*/)?detail/conv\d/bias', (None,)),
  )

  outputs: int
  dtype: str

  @nn.compact
  def __call__(self, features: jax.Array, x: jax.Array) -> jax.Array:
    y = jnp.concatenate([features, x], axis=-1).astype(self.dtype)
    for index in (1, 2):
      y = jax.nn.relu(conv(features.shape[-1], self.dtype, f'conv{index}')(y))
    y = conv(self.outputs, self.dtype, 'conv3', init=nn.initializers.zeros)(y)
    return features[..., : self.outputs] + y.astype(features.dtype)


class DiT(nn.Module):
  """Noisy images or latents [B, H, W, channels], time [B] (in steps, 0 to 1000), Condition -> [B, H, W, out_channels].

  `num_classes` is 0 for a network that reads no label; `cross_attention` reads the condition's `text`,
  `pooled_text` adds its `pooled_text` to the time. `detail_features`: with a DetailHead, the channels of its features,
  at least out_channels; 0 for none, as published.
  """

  logical_axes = (
    *PATCH_AXES,
    *MODULATION_AXES,
    *HEAD_AXES,
  )

  patch_size: int
  width: int
  depth: int
  block: BlockConfig
  channels: int = 4
  out_channels: int = 4
  image_size: ImageSize = 32
  num_classes: int = 0
  cross_attention: bool = False
  pooled_text: bool = False
  detail_features: int = 0
  remat: Remat = 'none'
  unroll: Unroll = 1

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """Shape of one x."""
    return (*height_width(self.image_size), self.channels)

  @property
  def condition_keys(self) -> tuple[str, ...]:
    """Keys of the condition that the network reads."""
    text = ('text', 'text_mask') * self.cross_attention + ('pooled_text',) * self.pooled_text
    return ('label',) * bool(self.num_classes) + text

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    time: jax.Array,
    condition: Condition = UNCONDITIONAL,
    *,
    train: bool = False,
    tap: int | None = None,
  ) -> Any:
    """With `tap`, also the tokens [B, T, D] after that block (counted from 1)."""
    dtype, noisy = self.block.dtype, x
    x, grid = patchify(x, self.patch_size)
    x = dense(self.width, dtype, 'patch')(x)
    x = with_logical_constraint(x + jnp.asarray(sincos_2d(*grid, self.width), x.dtype), 'batch', 'tokens', 'width')
    c = MLPEmbedder(self.width, dtype, name='time_embedding')(timestep_embedding(time, 256).astype(dtype))
    if self.num_classes:
      c = c + ClassEmbedding(self.num_classes, self.width, name='classes')(condition['label']).astype(dtype)
    if self.pooled_text:
      c = c + MLPEmbedder(self.width, dtype, name='text_embedding')(condition['pooled_text'])
    text = mask = None
    if self.cross_attention:
      text = condition['text']
      mask = condition['text_mask'][:, None, None, :] if 'text_mask' in condition else None

    in_axes = (0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast)
    blocks = scan_layers(DiTBlock, self.depth, in_axes, remat=self.remat, unroll=self.unroll)(self.block, name='blocks')
    carry = (x, None if tap is None else jnp.zeros_like(x))
    (x, tapped), _ = blocks(carry, jnp.arange(1, self.depth + 1), c, text, mask, tap)

    x = final_layer(x, c, self.block, grid, self.patch_size, self.detail_features or self.out_channels)
    if self.detail_features:
      x = DetailHead(self.out_channels, dtype, name='detail')(x, noisy)
    return x if tap is None else (x, tapped)


# width, depth, heads (Peebles & Xie 2023, table 1); mu is for tests.
SIZES: dict[str, tuple[int, int, int]] = {
  'mu': (32, 2, 2),
  'S': (384, 12, 6),
  'B': (768, 12, 12),
  'L': (1024, 24, 16),
  'XL': (1152, 28, 16),
}


def dit(
  variant: str = 'XL/2',
  *,
  image_size: ImageSize = 32,
  channels: PositiveInt = 4,
  out_channels: PositiveInt | None = None,
  num_classes: NonNegativeInt = 0,
  cross_attention: bool = False,
  pooled_text: bool = False,
  detail_features: NonNegativeInt = 0,
  width: PositiveInt | None = None,
  depth: PositiveInt | None = None,
  num_heads: PositiveInt | None = None,
  activation: Activation = 'gelu_tanh',
  attention: Backend = 'auto',
  remat: Remat = 'none',
  unroll: Unroll = 1,
  dtype: Dtype = 'float32',
) -> DiT:
  """A named DiT, 'size/patch' as in 'XL/2'. image_size is the side, or the (height, width), of x: 32 for 256 pixels in
  kl-f8.

  out_channels: channels of the prediction, the input's by default; twice as many for a learned variance.
  detail_features: features per pixel of a convolutional head over all patches (DetailHead); 0 for none.
  """
  size, _, patch = variant.partition('/')
  if size not in SIZES or not patch.isdigit():
    known = [f'{name}/{p}' for name in SIZES for p in (2, 4, 8)]
    raise ValueError(f'unknown DiT variant {variant!r}; {did_you_mean(variant, known)}')
  if any(side % int(patch) for side in height_width(image_size)):
    raise ValueError(f'image_size: {image_size} is not divisible by the patch size {patch}')
  if 0 < detail_features < (out_channels or channels):
    raise ValueError(f'detail_features: {detail_features} is less than the {out_channels or channels} output channels')
  defaults = SIZES[size]
  width = width or defaults[0]
  return DiT(
    patch_size=int(patch),
    width=width,
    depth=depth or defaults[1],
    block=BlockConfig(num_heads or defaults[2], 4 * width, activation, attention=attention, dtype=dtype),
    channels=channels,
    out_channels=out_channels or channels,
    image_size=image_size,
    num_classes=num_classes,
    cross_attention=cross_attention,
    pooled_text=pooled_text,
    detail_features=detail_features,
    remat=remat,
    unroll=unroll,
  )
