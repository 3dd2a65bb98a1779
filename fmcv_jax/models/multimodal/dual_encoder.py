"""Image and text towers that meet in one embedding space.

CLIP (Radford et al. 2021), ALIGN (Jia et al. 2021), SigLIP (Zhai et al. 2023), or any two towers.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.bounds import Decay, Finite, PositiveFloat, PositiveInt
from fmcv_jax.errors import did_you_mean
from fmcv_jax.fields import ImageSize
from fmcv_jax.models.backbones.efficientnet import efficientnet
from fmcv_jax.models.backbones.text import text_transformer
from fmcv_jax.models.backbones.vit import SIZES, vit
from fmcv_jax.models.common.attention.dispatch import Backend
from fmcv_jax.models.common.layers import (
  Activation,
  Dtype,
)
from fmcv_jax.models.common.norms import l2_normalize
from fmcv_jax.models.common.scan import Remat, Unroll
from fmcv_jax.parallel.rules import with_logical_constraint

MAX_LOG_SCALE = math.log(100.0)  # CLIP clips the learned temperature so that logits are never scaled by more


class Pairs(NamedTuple):
  """Unit-length embeddings of a batch of pairs, float32 [B, E]."""

  image: jax.Array
  text: jax.Array


class DualEncoder(nn.Module):
  """Two towers whose outputs have the same width, a learned inverse temperature, and a learned bias (None for none)."""

  logical_axes = ((r'temperature|bias', ()),)

  image: nn.Module
  text: nn.Module
  initial_scale: float = 1 / 0.07
  initial_bias: float | None = None

  @override
  def setup(self) -> None:
    self.temperature = self.param('temperature', nn.initializers.constant(math.log(self.initial_scale)), ())
    if self.initial_bias is not None:
      self.bias = self.param('bias', nn.initializers.constant(self.initial_bias), ())

  def encode_image(self, images: jax.Array, *, keep: jax.Array | None = None, train: bool = False) -> jax.Array:
    """Normalized images [B, H, W, 3] -> unit vectors, float32 [B, E]."""
    chosen = {} if keep is None else {'keep': keep}  # which only networks of patches take
    return embedding(self.image(images, train=train, **chosen).output)

  def encode_text(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
    """Token ids int32 [B, T] -> unit vectors, float32 [B, E]."""
    return embedding(self.text(tokens, train=train).output)

  def logit_scale_and_bias(self) -> tuple[jax.Array, jax.Array]:
    """The float32 scalars of logits = scale * image @ text.T + bias."""
    scale = jnp.exp(jnp.minimum(self.temperature, MAX_LOG_SCALE))
    return scale, self.bias if self.initial_bias is not None else jnp.zeros(())

  def __call__(
    self, images: jax.Array, tokens: jax.Array, *, keep: jax.Array | None = None, train: bool = False
  ) -> Pairs:
    """Unit vectors of both towers; `keep` int32 [B, N] are the patches that the image tower processes (None: all)."""
    return Pairs(self.encode_image(images, keep=keep, train=train), self.encode_text(tokens, train=train))


def embedding(output: jax.Array) -> jax.Array:
  """A tower's output [B, E] as unit vectors, float32, split over the batch."""
  return l2_normalize(with_logical_constraint(output, 'batch', None))


def dual_encoder(
  image: nn.Module, text: nn.Module, *, initial_scale: PositiveFloat = 1 / 0.07, initial_bias: Finite | None = None
) -> DualEncoder:
  """Any two towers that the config describes."""
  return DualEncoder(image, text, initial_scale, initial_bias)


# Image tower; width, depth, heads of the text tower; width of the embedding. OpenAI's B and L, OpenCLIP's H, g and G.
CLIP_SIZES: dict[str, tuple[str, int, int, int, int]] = {
  'B/32': ('B/32', 512, 12, 8, 512),
  'B/16': ('B/16', 512, 12, 8, 512),
  'L/14': ('L/14', 768, 12, 12, 768),
  'H/14': ('H/14', 1024, 24, 16, 1024),
  'g/14': ('g/14', 1024, 24, 16, 1024),
  'G/14': ('G/14', 1280, 32, 20, 1280),
}


