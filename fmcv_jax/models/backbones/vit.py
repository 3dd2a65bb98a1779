"""Vision transformer (Dosovitskiy et al. 2021) with the options of its successors, and its table of sizes."""

import dataclasses
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.bounds import Decay, Finite, NonNegativeInt, PositiveFloat, PositiveInt
from fmcv_jax.errors import did_you_mean
from fmcv_jax.fields import ImageSize, height_width
from fmcv_jax.models.common.attention.dispatch import Backend
from fmcv_jax.models.common.block_taps import run_with_taps
from fmcv_jax.models.common.late_tokens import LateTokens, run_with_late_tokens
from fmcv_jax.models.common.layers import (
  HEAD_AXES,
  NORM_AXES,
  Activation,
  Attention,
  BlockConfig,
  Dtype,
  Mlp,
  Stack,
  dense,
  layer_norm,
)
from fmcv_jax.models.common.outputs import Features, linear_head
from fmcv_jax.models.common.patches import PATCH_AXES, patchify
from fmcv_jax.models.common.positions import resize_grid, rope_2d, sincos_2d
from fmcv_jax.models.common.scan import Remat, Unroll
from fmcv_jax.parallel.rules import with_logical_constraint

Pool = Literal['cls', 'gap', 'map', 'queries']
Positions = Literal['learned', 'sincos2d', 'rope2d']


class AttentionPool(nn.Module):
  """Attention pooling with one learned query, [B, T, D] -> [B, D] (MAP head: Lee et al. 2019; Zhai et al. 2022)."""

  logical_axes = (
    (r'(.*/)?probe', (None, 'embed')),
    NORM_AXES,
  )

  config: BlockConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    probe = self.param('probe', nn.initializers.xavier_uniform(), (1, x.shape[-1]))
    query = jnp.broadcast_to(probe.astype(x.dtype), (x.shape[0], *probe.shape))
    y = Attention(self.config, name='attention')(query, x)
    z = layer_norm(self.config.eps, self.config.dtype, 'norm')(y)
    return (y + Mlp(self.config, name='mlp')(z))[:, 0]


class QueryPool(nn.Module):
  """Attention pooling with several learned queries, [B, T, D] -> [B, queries, width] (CoCa, Yu et al. 2022).

  As OpenCLIP has it: no residual and no MLP, and a norm of the outputs.
  """

  logical_axes = (
    (r'(.*/)?probe', (None, 'embed')),
    NORM_AXES,
  )

  config: BlockConfig
  queries: int
  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    probe = self.param('probe', nn.initializers.normal(1.0), (self.queries, self.width))
    query = layer_norm(c.eps, c.dtype, 'query_norm')(probe)
    query = jnp.broadcast_to(query, (x.shape[0], *query.shape))
    return layer_norm(c.eps, c.dtype, 'norm')(Attention(c, name='attention')(query, x))


