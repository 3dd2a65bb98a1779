"""Masks by a set of queries in a plain ViT: EoMT, the encoder-only mask transformer (Kerssies et al. 2025).

Queries join the patches in the last blocks of the encoder. Each predicts a class, or none, and a mask: the product of
its embedding with the upscaled patches. Training masks the attention of the queries by the masks that they predict so
far, with a probability that falls to 0, so that inference needs nothing but the ViT.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.bounds import NonNegativeInt, PositiveInt
from fmcv_jax.fields import ImageSize
from fmcv_jax.models.backbones.vit import ViT
from fmcv_jax.models.common.conv_blocks import PixelExpand
from fmcv_jax.models.common.depthwise import Depthwise
from fmcv_jax.models.common.late_tokens import LateTokens
from fmcv_jax.models.common.layers import NORM_AXES, Dense, Dtype, layer_norm
from fmcv_jax.models.dense.heads import MlpHead
from fmcv_jax.parallel.rules import with_logical_constraint


class QueryMasks(NamedTuple):
  """A class and a mask of each of Q queries, float32.

  class_logits  [B, Q, num_classes + 1], the last for 'no object'
  mask_logits   [B, Q, rows, columns], above 0 for pixels of the mask
  """

  class_logits: jax.Array
  mask_logits: jax.Array


class Upscale(nn.Module):
  """[B, H, W, D] -> [B, 2 H, 2 W, D]: transposed 2 x 2 convolution, GELU, depthwise 3 x 3 convolution, norm."""

  logical_axes = (
    (r'(.*/)?upscale\d+/up/kernel', ('embed', None)),
    (r'(.*/)?upscale\d+/up/bias', (None,)),
    (r'(.*/)?upscale\d+/depthwise/kernel', (None, None, None, 'embed')),
    NORM_AXES,
  )

  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    y = nn.gelu(PixelExpand(width, 2, self.dtype, name='up')(x), approximate=False)
    y = Depthwise(3, 1, self.dtype, name='depthwise')(y)
    return layer_norm(1e-6, self.dtype, 'norm')(y)


class Eomt(nn.Module):
  """Normalized images [B, H, W, 3] -> QueryMasks, whose masks have 2^upscales pixels along the side of a patch.

  encoder      any ViT; its last norm is also that of the predictions before the last blocks
  num_classes  without 'no object'
  queries      the largest number of masks of an image
  blocks       the queries join the last `blocks` blocks of the encoder
  """

  logical_axes = (
    (r'(.*/)?query', (None, 'embed')),
    (r'(.*/)?class_head/kernel', ('embed', None)),
    (r'(.*/)?class_head/bias', (None,)),
  )

  encoder: ViT
  num_classes: int
  queries: int = 200
  blocks: int = 4
  upscales: int = 2

  @property
  def image_size(self) -> ImageSize:
    """Side, or (height, width), of the images in pixels."""
    return self.encoder.image_size

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """(height, width, channels) of the images that the network is made for."""
    return self.encoder.input_shape

  @override
  def setup(self) -> None:
    width, dtype = self.encoder.width, self.encoder.stack.block.dtype
    self.query = self.param('query', nn.initializers.normal(1.0), (self.queries, width))
    self.class_head = Dense(self.num_classes + 1, jnp.dtype(dtype))
    self.mask_head = MlpHead(width, dtype, nn.initializers.xavier_uniform())
    self.upscale = [Upscale(dtype, name=f'upscale{number}') for number in range(self.upscales)]

  def __call__(
    self, images: jax.Array, *, mask_probability: jax.Array | None = None, train: bool = False
  ) -> tuple[QueryMasks, ...]:
    """Predictions after the last block; with `mask_probability` those before each of the last blocks precede them.

    mask_probability  float32 [blocks]: the probability that a query of a block attends only to patches in its mask, by
                      the rng 'dropout'; None for no masks, as in inference
    """
    patch, prefix = self.encoder.patch_size, self.encoder.prefix
    grid = (images.shape[1] // patch, images.shape[2] // patch)
    early: list[QueryMasks] = []

    def mask(block: int, tokens: jax.Array) -> jax.Array | None:
      if mask_probability is None:
        return None
      queries, rest = jnp.split(tokens, [self.queries], axis=1)
      early.append(self.predict(queries, rest[:, prefix:], grid))
      draw = jax.random.uniform(self.make_rng('dropout'), tokens.shape[:1] + (self.queries,))
      return attention_mask(early[-1].mask_logits, draw < mask_probability[block], grid, prefix)

    found = self.encoder(images, late=LateTokens(self.query, self.blocks, mask), train=train)
    assert found.queries is not None
    return *early, self.predict(found.queries, found.tokens[:, prefix:], grid)

  def predict(self, queries: jax.Array, patches: jax.Array, grid: tuple[int, int]) -> QueryMasks:
    """Classes and masks from normalized queries [B, Q, D] and patches [B, rows * columns, D]."""
    x = patches.reshape(len(patches), *grid, -1)
    for upscale in self.upscale:
      x = with_logical_constraint(upscale(x), 'batch', None, None, None)
    embeddings = self.mask_head(queries).astype(x.dtype)
    masks = jnp.einsum('bqd,bhwd->bqhw', embeddings, x, preferred_element_type=jnp.float32)
    masks = with_logical_constraint(masks, 'batch', None, None, None)
    return QueryMasks(self.class_head(queries).astype(jnp.float32), masks)


def attention_mask(mask_logits: jax.Array, masked: jax.Array, grid: tuple[int, int], prefix: int) -> jax.Array:
  """bool [B, 1, T, T] of queries, `prefix` tokens and patches: a query that is `masked` (bool [B, Q]) attends to the
  patches in its mask (logits [B, Q, rows, columns]), to queries and to the prefix; all others attend to everything."""
  batch, queries = masked.shape
  of_patches = jax.image.resize(mask_logits, (batch, queries, *grid), 'bilinear', antialias=False) > 0
  allowed = of_patches.reshape(batch, queries, -1) | ~masked[..., None]
  rows = jnp.pad(allowed, ((0, 0), (0, 0), (queries + prefix, 0)), constant_values=True)
  tokens = rows.shape[-1]
  return jnp.pad(rows, ((0, 0), (0, tokens - queries), (0, 0)), constant_values=True)[:, None]


def eomt(
  encoder: nn.Module,
  num_classes: PositiveInt,
  queries: PositiveInt = 200,
  blocks: PositiveInt = 4,
  upscales: NonNegativeInt = 2,
) -> Eomt:
  """EoMT on a ViT; the published ones have 200 queries in the last 3 (S, B) or 4 (L) blocks."""
  if not isinstance(encoder, ViT):
    raise ValueError('encoder: queries join the last blocks of a ViT: encoder.name is vit')
  if encoder.num_classes:
    raise ValueError('encoder: num_classes has no use here; leave it out')
  if encoder.fc_norm or encoder.pool not in ('cls', 'gap'):
    raise ValueError('encoder: expected pool cls or gap, whose tokens have a last norm (not fc_norm)')
  if blocks > encoder.stack.depth:
    raise ValueError(f'blocks: the encoder has {encoder.stack.depth}, not {blocks}')
  return Eomt(encoder, num_classes, queries, blocks, upscales)
