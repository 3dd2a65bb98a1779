"""Swin transformer (Liu et al. 2021): attention in shifted windows, patch merging between stages.

Windows are made by a reshape and shifted by a roll, so all products are batched and of one shape. Blocks come in pairs,
the second one shifted; a stage is a scan over its pairs.

Letters in shapes: B batch, R rows, C columns, T = R * C tokens, D width, W windows, M tokens of a window, H heads.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import Decay, NonNegativeInt, PositiveFloat, PositiveInt
from fmcv_jax.errors import did_you_mean
from fmcv_jax.fields import ImageSize, height_width
from fmcv_jax.models.common.layers import (
  ATTENTION_AXES,
  HEAD_AXES,
  NORM_AXES,
  BlockConfig,
  Dtype,
  Mlp,
  dense,
  layer_norm,
  stochastic_depth,
)
from fmcv_jax.models.common.outputs import Features, linear_head
from fmcv_jax.models.common.patches import PATCH_AXES, patchify
from fmcv_jax.models.common.scan import Remat, Unroll, scan_layers
from fmcv_jax.parallel.rules import with_logical_constraint

Grid = tuple[int, int]


def to_windows(x: jax.Array, window: int) -> jax.Array:
  """[B, R, C, D] -> [B, W, M, D]; R and C are multiples of the window's side."""
  batch, rows, columns, width = x.shape
  x = x.reshape(batch, rows // window, window, columns // window, window, width).swapaxes(2, 3)
  return x.reshape(batch, -1, window * window, width)


def from_windows(x: jax.Array, window: int, grid: Grid) -> jax.Array:
  """The inverse of to_windows."""
  rows, columns = grid
  x = x.reshape(x.shape[0], rows // window, columns // window, window, window, -1).swapaxes(2, 3)
  return x.reshape(x.shape[0], rows, columns, -1)


def relative_index(window: int) -> np.ndarray:
  """Index into the relative position table for each pair of tokens of a window, int [M, M] (Liu et al., sec. 3.2)."""
  place = np.stack(np.divmod(np.arange(window * window), window), -1)
  down, right = np.moveaxis(place[:, None] - place[None] + window - 1, -1, 0)
  return down * (2 * window - 1) + right


def shift_mask(grid: Grid, window: int, shift: int) -> np.ndarray:
  """Attention mask of shifted windows, bool [W, M, M]: True for tokens that are contiguous in the image."""

  def parts(size: int) -> np.ndarray:  # rows that the roll wrapped around form a part of their own
    place = np.arange(size)
    return (place >= size - window).astype(int) + (place >= size - shift)

  part = parts(grid[0])[:, None] * 3 + parts(grid[1])
  part = np.asarray(part.reshape(grid[0] // window, window, grid[1] // window, window).swapaxes(1, 2))
  part = part.reshape(-1, window * window)
  return part[:, :, None] == part[:, None]


class WindowAttention(nn.Module):
  """Multi-head attention within windows, [B, W, M, D] -> [B, W, M, D], with learned relative position biases."""

  logical_axes = (
    *ATTENTION_AXES,
    (r'(.*/)?attention/relative', (None, 'heads')),
  )

  config: BlockConfig
  window: int

  @nn.compact
  def __call__(self, x: jax.Array, mask: np.ndarray | None = None) -> jax.Array:
    """mask: bool [W, M, M], True where attention is allowed; None for no mask."""
    c, width = self.config, x.shape[-1]
    if width % c.num_heads:
      raise ValueError(f'width {width} is not divisible by {c.num_heads} heads')
    heads = 'heads' if c.num_heads > 1 else None

    def project(name: str) -> jax.Array:
      y = dense(width, c.dtype, name)(x)
      return with_logical_constraint(y.reshape(*y.shape[:3], c.num_heads, -1), 'batch', None, None, heads, None)

    query, key, value = project('query'), project('key'), project('value')
    table = self.param('relative', nn.initializers.truncated_normal(0.02), ((2 * self.window - 1) ** 2, c.num_heads))
    logits = jnp.einsum('bwqhk,bwthk->bwhqt', query, key, preferred_element_type=jnp.float32)
    logits = logits * query.shape[-1] ** -0.5 + jnp.moveaxis(table[relative_index(self.window)], -1, 0)
    if mask is not None:
      logits = jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    y = jnp.einsum('bwhqt,bwthk->bwqhk', weights, value)
    return dense(width, c.dtype, 'out')(y.reshape(x.shape))


class WindowBlock(nn.Module):
  """Pre-norm transformer block on a grid of tokens x [B, T, D], with attention within (shifted) windows."""

  logical_axes = (NORM_AXES,)

  config: BlockConfig
  grid: Grid
  window: int
  shift: int
  train: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, drop_path: jax.Array | None = None) -> jax.Array:
    c, window, shift, (rows, columns) = self.config, self.window, self.shift, self.grid
    x = with_logical_constraint(x, 'batch', 'tokens', 'width')
    y = layer_norm(c.eps, c.dtype, 'norm1')(x).reshape(x.shape[0], rows, columns, -1)
    # As published for detection, the last windows are padded with zeros at the bottom and right, which are attended to.
    y = jnp.pad(y, ((0, 0), (0, -rows % window), (0, -columns % window), (0, 0)))
    padded = (y.shape[1], y.shape[2])
    mask = shift_mask(padded, window, shift) if shift else None
    y = to_windows(jnp.roll(y, (-shift, -shift), (1, 2)), window)
    y = WindowAttention(c, window, name='attention')(y, mask)
    y = jnp.roll(from_windows(y, window, padded), (shift, shift), (1, 2))[:, :rows, :columns]
    x = x + self._branch(y.reshape(x.shape), drop_path).astype(x.dtype)
    y = Mlp(c, name='mlp')(layer_norm(c.eps, c.dtype, 'norm2')(x))
    return with_logical_constraint(x + self._branch(y, drop_path).astype(x.dtype), 'batch', 'tokens', 'width')

  def _branch(self, y: jax.Array, drop_path: jax.Array | None) -> jax.Array:
    return y if drop_path is None else stochastic_depth(y, drop_path, self.make_rng('dropout'))


class WindowPair(nn.Module):
  """A block with regular windows and one with windows shifted by half, as a scan body; drop_path [2], one per block."""

  config: BlockConfig
  grid: Grid
  window: int

  @nn.compact
  def __call__(self, x: jax.Array, drop_path: jax.Array | None = None) -> tuple[jax.Array, None]:
    # A single window is not shifted.
    shift = self.window // 2 if min(self.grid) > self.window else 0
    rates = (None, None) if drop_path is None else (drop_path[0], drop_path[1])
    x = WindowBlock(self.config, self.grid, self.window, 0, name='plain')(x, rates[0])
    return WindowBlock(self.config, self.grid, self.window, shift, name='shifted')(x, rates[1]), None


class Merge(nn.Module):
  """Patch merging: joins 2 x 2 neighbors and doubles the width, x [B, T, D] -> ([B, T / 4, 2 D], the new grid)."""

  logical_axes = (
    (r'(.*/)?merge/reduce/kernel', ('embed', None)),
    NORM_AXES,
  )

  eps: float
  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array, grid: Grid) -> tuple[jax.Array, Grid]:
    rows, columns, width = *grid, x.shape[-1]
    x = x.reshape(-1, rows, columns, width)
    x = jnp.pad(x, ((0, 0), (0, rows % 2), (0, columns % 2), (0, 0)))
    rows, columns = x.shape[1] // 2, x.shape[2] // 2
    # Published order: the neighbor below comes before the one to the right.
    x = x.reshape(-1, rows, 2, columns, 2, width).transpose(0, 1, 3, 4, 2, 5).reshape(-1, rows * columns, 4 * width)
    x = layer_norm(self.eps, self.dtype, 'norm')(x)
    return dense(2 * width, self.dtype, 'reduce', bias=False)(x), (rows, columns)


class Stage(nn.Module):
  """Patch merging (if `merge`) and `pairs` pairs of blocks; x [B, T, D] on a grid -> tokens and their grid."""

  pairs: int
  config: BlockConfig
  window: int
  merge: bool
  remat: Remat = 'none'
  unroll: Unroll = 1

  @nn.compact
  def __call__(self, x: jax.Array, grid: Grid, drop_path: np.ndarray | None = None) -> tuple[jax.Array, Grid]:
    """drop_path: float [pairs, 2], or None; needs the rng 'dropout'."""
    if self.merge:
      x, grid = Merge(self.config.eps, self.config.dtype, name='merge')(x, grid)
    in_axes = nn.broadcast if drop_path is None else 0
    stack = scan_layers(WindowPair, self.pairs, in_axes, remat=self.remat, unroll=self.unroll)
    return stack(self.config, grid, self.window, name='blocks')(x, drop_path)[0], grid


class Level(NamedTuple):
  """One level of the pyramid: tokens [B, T, D] row by row on a grid of (rows, columns)."""

  tokens: jax.Array
  grid: Grid

  def map(self) -> jax.Array:
    """[B, rows, columns, D]."""
    return self.tokens.reshape(self.tokens.shape[0], *self.grid, -1)


class Swin(nn.Module):
  """Images [B, height, width, 3], normalized, in multiples of the smallest patch -> Features of the last stage.

  `image_size` bounds the window size of a stage; for other image sizes the last windows are padded. `num_classes` is
  the number of outputs of a linear head on the mean of the last tokens; 0 returns the mean.
  """

  logical_axes = (
    *PATCH_AXES,
    *HEAD_AXES,
    NORM_AXES,
  )

  smallest_patch: int
  width: int
  depths: tuple[int, ...]
  blocks: tuple[BlockConfig, ...]
  window: int = 7
  image_size: ImageSize = 224
  in_channels: int = 3
  num_classes: int = 0
  drop_path: float = 0.0
  remat: Remat = 'none'
  unroll: Unroll = 1

  prefix = 0  # no token stands before the patches
  average_pooled = True

  @property
  def size_multiple(self) -> int:
    """Divisor of the sides of images."""
    return self.smallest_patch

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """(height, width, channels) of the images that the network is made for."""
    return (*height_width(self.image_size), self.in_channels)

  @property
  def patch_size(self) -> int:
    """Side in pixels of the image area of one token of the last stage."""
    return self.smallest_patch * 2 ** (len(self.depths) - 1)

  @override
  def setup(self) -> None:
    eps, dtype = self.blocks[0].eps, self.blocks[0].dtype
    self.embed = dense(self.width, dtype, 'patch')
    self.embed_norm = layer_norm(eps, dtype, 'patch_norm')
    side = min(height_width(self.image_size)) // self.smallest_patch
    self.stages = [
      Stage(
        depth // 2,
        block,
        min(self.window, -(-side // 2**level)),
        merge=level > 0,
        remat=self.remat,
        unroll=self.unroll,
        name=f'stage{level + 1}',
      )
      for level, (depth, block) in enumerate(zip(self.depths, self.blocks, strict=True))
    ]
    self.norm = layer_norm(eps, dtype, 'norm')
    if self.num_classes:
      self.head = linear_head(self.num_classes, True, dtype)

  def pyramid(self, images: jax.Array, *, train: bool = False) -> tuple[Level, ...]:
    """Feature maps of all stages, highest resolution first; the last one is not normalized."""
    x, grid = patchify(images, self.smallest_patch)
    x = self.embed_norm(self.embed(x))
    rates = np.linspace(0, self.drop_path, sum(self.depths), dtype=np.float32)
    levels, done = [], 0
    for stage, depth in zip(self.stages, self.depths, strict=True):
      drop = rates[done : done + depth].reshape(-1, 2) if train and self.drop_path else None
      x, grid = stage(x, grid, drop)
      levels.append(Level(x, grid))
      done += depth
    return tuple(levels)

  def __call__(self, images: jax.Array, *, train: bool = False) -> Features:
    """Images [B, H, W, 3] -> features: tokens of the last stage [B, T, D], their mean, and the classes' logits."""
    x = self.norm(self.pyramid(images, train=train)[-1].tokens)
    pooled = jnp.mean(x, axis=1, dtype=jnp.float32).astype(x.dtype)
    return Features(self.head(pooled) if self.num_classes else pooled, pooled, x)


# Width of the first stage, blocks of each stage, heads of each stage (Liu et al. 2021, sec. 3.3); mu is for tests.
SIZES: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
  'mu': (32, (2, 2), (2, 4)),
  'T': (96, (2, 2, 6, 2), (3, 6, 12, 24)),
  'S': (96, (2, 2, 18, 2), (3, 6, 12, 24)),
  'B': (128, (2, 2, 18, 2), (4, 8, 16, 32)),
  'L': (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}


def swin(
  variant: str = 'T',
  *,
  image_size: ImageSize = 224,
  in_channels: PositiveInt = 3,
  window: PositiveInt = 7,
  patch_size: PositiveInt = 4,
  num_classes: NonNegativeInt = 0,
  width: PositiveInt | None = None,
  depths: tuple[PositiveInt, ...] | None = None,
  num_heads: tuple[PositiveInt, ...] | None = None,
  eps: PositiveFloat = 1e-5,
  drop_path: Decay = 0.0,
  remat: Remat = 'none',
  unroll: Unroll = 1,
  dtype: Dtype = 'float32',
) -> Swin:
  """A named Swin; width, depths and num_heads override the variant's. At 384 pixels the published ones have
  window=12.
  """
  if variant not in SIZES:
    raise ValueError(f'unknown Swin variant {variant!r}; {did_you_mean(variant, SIZES)}')
  defaults = SIZES[variant]
  width, depths = width or defaults[0], depths or defaults[1]
  num_heads = num_heads or defaults[2]
  if len(depths) != len(num_heads) or any(depth % 2 for depth in depths):
    raise ValueError(
      f'depths {depths}: expected an even number of blocks for each of the {len(num_heads)} stages of heads'
    )
  if any(side % patch_size for side in height_width(image_size)):
    raise ValueError(f'image_size {image_size} is not divisible by the patch size {patch_size}')
  blocks = tuple(
    BlockConfig(num_heads=count, mlp_dim=4 * width * 2**level, eps=eps, dtype=dtype)
    for level, count in enumerate(num_heads)
  )
  return Swin(
    smallest_patch=patch_size,
    width=width,
    depths=depths,
    blocks=blocks,
    window=window,
    image_size=image_size,
    in_channels=in_channels,
    num_classes=num_classes,
    drop_path=drop_path,
    remat=remat,
    unroll=unroll,
  )