class ViT(nn.Module):
  """Images [B, height, width, 3], normalized, in multiples of `patch` -> Features.

  Tokens are the class token (if pool is 'cls'), the distillation token (if `distilled`), `registers` (Darcet et al.
  2024), then the patches row by row. At resolutions other than `image_size` a learned table is interpolated;
  fixed tables are recomputed. `num_classes` is the number of outputs of a linear head on the pooled features; 0 returns
  the pooled features. `mask_token` adds a learned token that replaces masked patches (BEiT, Bao et al. 2022).
  `distilled` adds a token and a head that learn from a teacher (DeiT, Touvron et al. 2021); features and outputs are
  then the means over both tokens and both heads. With pool 'gap' there may be an unused `class_token`, and the last
  norm may act on the mean (`fc_norm`): MAE fine-tuning (He et al. 2022) does both. `drop_remainder`
  ignores pixels at the right and bottom that do not fill a patch, as an unpadded convolution does; without it they are
  an error. `position_antialias` is that of `resize_grid`. Pool 'queries' attends to the tokens with `queries` learned
  queries of width `query_width` (None: the width of the network) and `query_heads` heads: the first output is pooled,
  and the others are `queries` of the Features (CoCa).
  """

  logical_axes = (
    *PATCH_AXES,
    (r'(.*/)?(position|class_token|distillation_token|mask_token|registers)', (None, 'embed')),
    *HEAD_AXES,
    NORM_AXES,
  )

  patch_size: int
  width: int
  stack: Stack
  image_size: ImageSize = 224
  in_channels: int = 3
  pool: Pool = 'cls'
  pos_embed: Positions = 'learned'
  registers: int = 0
  class_token_has_position: bool = True
  pre_norm: bool = False
  patch_bias: bool = True
  num_classes: int = 0
  head_bias: bool = True
  mask_token: bool = False
  distilled: bool = False
  class_token: bool = False
  fc_norm: bool = False
  drop_remainder: bool = False
  position_antialias: bool = True
  queries: int = 256
  query_heads: int = 8
  query_width: int | None = None

  sows_projections = True

  @property
  def size_multiple(self) -> int:
    """Divisor of the sides of images."""
    return self.patch_size

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """(height, width, channels) of the images that the network is made for."""
    return (*height_width(self.image_size), self.in_channels)

  @property
  def grid(self) -> tuple[int, int]:
    """Rows and columns of patches of an image of `image_size`."""
    height, width = height_width(self.image_size)
    return height // self.patch_size, width // self.patch_size

  @property
  def prefix(self) -> int:
    """Number of tokens before the patches."""
    return int(self.has_class_token) + int(self.distilled) + self.registers

  @property
  def has_class_token(self) -> bool:
    """True if a class token precedes the patches."""
    return self.class_token or self.pool == 'cls'

  @nn.compact
  def __call__(
    self,
    images: jax.Array,
    *,
    keep: jax.Array | None = None,
    masked: jax.Array | None = None,
    late: LateTokens | None = None,
    taps: tuple[int, ...] = (),
    train: bool = False,
  ) -> Features:
    """Features of the images.

    keep     int32 [B, N], indices of the visible patches (FLIP, Li et al. 2023; MAE); None for all
    masked   bool [B, rows * columns], True for patches replaced by the mask token; None for none
    late     tokens that join the last blocks, and are `queries` of the Features; not with fc_norm
    taps     numbers, from 1, of the blocks whose tokens are returned too, after the last norm; not with `late`
    """
    block, batch = self.stack.block, images.shape[0]
    if self.drop_remainder:
      rows, columns = (side - side % self.patch_size for side in images.shape[1:3])
      images = images[:, :rows, :columns]
    x, grid = patchify(images, self.patch_size)
    x = dense(self.width, block.dtype, 'patch', bias=self.patch_bias)(x)
    if self.mask_token:
      token = self.param('mask_token', nn.initializers.normal(0.02), (1, self.width))
      if masked is not None:
        x = jnp.where(masked[..., None], token.astype(x.dtype), x)
    prefix = self.prefix
    placed = (1 + self.distilled) * int(self.has_class_token and self.class_token_has_position)

    class_place, angles = None, None
    if self.pos_embed == 'learned':
      shape = (placed + math.prod(self.grid), self.width)
      table = self.param('position', nn.initializers.normal(self.width**-0.5), shape)
      class_place = table[:placed]
      places = resize_grid(table[placed:], self.grid, grid, antialias=self.position_antialias)
      x = x + places.astype(x.dtype)
    elif self.pos_embed == 'sincos2d':
      x = x + jnp.asarray(sincos_2d(*grid, self.width), x.dtype)
    else:
      angles = jnp.asarray(rope_2d(*grid, self.width // block.num_heads, prefix))

    if keep is not None:
      x = jnp.take_along_axis(x, keep[..., None], axis=1)
      if angles is not None:
        first = jnp.broadcast_to(jnp.arange(prefix), (batch, prefix))
        angles = angles[jnp.concatenate([first, keep + prefix], axis=1)]
    if self.registers:
      registers = self.param('registers', nn.initializers.normal(1e-6), (self.registers, self.width))
      x = jnp.concatenate([jnp.broadcast_to(registers.astype(x.dtype), (batch, *registers.shape)), x], axis=1)
    if self.has_class_token:
      token = self.param('class_token', nn.initializers.normal(1e-6), (1, self.width))
      if self.distilled:
        second = self.param('distillation_token', nn.initializers.normal(1e-6), (1, self.width))
        token = jnp.concatenate([token, second])
      if class_place is not None and placed:
        token = token + class_place
      x = jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (batch, *token.shape)), x], axis=1)

    x = with_logical_constraint(x, 'batch', 'tokens', 'width')
    if self.pre_norm:
      x = layer_norm(block.eps, block.dtype, 'pre_norm')(x)
    norm = (lambda tokens: tokens) if self.fc_norm else layer_norm(block.eps, block.dtype, 'norm')
    tapped: jax.Array | None = None
    queries: jax.Array | None = None
    if taps:
      x, tapped = run_with_taps(self.stack, x, taps, angles=angles, train=train)
      encoded, tapped = norm(x), norm(tapped)
    elif late is None or self.is_initializing():
      encoded = norm(self.stack(x, angles=angles, train=train))
    if late is not None:
      params: Any = self.get_variable('params', 'blocks')
      rng = self.make_rng('dropout') if train else None
      encoded = norm(run_with_late_tokens(self.stack, params, x, late, norm, angles=angles, rng=rng))
      queries, encoded = jnp.split(encoded, [len(late.tokens)], axis=1)
    x = encoded

    if self.distilled:
      pooled = (x[:, 0] + x[:, 1]) / 2
    elif self.pool == 'cls':
      pooled = x[:, 0]
    elif self.pool == 'gap':
      pooled = jnp.mean(x[:, prefix:], axis=1, dtype=jnp.float32).astype(x.dtype)
      if self.fc_norm:
        pooled = layer_norm(block.eps, block.dtype, 'pooled_norm')(pooled)
    elif self.pool == 'map':
      pooled = AttentionPool(block, name='map_pool')(x[:, prefix:])
    else:
      outputs = query_pool(self, name='query_pool')(x)
      pooled, queries = outputs[:, 0], outputs[:, 1:]
    if not self.num_classes:
      return Features(pooled, pooled, x, queries=queries, taps=tapped)
    head = linear_head(self.num_classes, self.head_bias, block.dtype)
    if not self.distilled:
      return Features(head(pooled), pooled, x, queries=queries, taps=tapped)
    second_head = linear_head(self.num_classes, self.head_bias, block.dtype, 'distillation_head')
    heads = head(x[:, 0]), second_head(x[:, 1])
    return Features((heads[0] + heads[1]) / 2, pooled, x, heads, taps=tapped)


