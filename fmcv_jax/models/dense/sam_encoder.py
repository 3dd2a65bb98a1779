"""The image encoder of Segment Anything: a ViT with attention in windows (Li et al. 2022, ViTDet).

The last block of each quarter attends to the whole image. Letters in shapes: B images, R rows, C columns, D width,
W windows, M tokens of a window, H heads, K head dimension.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmcv_jax.models.backbones.swin import from_windows, to_windows
from fmcv_jax.models.common.layers import ATTENTION_AXES, NORM_AXES, BlockConfig, Mlp, dense, layer_norm
from fmcv_jax.models.common.patches import PATCH_AXES, patchify
from fmcv_jax.models.common.scan import Remat, Unroll, rematerialize, scan_layers
from fmcv_jax.parallel.rules import with_logical_constraint

GROUPS = 4


class DecomposedAttention(nn.Module):
  """Self-attention in windows of `grid` tokens, [B, W, M, D] -> the same (Li et al. 2022, MViTv2, eq. 4).

  The logits of a query have a term for the distance in rows and one for that in columns: products of the query, before
  it is scaled, with an embedding of the distance.
  """

  logical_axes = (
    *ATTENTION_AXES,
    (r'(.*/)?attention/relative_(rows|columns)', (None, None)),
  )

  config: BlockConfig
  grid: tuple[int, int]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c, (rows, columns), width = self.config, self.grid, x.shape[-1]
    heads = 'heads' if c.num_heads > 1 else None

    def project(name: str) -> jax.Array:
      y = dense(width, c.dtype, name, bias=c.qkv_bias)(x)
      return with_logical_constraint(y.reshape(*y.shape[:3], c.num_heads, -1), 'batch', None, None, heads, None)

    query, key, value = project('query'), project('key'), project('value')
    logits = jnp.einsum('bwqhk,bwthk->bwhqt', query, key, preferred_element_type=jnp.float32)
    logits = logits * query.shape[-1] ** -0.5
    on_grid = query.reshape(*query.shape[:2], rows, columns, *query.shape[3:])
    down = jnp.einsum('bwrchk,rtk->bwhrct', on_grid, self._distances('relative_rows', rows, query))
    right = jnp.einsum('bwrchk,ctk->bwhrct', on_grid, self._distances('relative_columns', columns, query))
    bias = (down[..., :, None] + right[..., None, :]).astype(jnp.float32)
    weights = jax.nn.softmax(logits + bias.reshape(logits.shape), axis=-1).astype(value.dtype)
    y = jnp.einsum('bwhqt,bwthk->bwqhk', weights, value)
    return dense(width, c.dtype, 'out')(y.reshape(x.shape))

  def _distances(self, name: str, size: int, query: jax.Array) -> jax.Array:
    """Embeddings of the distances between all places of a side, [size, size, K]."""
    table = self.param(name, nn.initializers.zeros, (2 * size - 1, query.shape[-1]))
    place = np.arange(size)
    return table[place[:, None] - place[None] + size - 1].astype(query.dtype)


class SamBlock(nn.Module):
  """Transformer block on x [B, R, C, D], as a scan body; `window` 0 attends to the whole image."""

  logical_axes = (NORM_AXES,)

  config: BlockConfig
  window: int

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
    c, window, (rows, columns) = self.config, self.window, x.shape[1:3]
    y = layer_norm(c.eps, c.dtype, 'norm1')(x)
    if window:  # as published, the last windows are padded with zeros, which are attended to
      y = jnp.pad(y, ((0, 0), (0, -rows % window), (0, -columns % window), (0, 0)))
      padded = (y.shape[1], y.shape[2])
      y = DecomposedAttention(c, (window, window), name='attention')(to_windows(y, window))
      y = from_windows(y, window, padded)[:, :rows, :columns]
    else:
      y = y.reshape(len(y), 1, rows * columns, -1)
      y = DecomposedAttention(c, (rows, columns), name='attention')(y).reshape(x.shape)
    x = x + y.astype(x.dtype)
    y = Mlp(c, name='mlp')(layer_norm(c.eps, c.dtype, 'norm2')(x).reshape(len(x), rows * columns, -1))
    return x + y.reshape(x.shape).astype(x.dtype), None


class SamEncoder(nn.Module):
  """Normalized images [B, S, S, 3] -> their embeddings [B, S / patch, S / patch, channels].

  depth  a multiple of 4: the last block of each quarter attends to the whole image, the others in windows
  """

  logical_axes = (
    *PATCH_AXES,
    NORM_AXES,
    (r'(.*/)?position', (None, 'embed')),
    (r'(.*/)?neck1/kernel', ('embed', None)),
    (r'(.*/)?neck2/kernel', (None, None, None, 'embed')),
  )

  patch_size: int
  width: int
  depth: int
  block: BlockConfig
  image_size: int = 1024
  window: int = 14
  channels: int = 256
  remat: Remat = 'none'
  unroll: Unroll = 1

  @property
  def side(self) -> int:
    """Patches along a side of the images."""
    return self.image_size // self.patch_size

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    c = self.block
    if images.shape[1:3] != (self.image_size, self.image_size):
      raise ValueError(f'images of {self.image_size} x {self.image_size} pixels are expected, got {images.shape}')
    x, (rows, columns) = patchify(images, self.patch_size)
    x = dense(self.width, c.dtype, 'patch')(x)
    position = self.param('position', nn.initializers.normal(0.02), (rows * columns, self.width))
    x = (x + position.astype(x.dtype)).reshape(-1, rows, columns, self.width)
    for number in range(1, GROUPS + 1):
      x = with_logical_constraint(x, 'batch', None, None, 'width')
      x = Group(self.depth // GROUPS - 1, c, self.window, self.remat, self.unroll, name=f'group{number}')(x)
    x = layer_norm(1e-6, c.dtype, 'neck_norm1')(dense(self.channels, c.dtype, 'neck1', bias=False)(x))
    x = nn.Conv(self.channels, (3, 3), use_bias=False, dtype=jnp.dtype(c.dtype), name='neck2')(x)
    return layer_norm(1e-6, c.dtype, 'neck_norm2')(x)


class Group(nn.Module):
  """`windowed` blocks with windows, and one that attends to the whole image: [B, R, C, D] -> the same."""

  windowed: int
  config: BlockConfig
  window: int
  remat: Remat
  unroll: Unroll

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    if self.windowed:
      blocks = scan_layers(SamBlock, self.windowed, (), remat=self.remat, unroll=self.unroll)
      x = blocks(self.config, self.window, name='blocks')(x)[0]
    return rematerialize(SamBlock, self.remat)(self.config, 0, name='whole')(x)[0]
