"""The network of DINO (Caron et al. 2021) and DINOv2 (Oquab et al. 2023): a ViT, and heads that score prototypes.

Letters in shapes: B batch, D width, M picked patches, K prototypes.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.bounds import PositiveInt
from fmcv_jax.fields import ImageSize
from fmcv_jax.models.backbones.vit import ViT
from fmcv_jax.models.common.layers import ACTIVATIONS, HIDDEN_AXES, Dtype, dense
from fmcv_jax.models.common.norms import l2_normalize
from fmcv_jax.parallel.rules import with_logical_constraint


class Scores(NamedTuple):
  """Float32: how well each prototype fits the images [B, K] and the picked patches [B, M, K]; features [B, D]."""

  image: jax.Array
  patches: jax.Array | None
  features: jax.Array


class PrototypeHead(nn.Module):
  """x [B, ..., D] -> float32 [B, ..., K]: an MLP, then the cosine with every prototype.

  learn_prototype_norms: each prototype has a length of its own that multiplies its cosines, as in the published S/16
  and in DINOv2.
  """

  logical_axes = (
    *HIDDEN_AXES,
    (r'(.*/)?bottleneck/kernel', ('embed', None)),
    (r'(.*/)?bottleneck/bias', (None,)),
    (r'(.*/)?prototypes', ('embed', 'vocab')),
    (r'(.*/)?lengths', ('vocab',)),
  )

  prototypes: int
  hidden: int
  bottleneck: int
  layers: int
  learn_prototype_norms: bool
  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.initializers.truncated_normal(0.02)
    for layer in range(1, self.layers):
      x = ACTIVATIONS['gelu'](dense(self.hidden, self.dtype, f'hidden{layer}', init=init)(x))
    x = l2_normalize(dense(self.bottleneck, self.dtype, 'bottleneck', init=init)(x)).astype(self.dtype)
    directions = l2_normalize(self.param('prototypes', init, (self.bottleneck, self.prototypes)), axis=0).astype(
      self.dtype
    )
    scores = jnp.einsum('...d,dk->...k', x, directions, preferred_element_type=jnp.float32)
    if self.learn_prototype_norms:
      scores = scores * self.param('lengths', nn.initializers.ones, (self.prototypes,))
    return with_logical_constraint(scores, 'batch', *(None,) * (scores.ndim - 2), 'vocab')


class DinoNetwork(nn.Module):
  """Normalized images [B, H, W, 3] -> Scores. patch_head None: patches are scored by the images' head."""

  encoder: ViT
  head: PrototypeHead
  patch_head: PrototypeHead | None = None

  @property
  def image_size(self) -> ImageSize:
    """Side, or (height, width), of the images in pixels."""
    return self.encoder.image_size

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """(height, width, channels) of the images that the network is made for."""
    return self.encoder.input_shape

  def __call__(
    self, images: jax.Array, *, masked: jax.Array | None = None, picked: jax.Array | None = None, train: bool = False
  ) -> Scores:
    """masked: bool [B, T], patches to hide from the encoder; picked: int32 [B, M], the patches to score."""
    features = self.encoder(images, masked=masked, train=train)
    patches = None
    if picked is not None:
      tokens = jnp.take_along_axis(features.tokens[:, self.encoder.prefix :], picked[..., None], axis=1)
      patches = (self.patch_head or self.head)(tokens)
    return Scores(self.head(features.pooled), patches, features.pooled.astype(jnp.float32))


def dino(
  encoder: nn.Module,
  *,
  prototypes: PositiveInt = 65_536,
  hidden: PositiveInt = 2048,
  bottleneck: PositiveInt = 256,
  layers: PositiveInt = 3,
  learn_prototype_norms: bool = False,
  separate_patch_head: bool = False,
) -> DinoNetwork:
  """DINO around a ViT, with the published head; iBOT's masked patches need the encoder's mask_token."""
  if not isinstance(encoder, ViT):
    raise ValueError('encoder: self-distillation needs a network of patches: encoder.name is vit')
  if encoder.num_classes:
    raise ValueError('encoder: num_classes has no use here; leave it out')
  if separate_patch_head and not encoder.mask_token:
    raise ValueError('separate_patch_head: masked patches need encoder.mask_token=True')

  def head() -> PrototypeHead:
    return PrototypeHead(prototypes, hidden, bottleneck, layers, learn_prototype_norms, encoder.stack.block.dtype)

  return DinoNetwork(encoder, head(), head() if separate_patch_head else None)
