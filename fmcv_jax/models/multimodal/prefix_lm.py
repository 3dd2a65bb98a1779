"""Language model that reads an image before its text: PaliGemma 1 and 2, or any image network and decoder.

PaliGemma: Beyer et al. 2024. PaliGemma 2: Steiner et al. 2024.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.bounds import PositiveInt
from fmcv_jax.errors import did_you_mean
from fmcv_jax.models.backbones.decoder import TextDecoder, text_decoder
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.common.attention.dispatch import Backend
from fmcv_jax.models.common.attention.masks import PrefixMask
from fmcv_jax.models.common.layers import (
  Dtype,
  dense,
)
from fmcv_jax.models.common.scan import Remat, Unroll
from fmcv_jax.parallel.rules import with_logical_constraint


class PrefixLM(nn.Module):
  """Normalized images [B, H, W, 3] and token ids int32 [B, T] -> logits of the next tokens, float32 [B, T, vocab_size].

  The tokens of the image network, projected to the width of the text, come before the text. The image and the first
  `prefix_length` tokens attend to each other in both directions; the tokens after them attend to all before them.
  Tokens of a row end with its padding, which nothing before it attends to.

  `prefill` and `extend` compute the same logits token by token, with a cache of keys and values.
  """

  logical_axes = (
    (r'(.*/)?image_projection/kernel', ('embed', None)),
    (r'(.*/)?image_projection/bias', (None,)),
  )

  image: nn.Module
  text: TextDecoder

  @override
  def setup(self) -> None:
    self.image_projection = dense(self.text.width, self.text.stack.block.dtype, 'image_projection')

  def encode(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Images [B, H, W, 3] -> embeddings for the text network, [B, N, width]."""
    tokens = self.image_projection(self.image(images, train=train).tokens)
    return with_logical_constraint(tokens, 'batch', 'tokens', 'width')

  def __call__(
    self, images: jax.Array, tokens: jax.Array, prefix_length: jax.Array, *, train: bool = False
  ) -> jax.Array:
    """Logits of the next tokens; prefix_length: int32 [B], at least 1."""
    inputs = self.encode(images, train=train)
    before = inputs.shape[1]
    places = jnp.arange(before + tokens.shape[1])
    prefix = places < before + prefix_length[:, None]
    mask: PrefixMask | jax.Array = PrefixMask(prefix)
    near = self._near(places[None], places[None])
    local_mask = None
    if near is not None:
      mask = PrefixMask(prefix).dense()
      local_mask = mask & (near | prefix[:, None, :, None])
    positions = _positions(places)[None]
    return self.text(tokens, positions=positions, mask=mask, local_mask=local_mask, inputs=inputs, train=train)

  def prefill(
    self, images: jax.Array, tokens: jax.Array, prefix_length: jax.Array, capacity: int
  ) -> tuple[jax.Array, jax.Array]:
    """Reads images and prefixes into a new cache with places for `capacity` more tokens.

    tokens         int32 [B, P]; what follows the prefix is ignored
    prefix_length  int32 [B], from 1 to P

    Returns the logits of the first token after each prefix, float32 [B, vocab_size], and bool [B, N + P], True for the
    places of the cache that hold the image and the prefix. Apply with mutable=['cache'].
    """
    inputs = self.encode(images)
    before = inputs.shape[1]
    places = jnp.arange(before + tokens.shape[1])
    prefix = places < before + prefix_length[:, None]
    mask = jnp.pad(prefix, ((0, 0), (0, capacity)))[:, None, None, :]
    mask = jnp.broadcast_to(mask, (*mask.shape[:2], len(places), mask.shape[3]))
    logits = self.text(
      tokens,
      positions=_positions(places)[None],
      mask=mask,
      inputs=inputs,
      read=before + prefix_length - 1,
      place=jnp.int32(0),
    )
    return logits[:, 0], prefix

  def extend(self, tokens: jax.Array, prefix: jax.Array, step: jax.Array, capacity: int) -> jax.Array:
    """Reads one more token of each row into the cache.

    tokens   int32 [B], the tokens number `step` (int32 scalar, from 0) after the prefix
    prefix   as `prefill` returned it

    Returns the logits of the next token, float32 [B, vocab_size]. Apply with the cache and mutable=['cache'].
    """
    later = jnp.broadcast_to(jnp.arange(capacity) <= step, (len(tokens), capacity))
    mask = jnp.concatenate([prefix, later], axis=1)[:, None, None, :]
    count = prefix.sum(axis=1, keepdims=True)
    before = jnp.broadcast_to(jnp.arange(prefix.shape[1]), prefix.shape)  # places, of which the prefix has the first
    near = self._near(count + step, jnp.concatenate([before, count + jnp.arange(capacity)], axis=1))
    logits = self.text(
      tokens[:, None],
      positions=_positions(count + step),
      mask=mask,
      local_mask=None if near is None else mask & near,
      place=prefix.shape[1] + step,
    )
    return logits[:, 0]

  def _near(self, queries: jax.Array, keys: jax.Array) -> jax.Array | None:
    """True for keys within the window of a query, bool [B, 1, Q, S]; None if all are.

    queries, keys  int32 [B, Q] and [B, S], their places without padding
    """
    window = self.text.window
    if window is None or keys.shape[1] <= window:
      return None
    return (queries[:, :, None] - keys[:, None, :] < window)[:, None]


