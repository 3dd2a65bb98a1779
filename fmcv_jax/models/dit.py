"""Diffusion transformer (Peebles & Xie 2023), told classes or texts, and its table of sizes.

Letters in shapes: B batch, T patches, D width, L words, E width of a word, C channels of the picture or latent.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.errors import nearest
from fmcv_jax.models.attention import Backend
from fmcv_jax.models.conditioning import NOTHING, ClassEmbedding, Condition, Perceptron, sinusoids
from fmcv_jax.models.layers import (
  Activation,
  Attention,
  BlockConfig,
  Dtype,
  Mlp,
  Remat,
  Unroll,
  dense,
  layer_norm,
  scanned,
)
from fmcv_jax.models.positions import sincos_2d
from fmcv_jax.models.vit import patches_of
from fmcv_jax.parallel.rules import constrain


def modulation(c: jax.Array, parts: int, width: int, dtype: str) -> list[jax.Array]:
  """`parts` vectors [B, 1, D] from the condition c [B, D]; born zero."""
  y = dense(parts * width, dtype, 'modulation', init=nn.initializers.zeros)(jax.nn.silu(c))
  return jnp.split(y[:, None], parts, axis=-1)


def plain_norm(x: jax.Array, config: BlockConfig, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """LayerNorm whose scale and shift are the condition's."""
  return bare_norm(config)(x) * (1 + scale) + shift


def bare_norm(config: BlockConfig) -> nn.LayerNorm:
  """LayerNorm without parameters."""
  return nn.LayerNorm(epsilon=config.eps, dtype=jnp.dtype(config.dtype), use_bias=False, use_scale=False)


class DiTBlock(nn.Module):
  """adaLN-Zero block, x [B, T, D] told c [B, D], and text [B, L, E] by cross-attention (Chen et al. 2024, PixArt)."""

  config: BlockConfig

  @nn.compact
  def __call__(self, carry, index, c, text, mask, tap):
    config, (x, tapped) = self.config, carry
    x = constrain(x, 'batch', 'tokens', 'width')
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation(c, 6, x.shape[-1], config.dtype)
    y = Attention(config, name='attention')(plain_norm(x, config, shift1, scale1))
    x = x + (gate1 * y).astype(x.dtype)
    if text is not None:
      y = layer_norm(config.eps, config.dtype, 'cross_norm')(x)
      x = x + Attention(config, name='cross_attention')(y, text, mask=mask).astype(x.dtype)
    y = Mlp(config, name='mlp')(plain_norm(x, config, shift2, scale2))
    x = constrain(x + (gate2 * y).astype(x.dtype), 'batch', 'tokens', 'width')
    return (x, None if tapped is None else jnp.where(index == tap, x, tapped)), None


class DiT(nn.Module):
  """Noisy pictures or latents [B, H, W, channels], time [B] (in steps, 0 to 1000), Condition -> [B, H, W, outputs].

  `classes` is their number, 0 for a network that is told none; `cross_attention` reads Condition.text, `pooled_text`
  adds Condition.pooled to the time.
  """

  patch: int
  width: int
  depth: int
  block: BlockConfig
  channels: int = 4
  outputs: int = 4
  image_size: int = 32
  classes: int = 0
  cross_attention: bool = False
  pooled_text: bool = False
  remat: Remat = 'none'
  unroll: Unroll = 1

  @nn.compact
  def __call__(self, x, time, condition: Condition = NOTHING, *, train: bool = False, tap: int | None = None) -> Any:
    """With `tap`, also the tokens [B, T, D] after that block (counted from 1)."""
    dtype = self.block.dtype
    x, grid = patches_of(x, self.patch)
    x = dense(self.width, dtype, 'patch')(x)
    x = constrain(x + jnp.asarray(sincos_2d(*grid, self.width), x.dtype), 'batch', 'tokens', 'width')
    c = Perceptron(self.width, dtype, name='time_embedding')(sinusoids(time, 256).astype(dtype))
    if self.classes:
      c = c + ClassEmbedding(self.classes, self.width, name='classes')(condition.label).astype(dtype)
    if self.pooled_text:
      c = c + Perceptron(self.width, dtype, name='text_embedding')(condition.pooled)
    text = mask = None
    if self.cross_attention:
      text = condition.text
      mask = None if condition.mask is None else condition.mask[:, None, None, :]

    in_axes = (0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast)
    blocks = scanned(DiTBlock, self.depth, in_axes, remat=self.remat, unroll=self.unroll)(self.block, name='blocks')
    carry = (x, None if tap is None else jnp.zeros_like(x))
    (x, tapped), _ = blocks(carry, jnp.arange(1, self.depth + 1), c, text, mask, tap)

    x = final_layer(x, c, self.block, grid, self.patch, self.outputs)
    return x if tap is None else (x, tapped)


def final_layer(
  x: jax.Array, c: jax.Array, config: BlockConfig, grid: tuple[int, int], patch: int, outputs: int
) -> jax.Array:
  """Tokens x [B, T, D] of a grid, told c [B, D] -> [B, H, W, outputs], float32; born zero.

  To be called in the compact method that owns the scopes `modulation` and `head`.
  """
  shift, scale = modulation(c, 2, x.shape[-1], config.dtype)
  x = plain_norm(x, config, shift, scale)
  x = dense(patch**2 * outputs, config.dtype, 'head', init=nn.initializers.zeros)(x)
  return picture_of(x.astype(jnp.float32), grid, patch)


def picture_of(patches: jax.Array, grid: tuple[int, int], patch: int) -> jax.Array:
  """The inverse of patches_of: [B, rows * columns, patch * patch * C] -> [B, H, W, C]."""
  (rows, columns), batch = grid, patches.shape[0]
  x = patches.reshape(batch, rows, columns, patch, patch, -1).swapaxes(2, 3)
  return x.reshape(batch, rows * patch, columns * patch, -1)


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
  image_size: int = 32,
  channels: int = 4,
  outputs: int | None = None,
  classes: int = 0,
  cross_attention: bool = False,
  pooled_text: bool = False,
  width: int | None = None,
  depth: int | None = None,
  heads: int | None = None,
  activation: Activation = 'gelu_tanh',
  attention: Backend = 'auto',
  remat: Remat = 'none',
  unroll: Unroll = 1,
  dtype: Dtype = 'float32',
) -> DiT:
  """A named DiT, 'size/patch' as in 'XL/2'. image_size is a side of what it denoises: 32 for 256 pixels in kl-f8.

  outputs: channels of what it predicts, the input's by default; twice as many for a learned variance.
  """
  size, _, patch = variant.partition('/')
  if size not in SIZES or not patch.isdigit():
    known = [f'{name}/{p}' for name in SIZES for p in (2, 4, 8)]
    raise ValueError(f'unknown DiT variant {variant!r}; {nearest(variant, known)}')
  if image_size % int(patch):
    raise ValueError(f'image_size {image_size} does not divide into patches of {patch}')
  defaults = SIZES[size]
  width = width or defaults[0]
  return DiT(
    patch=int(patch),
    width=width,
    depth=depth or defaults[1],
    block=BlockConfig(heads or defaults[2], 4 * width, activation, attention=attention, dtype=dtype),
    channels=channels,
    outputs=outputs or channels,
    image_size=image_size,
    classes=classes,
    cross_attention=cross_attention,
    pooled_text=pooled_text,
    remat=remat,
    unroll=unroll,
  )
