"""Image captioners with a causal decoder: Cap and CapPa, and CoCa, which has a dual encoder too.

Cap and CapPa: Tschannen et al. 2023. CoCa: Yu et al. 2022, as OpenCLIP publishes it.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.bounds import PositiveFloat, PositiveInt
from fmcv_jax.errors import did_you_mean
from fmcv_jax.fields import ImageSize
from fmcv_jax.models.backbones.cross_decoder import (
  CaptionDecoder,
  CrossDecoder,
  caption_decoder,
  cross_decoder,
)
from fmcv_jax.models.backbones.text import TextTransformer, text_transformer
from fmcv_jax.models.backbones.vit import SIZES, ViT, vit
from fmcv_jax.models.common.attention.dispatch import Backend
from fmcv_jax.models.common.cache import cache_read
from fmcv_jax.models.common.layers import Activation, Dtype
from fmcv_jax.models.common.outputs import Features
from fmcv_jax.models.common.scan import Remat, Unroll
from fmcv_jax.models.multimodal.dual_encoder import DualEncoder, Pairs, embedding


class Captioner(nn.Module):
  """Normalized images [B, H, W, 3] and token ids int32 [B, T] -> logits of the next tokens, float32 [B, T, vocab_size].

  Every text begins with the start token, which is its prefix. `prefill` and `extend` compute the same logits token by
  token, with a cache of keys and values.
  """

  image: nn.Module
  text: CaptionDecoder

  def __call__(
    self,
    images: jax.Array,
    tokens: jax.Array,
    prefix_length: jax.Array,
    *,
    parallel: jax.Array | None = None,
    train: bool = False,
  ) -> jax.Array:
    """Logits of the next tokens; `parallel` bool [B] as in CaptionDecoder, prefix_length int32 [B] is 1 everywhere."""
    return self.text(tokens, self.image(images, train=train).tokens, parallel=parallel)

  def prefill(
    self, images: jax.Array, tokens: jax.Array, prefix_length: jax.Array, capacity: int
  ) -> tuple[jax.Array, jax.Array]:
    """Reads images and the start tokens into a new cache with places for `capacity` more tokens.

    Returns the logits of the first token, float32 [B, vocab_size], and bool [B, 1], True: the places of the prefix.
    Apply with mutable=['cache'].
    """
    logits = self.text(tokens[:, :1], self.image(images).tokens, cache=cache_read(0, 1 + capacity))
    return logits[:, 0], jnp.ones((len(tokens), 1), bool)

  def extend(self, tokens: jax.Array, prefix: jax.Array, step: jax.Array, capacity: int) -> jax.Array:
    """Reads the tokens int32 [B] number `step` (int32 scalar, from 0) after the prefix into the cache.

    Returns the logits of the next token, float32 [B, vocab_size]. Apply with the cache and mutable=['cache'].
    """
    return self.text(tokens[:, None], None, cache=cache_read(1 + step, 1 + capacity))[:, 0]


def captioner(image: nn.Module, text: nn.Module) -> Captioner:
  """Any image network with `tokens` among its outputs, and a caption decoder."""
  if not isinstance(text, CaptionDecoder):
    raise ValueError('text: a captioner needs a caption_decoder')
  return Captioner(image, text)


class Outputs(NamedTuple):
  """Outputs of CoCa: embeddings of images and texts, and logits of the next tokens, float32 [B, T, vocab_size]."""

  pairs: Pairs
  logits: jax.Array


class ContrastiveCaptioner(nn.Module):
  """CoCa: a dual encoder, and a decoder of texts that reads the tokens of both towers.

  The decoder reads all queries of the image tower but the first or, from a tower without them, its patches; and the
  tokens of the text tower. The interface is that of Captioner.
  """

  logical_axes = ((r'temperature', ()),)

  image: ViT
  text: TextTransformer
  decoder: CrossDecoder
  initial_scale: float = 1 / 0.07

  @override
  def setup(self) -> None:
    self.temperature = self.param('temperature', nn.initializers.constant(math.log(self.initial_scale)), ())

  @property
  def towers(self) -> DualEncoder:
    """The dual encoder, which takes the parameters of the whole."""
    return DualEncoder(self.image, self.text, self.initial_scale)

  def embed_and_predict(self, images: jax.Array, tokens: jax.Array, *, train: bool = False) -> Outputs:
    """Embeddings of images and texts, and logits of the next tokens."""
    image, text = self.image(images, train=train), self.text(tokens, train=train)
    pairs = Pairs(embedding(image.output), embedding(text.output))
    return Outputs(pairs, self.decoder(text.tokens, self._context(image)))

  def __call__(
    self, images: jax.Array, tokens: jax.Array, prefix_length: jax.Array, *, train: bool = False
  ) -> jax.Array:
    """Logits of the next tokens; prefix_length int32 [B] is 1 everywhere."""
    return self.embed_and_predict(images, tokens, train=train).logits

  def prefill(
    self, images: jax.Array, tokens: jax.Array, prefix_length: jax.Array, capacity: int
  ) -> tuple[jax.Array, jax.Array]:
    """As that of Captioner."""
    cache = cache_read(0, 1 + capacity)
    x = self.text(tokens[:, :1], cache=cache).tokens
    logits = self.decoder(x, self._context(self.image(images)), cache=cache)
    return logits[:, 0], jnp.ones((len(tokens), 1), bool)

  def extend(self, tokens: jax.Array, prefix: jax.Array, step: jax.Array, capacity: int) -> jax.Array:
    """As that of Captioner."""
    cache = cache_read(1 + step, 1 + capacity)
    return self.decoder(self.text(tokens[:, None], cache=cache).tokens, None, cache=cache)[:, 0]

  def _context(self, image: Features) -> jax.Array:
    return image.tokens[:, self.image.prefix :] if image.queries is None else image.queries


def contrastive_captioner(
  image: nn.Module, text: nn.Module, decoder: nn.Module, *, initial_scale: PositiveFloat = 1 / 0.07
) -> ContrastiveCaptioner:
  """CoCa from a ViT, a text_transformer with pool 'cls', and a cross_decoder of the width of that text."""
  if not isinstance(image, ViT):
    raise ValueError('image: a contrastive captioner needs a vit')
  if not isinstance(text, TextTransformer) or text.pool != 'cls':
    raise ValueError("text: a contrastive captioner needs a text_transformer with pool 'cls'")
  if not isinstance(decoder, CrossDecoder):
    raise ValueError('decoder: a contrastive captioner needs a cross_decoder')
  if decoder.width != text.width:
    raise ValueError(f'decoder.width: {decoder.width}, but the tokens of the text have a width of {text.width}')
  if decoder.vocab_size != text.vocab_size:
    raise ValueError(f'decoder.vocab_size: {decoder.vocab_size}, but the text has {text.vocab_size} ids')
  return ContrastiveCaptioner(image, text, decoder, initial_scale)


# Image tower, its queries (0 for none: the decoder reads patches); width and heads of text and decoder; width of the
# embeddings; heads of the attention pooling; depth of text and decoder. OpenCLIP 3; mu is for tests.
COCA_SIZES: dict[str, tuple[str, int, int, int, int, int, int]] = {
  'mu/8': ('mu/8', 5, 16, 2, 24, 4, 2),
  'base/18': ('B/18', 0, 768, 12, 512, 8, 12),
  'B/32': ('B/32', 256, 512, 8, 512, 8, 12),
  'L/14': ('L/14', 256, 768, 12, 768, 8, 12),
}


def coca(
  variant: str = 'B/32',
  *,
  image_size: ImageSize = 224,
  vocab_size: PositiveInt = 49408,
  length: PositiveInt = 76,
  activation: Activation = 'gelu',
  attention: Backend = 'auto',
  remat: Remat = 'none',
  unroll: Unroll = 1,
  dtype: Dtype = 'float32',
) -> ContrastiveCaptioner:
  """CoCa by OpenCLIP's names; `base/18` is for images of 288 pixels and a vocabulary of 64,000."""
  if variant not in COCA_SIZES:
    raise ValueError(f'unknown CoCa variant {variant!r}; {did_you_mean(variant, COCA_SIZES)}')
  tower, queries, width, num_heads, embedding_width, query_heads, depth = COCA_SIZES[variant]
  compute: dict[str, Any] = {'attention': attention, 'remat': remat, 'unroll': unroll, 'dtype': dtype}
  pool: dict[str, Any] = {'pool': 'cls'}
  if queries:
    pool = {'pool': 'queries', 'class_token': True, 'queries': queries, 'query_heads': query_heads}
    pool['query_width'] = embedding_width
  image = vit(
    tower,
    image_size=image_size,
    num_classes=embedding_width,
    head_bias=False,
    pre_norm=True,
    patch_bias=False,
    activation=activation,
    eps=1e-5,
    **pool,
    **compute,
  )
  text = text_transformer(
    vocab_size,
    length,
    width,
    depth,
    num_heads,
    pool='cls',
    num_classes=embedding_width,
    activation=activation,
    **compute,
  )
  decoder = cross_decoder(vocab_size, width, depth, num_heads, activation=activation, **compute)
  return ContrastiveCaptioner(image, text, decoder)


def cappa(
  variant: str = 'B/16',
  *,
  image_size: ImageSize = 224,
  vocab_size: PositiveInt = 32_000,
  length: PositiveInt = 64,
  depth: PositiveInt = 6,
  mask_token: bool = True,
  attention: Backend = 'auto',
  remat: Remat = 'none',
  unroll: Unroll = 1,
  dtype: Dtype = 'float32',
) -> Captioner:
  """CapPa (Tschannen et al. 2023): a ViT and a decoder of its width with `depth` layers; Cap without mask_token."""
  compute: dict[str, Any] = {'attention': attention, 'remat': remat, 'unroll': unroll, 'dtype': dtype}
  image = vit(variant, image_size=image_size, pool='gap', activation='gelu_tanh', **compute)
  heads = SIZES[variant.partition('/')[0]][2]
  text = caption_decoder(
    vocab_size,
    length,
    image.width,
    depth,
    heads,
    mlp_dim=image.stack.block.mlp_dim,
    mask_token=mask_token,
    **compute,
  )
  return Captioner(image, text)