def _positions(places: jax.Array) -> jax.Array:
  """Rotary positions, which begin at 1 in transformers' PaliGemma; the attention depends on differences only."""
  return places + 1


def prefix_lm(image: nn.Module, text: nn.Module) -> PrefixLM:
  """Any image network with `tokens` among its outputs, and a text decoder."""
  if not isinstance(text, TextDecoder):
    raise ValueError('text: a prefix language model needs a text_decoder')
  return PrefixLM(image, text)


# Width, depth, hidden width of the MLP, heads, key-value heads, head dimension of Gemma (Gemma Team 2024, table 1) and
# Gemma 2 (Gemma Team 2024b, table 1); mu is for tests.
PALIGEMMA_SIZES: dict[str, tuple[int, int, int, int, int, int]] = {
  'paligemma_mu': (32, 2, 64, 4, 1, 16),
  'paligemma_3b': (2048, 18, 16384, 8, 1, 256),
  'paligemma2_mu': (32, 2, 64, 4, 2, 16),
  'paligemma2_3b': (2304, 26, 9216, 8, 4, 256),
  'paligemma2_10b': (3584, 42, 14336, 16, 8, 256),
  'paligemma2_28b': (4608, 46, 36864, 32, 16, 128),
}


def paligemma(
  variant: str = 'paligemma_3b',
  *,
  image_size: PositiveInt = 224,
  vocab_size: PositiveInt = 257_216,
  length: PositiveInt = 128,
  attention: Backend = 'auto',
  remat: Remat = 'none',
  unroll: Unroll = 1,
  dtype: Dtype = 'float32',
) -> PrefixLM:
  """PaliGemma and PaliGemma 2 by their published names; the published image sizes are 224, 448 and 896."""
  if variant not in PALIGEMMA_SIZES:
    raise ValueError(f'unknown PaliGemma variant {variant!r}; {did_you_mean(variant, PALIGEMMA_SIZES)}')
  width, depth, mlp_dim, num_heads, num_kv_heads, head_dim = PALIGEMMA_SIZES[variant]
  second = variant.startswith('paligemma2')
  image = vit(
    'mu/8' if variant.endswith('_mu') else 'So400m/14',
    image_size=image_size,
    pool='gap',
    activation='gelu_tanh',
    attention=attention,
    remat=remat,
    unroll=unroll,
    dtype=dtype,
  )
  text = text_decoder(
    vocab_size,
    length,
    width,
    depth,
    num_heads,
    mlp_dim=mlp_dim,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    # Of Gemma 2 27B, (width / heads) ** -0.5.
    query_scale=(width / num_heads) ** -0.5 if variant == 'paligemma2_28b' else None,
    attention_softcap=50.0 if second else None,
    logit_softcap=30.0 if second else None,
    branch_norm=second,
    window=4096 if second else None,
    attention=attention,
    remat=remat,
    unroll=unroll,
    dtype=dtype,
  )
  return PrefixLM(image, text)
