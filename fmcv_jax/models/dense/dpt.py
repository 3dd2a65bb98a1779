"""Depth of every pixel from a vision transformer: DPT (Ranftl et al. 2021) as in Depth Anything (Yang et al. 2024).

Tokens of four blocks become maps at 4, 2, 1 and 1/2 times the resolution of the patches, which are fused from the
coarsest to the finest.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.bounds import PositiveFloat, PositiveInt
from fmcv_jax.errors import did_you_mean
from fmcv_jax.fields import ImageSize
from fmcv_jax.models.backbones.vit import ViT, vit
from fmcv_jax.models.common.attention.dispatch import Backend
from fmcv_jax.models.common.conv_blocks import PixelExpand, conv
from fmcv_jax.models.common.layers import Dtype, dense
from fmcv_jax.models.common.scan import Remat, Unroll
from fmcv_jax.parallel.rules import with_logical_constraint

Four = tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]
FACTORS = (4, 2, 1, 0.5)  # resolution of each level relative to the patches

_CONV = (None, None, None, 'embed')


def resize_bilinear(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """x [B, H, W, C] resized so that the centers of the corner pixels stay where they are (PyTorch's `align_corners`)."""
  if x.shape[1:3] == size:
    return x
  scale = jnp.array([max(new - 1, 1) / max(old - 1, 1) for old, new in zip(x.shape[1:3], size, strict=True)])
  shape = (x.shape[0], *size, x.shape[-1])
  return jax.image.scale_and_translate(x, shape, (1, 2), scale, 0.5 - 0.5 * scale, 'linear', antialias=False)


class Reassemble(nn.Module):
  """Tokens of patches as a map of one level: [B, rows, columns, D] -> [B, factor * rows, factor * columns, width]."""

  logical_axes = (
    (r'(.*/)?reassemble\d/project/kernel', ('embed', None)),
    (r'(.*/)?reassemble[12]/resize/kernel', ('embed', None)),
    (r'(.*/)?reassemble4/resize/kernel', _CONV),
    (r'(.*/)?reassemble\d/align/kernel', _CONV),
    (r'(.*/)?reassemble\d/(project|resize)/bias', (None,)),
  )

  channels: int
  width: int
  factor: float
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = dense(self.channels, self.dtype, 'project')(x)
    if self.factor > 1:
      x = PixelExpand(self.channels, int(self.factor), self.dtype, name='resize')(x)
    elif self.factor < 1:
      x = conv(self.channels, self.dtype, 'resize', stride=round(1 / self.factor), padding=[(1, 1), (1, 1)])(x)
    return nn.Conv(self.width, (3, 3), use_bias=False, dtype=jnp.dtype(self.dtype), name='align')(x)


class ResidualUnit(nn.Module):
  """Two convolutions, each after a ReLU, with a residual connection: [B, H, W, C] -> [B, H, W, C]."""

  logical_axes = (
    (r'(.*/)?\w*unit/conv[12]/kernel', _CONV),
    (r'(.*/)?\w*unit/conv[12]/bias', (None,)),
  )

  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = x
    for name in ('conv1', 'conv2'):
      y = conv(x.shape[-1], self.dtype, name)(nn.relu(y))
    return x + y


class Fusion(nn.Module):
  """The fused map of the coarser levels [B, H, W, C], or None, with that of a level, at `size`: [B, *size, C]."""

  logical_axes = (
    (r'(.*/)?fusion\d/out/kernel', ('embed', None)),
    (r'(.*/)?fusion\d/out/bias', (None,)),
  )

  dtype: str

  @nn.compact
  def __call__(self, fused: jax.Array | None, level: jax.Array, size: tuple[int, int]) -> jax.Array:
    skip = ResidualUnit(self.dtype, name='skip_unit')
    if fused is not None:
      x = fused + skip(level)
    else:  # the coarsest has its unit for a skip in the published weights, which nothing uses
      x = level
      if self.is_initializing():
        skip(level)
    x = resize_bilinear(ResidualUnit(self.dtype, name='unit')(x), size)
    return dense(x.shape[-1], self.dtype, 'out')(x)


class Dpt(nn.Module):
  """Normalized images [B, H, W, 3] -> float32 [B, H, W]: inverse depth up to scale and shift, at least 0, or meters.

  taps       numbers, from 1, of the four blocks of the encoder whose tokens are read
  channels   of the maps at 4, 2, 1 and 1/2 times the resolution of the patches
  width      channels of the fused maps; `hidden` of the last layer
  max_depth  greatest depth in meters of a network of metric depth; None for one of relative inverse depth
  """

  logical_axes = (
    (r'(.*/)?depth_conv[12]/kernel', _CONV),
    (r'(.*/)?depth_conv[12]/bias', (None,)),
    (r'(.*/)?depth_out/kernel', ('embed', None)),
    (r'(.*/)?depth_out/bias', (None,)),
  )

  encoder: ViT
  taps: tuple[int, ...]
  channels: tuple[int, ...]
  width: int
  hidden: int = 32
  max_depth: float | None = None

  @property
  def image_size(self) -> ImageSize:
    """Side, or (height, width), of the images in pixels."""
    return self.encoder.image_size

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """(height, width, channels) of the images that the network is made for."""
    return self.encoder.input_shape

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    dtype, patch = self.encoder.stack.block.dtype, self.encoder.patch_size
    batch, height, width, _ = images.shape
    taps = self.encoder(images, taps=self.taps, train=train).taps
    assert taps is not None
    maps = taps[:, :, self.encoder.prefix :].reshape(len(self.taps), batch, height // patch, width // patch, -1)
    levels = [
      Reassemble(channels, self.width, factor, dtype, name=f'reassemble{number}')(level)
      for number, (channels, factor, level) in enumerate(zip(self.channels, FACTORS, maps, strict=True), 1)
    ]
    finest = levels[0].shape
    sizes = [(2 * finest[1], 2 * finest[2]), *((level.shape[1], level.shape[2]) for level in levels[:-1])]
    fused: jax.Array | None = None
    for number in (4, 3, 2, 1):
      fused = Fusion(dtype, name=f'fusion{number}')(fused, levels[number - 1], sizes[number - 1])
      fused = with_logical_constraint(fused, 'batch', None, None, None)
    assert fused is not None
    x = resize_bilinear(conv(self.width // 2, dtype, 'depth_conv1')(fused), (height, width))
    x = nn.relu(conv(self.hidden, dtype, 'depth_conv2')(x))
    # Inverse depth begins above 0: below it, the ReLU has no gradient, and a shift changes nothing for the loss.
    bias = nn.initializers.constant(1.0 if self.max_depth is None else 0.0)
    out = nn.Dense(
      1, dtype=jnp.dtype(dtype), kernel_init=nn.initializers.xavier_uniform(), bias_init=bias, name='depth_out'
    )
    depth = out(x)[..., 0].astype(jnp.float32)
    return nn.relu(depth) if self.max_depth is None else self.max_depth * nn.sigmoid(depth)


def dpt(
  encoder: nn.Module,
  taps: Four = (3, 6, 9, 12),
  channels: Four = (96, 192, 384, 768),
  width: PositiveInt = 128,
  *,
  hidden: PositiveInt = 32,
  max_depth: PositiveFloat | None = None,
) -> Dpt:
  """A network of depth on a `vit` without outputs; see `Dpt`."""
  if not isinstance(encoder, ViT):
    raise ValueError('encoder: expected vit, whose blocks are read')
  if encoder.num_classes or encoder.pool in ('map', 'queries') or encoder.drop_remainder:
    raise ValueError('encoder: num_classes, pool=map, pool=queries and drop_remainder have no use here; leave them out')
  depth = encoder.stack.depth
  if list(taps) != sorted(set(taps)) or not 1 <= taps[0] <= taps[-1] <= depth:
    raise ValueError(f'taps: expected four increasing numbers of blocks from 1 to {depth}, got {taps}')
  return Dpt(encoder, tuple(taps), tuple(channels), width, hidden, max_depth)


# Channels of the maps, width of the fused ones, and taps of Depth Anything V2; V1 has the last four blocks.
DEPTH_ANYTHING: dict[str, tuple[Four, int, Four]] = {
  'S': ((48, 96, 192, 384), 64, (3, 6, 9, 12)),
  'B': ((96, 192, 384, 768), 128, (3, 6, 9, 12)),
  'L': ((256, 512, 1024, 1024), 256, (5, 12, 18, 24)),
}


def depth_anything(
  variant: str = 'S',
  *,
  version: Literal[1, 2] = 2,
  max_depth: PositiveFloat | None = None,
  image_size: ImageSize = 518,
  attention: Backend = 'auto',
  remat: Remat = 'none',
  unroll: Unroll = 1,
  dtype: Dtype = 'float32',
) -> Dpt:
  """Depth Anything by its published sizes, S, B and L: a DINOv2 with patches of 14 pixels, and DPT."""
  if variant not in DEPTH_ANYTHING:
    raise ValueError(f'unknown Depth Anything variant {variant!r}; {did_you_mean(variant, DEPTH_ANYTHING)}')
  channels, width, taps = DEPTH_ANYTHING[variant]
  encoder = vit(
    f'{variant}/14',
    image_size=image_size,
    layer_scale=1.0,
    mask_token=True,
    position_antialias=False,
    attention=attention,
    remat=remat,
    unroll=unroll,
    dtype=dtype,
  )
  depth = encoder.stack.depth
  last: Four = (depth - 3, depth - 2, depth - 1, depth)
  return dpt(encoder, taps if version == 2 else last, channels, width, max_depth=max_depth)