def query_pool(network: Any, *, queries: int | None = None, name: str | None = None) -> QueryPool:
  """The attention pooling of a ViT with pool 'queries', or one with its first `queries` queries alone."""
  block = dataclasses.replace(network.stack.block, num_heads=network.query_heads)
  return QueryPool(block, queries or network.queries, network.query_width or network.width, name=name)


# width, depth, heads, hidden width of the MLP. Ti, S: Touvron et al. 2021; B, L, H: Dosovitskiy et al. 2021; g, G: Zhai
# et al. 2022; So400m: Alabdulmohsin et al. 2023; gopt: Tschannen et al. 2025 (SigLIP 2); 22B: Dehghani et al. 2023; mu
# is for tests.
SIZES: dict[str, tuple[int, int, int, int]] = {
  'mu': (32, 2, 2, 64),
  'Ti': (192, 12, 3, 768),
  'S': (384, 12, 6, 1536),
  'M': (512, 12, 8, 2048),
  'B': (768, 12, 12, 3072),
  'L': (1024, 24, 16, 4096),
  'So400m': (1152, 27, 16, 4304),
  'H': (1280, 32, 16, 5120),
  'g': (1408, 40, 16, 6144),
  'gopt': (1536, 40, 16, 6144),
  'G': (1664, 48, 16, 8192),
  '22B': (6144, 48, 48, 24576),
}