def clip(
  variant: str = 'B/32',
  *,
  image_size: ImageSize = 224,
  vocab_size: PositiveInt = 49408,
  length: PositiveInt = 77,
  activation: Activation = 'gelu',
  attention: Backend = 'auto',
  remat: Remat = 'none',
  unroll: Unroll = 1,
  dtype: Dtype = 'float32',
) -> DualEncoder:
  """CLIP by its published names. OpenAI's own weights want activation='quick_gelu'."""
  if variant not in CLIP_SIZES:
    raise ValueError(f'unknown CLIP variant {variant!r}; {did_you_mean(variant, CLIP_SIZES)}')
  tower, width, depth, heads, embedding = CLIP_SIZES[variant]
  compute: dict[str, Any] = {'attention': attention, 'remat': remat, 'unroll': unroll, 'dtype': dtype}
  image = vit(
    tower,
    image_size=image_size,
    num_classes=embedding,
    head_bias=False,
    pre_norm=True,
    patch_bias=False,
    activation=activation,
    eps=1e-5,
    **compute,
  )
  text = text_transformer(
    vocab_size,
    length,
    width,
    depth,
    heads,
    num_classes=embedding,
    activation=activation,
    **compute,
  )
  return DualEncoder(image, text)


# The image tower; width and depth of the text tower are the same, but for gopt's, which are So400m's.
SIGLIP_SIZES = ('B/32', 'B/16', 'L/16', 'So400m/14', 'So400m/16', 'gopt/16')


def siglip(
  variant: str = 'B/16',
  *,
  image_size: ImageSize = 224,
  vocab_size: PositiveInt = 32_000,
  length: PositiveInt = 64,
  attention: Backend = 'auto',
  remat: Remat = 'none',
  unroll: Unroll = 1,
  dtype: Dtype = 'float32',
) -> DualEncoder:
  """SigLIP by its published names: attention-pooled images, bidirectional text read at its last token."""
  if variant not in SIGLIP_SIZES:
    raise ValueError(f'unknown SigLIP variant {variant!r}; {did_you_mean(variant, SIGLIP_SIZES)}')
  compute: dict[str, Any] = {'attention': attention, 'remat': remat, 'unroll': unroll, 'dtype': dtype}
  image = vit(
    variant,
    image_size=image_size,
    pool='map',
    activation='gelu_tanh',
    **compute,
  )
  size = variant.partition('/')[0]
  width, depth, num_heads, mlp_dim = SIZES['So400m' if size == 'gopt' else size]
  text = text_transformer(
    vocab_size,
    length,
    width,
    depth,
    num_heads,
    mlp_dim=mlp_dim,
    causal=False,
    pool='last',
    num_classes=image.width,
    head_bias=True,
    activation='gelu_tanh',
    eps=1e-6,
    **compute,
  )
  return DualEncoder(image, text, initial_scale=10.0, initial_bias=-10.0)


# Image tower; width, depth, heads of the text tower. L2: Jia et al. 2021, with BERT-Large; B7: Kakao's align-base.
ALIGN_SIZES: dict[str, tuple[str, int, int, int]] = {
  'mu': ('mu', 32, 2, 2),
  'B7': ('B7', 768, 12, 12),
  'L2': ('L2', 1024, 24, 16),
}


def align(
  variant: str = 'L2',
  *,
  image_size: PositiveInt = 289,
  vocab_size: PositiveInt = 100_000,
  length: PositiveInt = 64,
  drop_path: Decay = 0.2,
  attention: Backend = 'auto',
  remat: Remat = 'none',
  unroll: Unroll = 1,
  dtype: Dtype = 'float32',
) -> DualEncoder:
  """ALIGN (Jia et al. 2021): an EfficientNet without its last convolution, and BERT read at its first token.

  BERT's second kind of segment has no use here, and that of the first, one vector for all, is part of the positions.
  """
  if variant not in ALIGN_SIZES:
    raise ValueError(f'unknown ALIGN variant {variant!r}; {did_you_mean(variant, ALIGN_SIZES)}')
  tower, width, depth, heads = ALIGN_SIZES[variant]
  image = efficientnet(tower, image_size=image_size, top=False, drop_path=drop_path, remat=remat, dtype=dtype)
  text = text_transformer(
    vocab_size,
    length,
    width,
    depth,
    heads,
    causal=False,
    pool='first',
    attend_padding=False,
    num_classes=image.width,
    head_bias=True,
    eps=1e-12,
    post_norm=True,
    attention=attention,
    remat=remat,
    unroll=unroll,
    dtype=dtype,
  )
  return DualEncoder(image, text, initial_scale=1.0)
