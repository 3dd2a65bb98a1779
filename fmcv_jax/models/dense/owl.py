"""Objects found by words: OWL-ViT (Minderer et al. 2022) and OWLv2 (Minderer et al. 2023).

A CLIP whose image tower predicts an object at each patch: where it is, and an embedding to compare with those of texts.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import PositiveInt
from fmcv_jax.errors import did_you_mean
from fmcv_jax.fields import ImageSize
from fmcv_jax.models.backbones.vit import ViT
from fmcv_jax.models.common.attention.dispatch import Backend
from fmcv_jax.models.common.layers import NORM_AXES, Activation, Dtype, dense, layer_norm
from fmcv_jax.models.common.norms import l2_normalize
from fmcv_jax.models.common.scan import Remat, Unroll
from fmcv_jax.models.dense.heads import MlpHead
from fmcv_jax.models.multimodal.dual_encoder import DualEncoder, clip
from fmcv_jax.parallel.rules import with_logical_constraint


class PatchObjects(NamedTuple):
  """The object that each of N patches predicts, float32.

  embeddings    [B, N, E], unit length, in the space of the texts
  shift, scale  [B, N]: the logit of a text is (embedding @ text + shift) * scale
  boxes         [B, N, 4]: center x, center y, width, height as fractions of the image's sides
  objectness    [B, N]: logit of any object being there (OWLv2); zeros without it
  """

  embeddings: jax.Array
  shift: jax.Array
  scale: jax.Array
  boxes: jax.Array
  objectness: jax.Array

  def logits(self, texts: jax.Array) -> jax.Array:
    """float32 [B, N, Q] of the embeddings of texts, [Q, E] or of each image [B, Q, E]."""
    similar = jnp.einsum('bne,qe->bnq' if texts.ndim == 2 else 'bne,bqe->bnq', self.embeddings, texts)
    return (similar + self.shift[..., None]) * self.scale[..., None]


class ClassHead(nn.Module):
  """[B, N, D] -> embeddings float32 [B, N, E] of unit length, shift and scale float32 [B, N]."""

  logical_axes = (
    (r'(.*/)?(embedding|shift|scale)/kernel', ('embed', None)),
    (r'(.*/)?(embedding|shift|scale)/bias', (None,)),
  )

  embedding: int
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    near_zero = nn.initializers.normal(1e-6)
    embeddings = dense(self.embedding, self.dtype, 'embedding', init=near_zero)(x)
    shift, scale = (
      dense(1, self.dtype, name, init=near_zero)(x)[..., 0].astype(jnp.float32) for name in ('shift', 'scale')
    )
    return l2_normalize(embeddings), shift, nn.elu(scale) + 1


class MergedTokens(nn.Module):
  """Patches of a ViT's tokens [B, 1 + N, D], each times the class token, then normalized: [B, N, D]."""

  logical_axes = (NORM_AXES,)

  eps: float
  dtype: str

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    return layer_norm(self.eps, self.dtype, 'norm')(tokens[:, 1:] * tokens[:, :1])