def vit(
  variant: str = 'B/16',
  *,
  image_size: ImageSize = 224,
  in_channels: PositiveInt = 3,
  num_classes: NonNegativeInt = 0,
  pool: Pool = 'cls',
  pos_embed: Positions = 'learned',
  registers: NonNegativeInt = 0,
  class_token_has_position: bool = True,
  pre_norm: bool = False,
  patch_bias: bool = True,
  head_bias: bool = True,
  mask_token: bool = False,
  distilled: bool = False,
  class_token: bool = False,
  fc_norm: bool = False,
  drop_remainder: bool = False,
  position_antialias: bool = True,
  queries: PositiveInt = 256,
  query_heads: PositiveInt = 8,
  query_width: PositiveInt | None = None,
  width: PositiveInt | None = None,
  depth: PositiveInt | None = None,
  num_heads: PositiveInt | None = None,
  mlp_dim: PositiveInt | None = None,
  activation: Activation = 'gelu',
  gated_mlp: bool = False,
  qkv_bias: bool = True,
  parallel: bool = False,
  qk_norm: bool = False,
  eps: PositiveFloat = 1e-6,
  layer_scale: Finite | None = None,
  dropout: Decay = 0.0,
  drop_path: Decay = 0.0,
  drop_path_rise: bool = True,
  attention: Backend = 'auto',
  remat: Remat = 'none',
  unroll: Unroll = 1,
  dtype: Dtype = 'float32',
) -> ViT:
  """A named ViT, 'size/patch' as in 'B/16'; width, depth, heads and mlp_dim override the size's."""
  size, _, patch = variant.partition('/')
  if size not in SIZES or not patch.isdigit():
    known = [f'{name}/{p}' for name in SIZES for p in (8, 14, 16, 32)]
    raise ValueError(f'unknown ViT variant {variant!r}; {did_you_mean(variant, known)}')
  if any(side % int(patch) for side in height_width(image_size)) and not drop_remainder:
    raise ValueError(f'image_size {image_size} is not divisible by the patch size {patch}')
  if distilled and pool != 'cls':
    raise ValueError(f"distilled: the distillation token requires a class token, so pool must be 'cls', not {pool!r}")
  if fc_norm and pool != 'gap':
    raise ValueError(f"fc_norm: it acts on the mean of the tokens, so pool must be 'gap', not {pool!r}")
  defaults = SIZES[size]
  width, depth = width or defaults[0], depth or defaults[1]
  block = BlockConfig(
    num_heads=num_heads or defaults[2],
    mlp_dim=mlp_dim or defaults[3],
    activation=activation,
    gated_mlp=gated_mlp,
    qkv_bias=qkv_bias,
    parallel=parallel,
    qk_norm=qk_norm,
    eps=eps,
    layer_scale=layer_scale,
    dropout=dropout,
    attention=attention,
    dtype=dtype,
  )
  return ViT(
    patch_size=int(patch),
    width=width,
    stack=Stack(depth, block, drop_path, remat, unroll, drop_path_rise),
    image_size=image_size,
    in_channels=in_channels,
    pool=pool,
    pos_embed=pos_embed,
    registers=registers,
    class_token_has_position=class_token_has_position,
    pre_norm=pre_norm,
    patch_bias=patch_bias,
    num_classes=num_classes,
    head_bias=head_bias,
    mask_token=mask_token,
    distilled=distilled,
    class_token=class_token,
    fc_norm=fc_norm,
    drop_remainder=drop_remainder,
    position_antialias=position_antialias,
    queries=queries,
    query_heads=query_heads,
    query_width=query_width,
  )