class OwlDetector(nn.Module):
  """Normalized images and texts -> the objects of the patches and the embeddings of the texts.

  towers          a CLIP; the projection of its image tower has no part in detection, but in the published weights
  has_objectness  a head that learns what is an object of any kind (OWLv2), without a gradient to the image tower
  """

  logical_axes = ((r'(.*/)?towers/(temperature|bias)', ()),)

  towers: DualEncoder
  has_objectness: bool = True

  @property
  def image(self) -> ViT:
    """The image tower."""
    tower: Any = self.towers.image
    return tower

  @property
  def text(self) -> nn.Module:
    """The text tower."""
    return self.towers.text

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """(height, width, channels) of the images that the network is made for."""
    return self.image.input_shape

  @override
  def setup(self) -> None:
    block = self.image.stack.block
    self.merge = MergedTokens(block.eps, block.dtype)
    self.class_head = ClassHead(self.image.num_classes, block.dtype)
    self.box_head = MlpHead(4, block.dtype)
    if self.has_objectness:
      self.objectness_head = MlpHead(1, block.dtype)

  def find_objects(self, images: jax.Array, *, train: bool = False) -> PatchObjects:
    """Objects of normalized images [B, H, W, 3]."""
    tower: Any = self.towers.image
    x = self.merge(tower(images, train=train).tokens)
    x = with_logical_constraint(x, 'batch', 'tokens', 'width')
    rows, columns = (side // tower.patch_size for side in images.shape[1:3])
    boxes = jax.nn.sigmoid(self.box_head(x) + box_bias(rows, columns))
    objectness = jnp.zeros(x.shape[:2])
    if self.has_objectness:
      objectness = self.objectness_head(jax.lax.stop_gradient(x))[..., 0]
    embeddings, shift, scale = self.class_head(x)
    return PatchObjects(embeddings, shift, scale, boxes, objectness)

  def encode_text(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
    """Token ids int32 [..., T] -> unit vectors, float32 [..., E]."""
    found = self.towers.encode_text(tokens.reshape(-1, tokens.shape[-1]), train=train)
    return found.reshape(*tokens.shape[:-1], -1)

  def encode_image(self, images: jax.Array) -> jax.Array:
    """Normalized images -> unit vectors of whole images, float32 [B, E], as CLIP's."""
    return self.towers.encode_image(images)

  def __call__(self, images: jax.Array, tokens: jax.Array, *, train: bool = False) -> tuple[PatchObjects, jax.Array]:
    """Objects of images, and the embeddings of texts [Q, T] or [B, Q, T]."""
    if self.is_initializing():
      self.towers(images, tokens.reshape(-1, tokens.shape[-1])[: len(images)])
    return self.find_objects(images, train=train), self.encode_text(tokens, train=train)


def box_bias(rows: int, columns: int) -> np.ndarray:
  """float32 [rows * columns, 4]: logits of each patch's corner at its right and bottom, and of the size of a patch.

  The corner, where the center would be expected, is that of the published weights.
  """
  y, x = np.meshgrid(np.arange(1, rows + 1) / rows, np.arange(1, columns + 1) / columns, indexing='ij')
  places = np.stack([x, y, np.full_like(x, 1 / columns), np.full_like(x, 1 / rows)], -1).reshape(-1, 4)
  return (np.log(places + 1e-4) - np.log1p(-places + 1e-4)).astype(np.float32)


# The published sizes: the CLIP, and the side of the images of OWL-ViT and of OWLv2.
OWL_SIZES: dict[str, tuple[int, int]] = {'B/32': (768, 960), 'B/16': (768, 960), 'L/14': (840, 1008)}


def owl(
  variant: str = 'B/16',
  *,
  image_size: ImageSize | None = None,
  objectness: bool = True,
  vocab_size: PositiveInt = 49408,
  length: PositiveInt = 16,
  activation: Activation = 'quick_gelu',
  attention: Backend = 'auto',
  remat: Remat = 'none',
  unroll: Unroll = 1,
  dtype: Dtype = 'float32',
) -> OwlDetector:
  """OWLv2 by its published names, or OWL-ViT without `objectness`; image_size None is the published one."""
  if variant not in OWL_SIZES:
    raise ValueError(f'unknown OWL variant {variant!r}; {did_you_mean(variant, OWL_SIZES)}')
  towers = clip(
    variant,
    image_size=image_size or OWL_SIZES[variant][objectness],
    vocab_size=vocab_size,
    length=length,
    activation=activation,
    attention=attention,
    remat=remat,
    unroll=unroll,
    dtype=dtype,
  )
  return OwlDetector(towers, objectness)


def owl_detector(towers: nn.Module, objectness: bool = True) -> OwlDetector:
  """A detector on a CLIP of any size, whose image tower is a ViT with a class token and a projection."""
  if not isinstance(towers, DualEncoder):
    raise ValueError('towers: expected clip, siglip or dual_encoder')
  image = towers.image
  if not isinstance(image, ViT) or image.pool != 'cls' or image.registers or image.distilled or not image.num_classes:
    raise ValueError('towers: the image tower has to be a vit with pool=cls, without registers, and with num_classes')
  return OwlDetector(towers, objectness)
