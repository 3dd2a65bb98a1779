"""Causal decoder of texts that attends to the tokens of an image (Vaswani et al. 2017), as in CoCa and Cap."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.bounds import PositiveFloat, PositiveInt
from fmcv_jax.models.backbones.text import Embedding
from fmcv_jax.models.common.attention.dispatch import Backend
from fmcv_jax.models.common.cache import CacheRead
from fmcv_jax.models.common.layers import (
  NORM_AXES,
  Activation,
  Attention,
  BlockConfig,
  Dtype,
  Mlp,
  Stack,
  block_norm,
  cast_param,
)
from fmcv_jax.models.common.scan import Remat, Unroll, scan_layers
from fmcv_jax.parallel.rules import with_logical_constraint


class CrossBlock(nn.Module):
  """Self-attention, attention to a context, and an MLP, x [B, T, D] -> [B, T, D], as the body of a scan.

  two_mlps   True: an MLP after each attention, and a norm of the context (OpenCLIP's CoCa)
  """

  logical_axes = (NORM_AXES,)

  config: BlockConfig
  two_mlps: bool = False

  @nn.compact
  def __call__(
    self, x: jax.Array, context: jax.Array | None, mask: jax.Array | None = None, place: jax.Array | None = None
  ) -> tuple[jax.Array, None]:
    """context [B, N, C], None for the one that the cache holds; mask bool [B or 1, 1, T, S], None for a causal one."""
    c = dataclasses.replace(self.config, causal=mask is None)
    x = with_logical_constraint(x, 'batch', 'tokens', 'width')
    y = Attention(c, name='attention')(block_norm(c, 'norm1')(x), mask=mask, place=place)
    x = x + y.astype(x.dtype)
    if self.two_mlps:
      x = x + Mlp(c, name='self_mlp')(block_norm(c, 'self_mlp_norm')(x)).astype(x.dtype)
      context = None if context is None else block_norm(c, 'context_norm')(context)
    y = block_norm(c, 'cross_norm')(x)
    y = Attention(c, name='cross_attention')(y, context, place=place, cached_context=context is None)
    x = x + y.astype(x.dtype)
    x = x + Mlp(c, name='mlp')(block_norm(c, 'norm2')(x)).astype(x.dtype)
    return with_logical_constraint(x, 'batch', 'tokens', 'width'), None


class VocabularyHead(nn.Module):
  """Logits of the next tokens, [B, T, D] -> float32 [B, T, vocab_size]; with a bias it is zero-initialized."""

  logical_axes = (
    (r'(.*/)?logits/kernel', ('embed', 'vocab')),
    (r'(.*/)?logits/bias', ('vocab',)),
  )

  vocab_size: int
  dtype: Dtype
  bias: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.initializers.zeros if self.bias else nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
    kernel = self.param('kernel', init, (x.shape[-1], self.vocab_size))
    kernel = cast_param(kernel, jnp.dtype(self.dtype))
    logits = jnp.einsum('btd,dv->btv', x.astype(self.dtype), kernel, preferred_element_type=jnp.float32)
    if self.bias:
      logits = logits + self.param('bias', nn.initializers.zeros, (self.vocab_size,))
    return with_logical_constraint(logits, 'batch', None, 'vocab')


class CrossDecoder(nn.Module):
  """Embeddings [B, T, width] of tokens, and a context [B, N, C] -> logits of the next tokens, float32 [B, T, V].

  two_mlps as in CrossBlock; `logits_bias` adds a bias to the logits.
  """

  logical_axes = (NORM_AXES,)

  vocab_size: int
  width: int
  stack: Stack
  two_mlps: bool = False
  logits_bias: bool = True

  @nn.compact
  def __call__(
    self, x: jax.Array, context: jax.Array | None, *, mask: jax.Array | None = None, cache: CacheRead | None = None
  ) -> jax.Array:
    """Logits; with a `cache` those of the tokens [B, 1] after the ones that it holds.

    context  None for the context that the cache holds
    mask     bool [B or 1, 1, T, T], True where self-attention is allowed; None for causal attention
    """
    stack, block = self.stack, self.stack.block
    place = None if cache is None else cache.place
    mask = mask if cache is None else cache.mask
    blocks = scan_layers(CrossBlock, stack.depth, (nn.broadcast,) * 3, remat=stack.remat, unroll=stack.unroll)
    x = blocks(block, self.two_mlps, name='blocks')(x.astype(block.dtype), context, mask, place)[0]
    # The last norm of Cap has a bias even where those of the blocks have none.
    x = block_norm(dataclasses.replace(block, norm='layer'), 'norm')(x)
    return VocabularyHead(self.vocab_size, block.dtype, self.logits_bias, name='logits')(x)


def cross_decoder(
  vocab_size: PositiveInt,
  width: PositiveInt,
  depth: PositiveInt,
  num_heads: PositiveInt,
  *,
  mlp_dim: PositiveInt | None = None,
  two_mlps: bool = True,
  logits_bias: bool = False,
  activation: Activation = 'gelu',
  bias: bool = True,
  eps: PositiveFloat = 1e-5,
  attention: Backend = 'auto',
  remat: Remat = 'none',
  unroll: Unroll = 1,
  dtype: Dtype = 'float32',
) -> CrossDecoder:
  """The decoder of CoCa by its numbers; mlp_dim None is four times the width, `bias` is that of layers and norms."""
  block = BlockConfig(
    num_heads=num_heads,
    mlp_dim=mlp_dim or 4 * width,
    activation=activation,
    qkv_bias=bias,
    bias=bias,
    eps=eps,
    attention=attention,
    dtype=dtype,
    norm='layer' if bias else 'layer_no_bias',
  )
  return CrossDecoder(vocab_size, width, Stack(depth, block, remat=remat, unroll=unroll), two_mlps, logits_bias)


class CaptionDecoder(nn.Module):
  """Token ids int32 [B, T <= length] and the tokens of an image [B, N, C] -> logits, float32 [B, T, vocab_size].

  `mask_token` adds a learned token that stands for every token in parallel prediction (CapPa, Tschannen et al. 2023).
  """

  logical_axes = (
    (r'(.*/)?tokens/embedding', ('vocab', 'embed')),
    (r'(.*/)?(position|mask_token)', (None, 'embed')),
  )

  decoder: CrossDecoder
  length: int
  mask_token: bool = False

  @property
  def vocab_size(self) -> int:
    """Number of token ids."""
    return self.decoder.vocab_size

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    context: jax.Array | None,
    *,
    parallel: jax.Array | None = None,
    cache: CacheRead | None = None,
  ) -> jax.Array:
    """Logits; `context` and `cache` as those of the decoder.

    parallel   bool [B], True for examples whose inputs are all the mask token, without a causal mask; None for none
    """
    width = self.decoder.width
    if tokens.shape[1] > self.length:
      raise ValueError(f'texts of {tokens.shape[1]} tokens for a caption decoder of length {self.length}')
    x = Embedding(self.vocab_size, width, 1.0, name='tokens')(tokens)
    if self.mask_token:
      token = self.param('mask_token', nn.initializers.normal(1.0), (1, width))
      x = x if parallel is None else jnp.where(parallel[:, None, None], token, x)
    table = self.param('position', nn.initializers.normal(width**-0.5), (self.length, width))
    x = x + (table[: tokens.shape[1]] if cache is None else cache.rows(table))
    mask = None
    if parallel is not None:
      places = jnp.arange(tokens.shape[1])
      mask = (parallel[:, None, None] | (places[None, :] <= places[:, None]))[:, None]
    x = with_logical_constraint(x, 'batch', 'tokens', 'width')
    return self.decoder(x, context, mask=mask, cache=cache)


def caption_decoder(
  vocab_size: PositiveInt,
  length: PositiveInt,
  width: PositiveInt,
  depth: PositiveInt,
  num_heads: PositiveInt,
  *,
  mlp_dim: PositiveInt | None = None,
  mask_token: bool = False,
  activation: Activation = 'gelu_tanh',
  bias: bool = False,
  eps: PositiveFloat = 1e-6,
  attention: Backend = 'auto',
  remat: Remat = 'none',
  unroll: Unroll = 1,
  dtype: Dtype = 'float32',
) -> CaptionDecoder:
  """The decoder of Cap by its numbers; mlp_dim None is four times the width, `bias` is that of its blocks."""
  decoder = cross_decoder(
    vocab_size,
    width,
    depth,
    num_heads,
    mlp_dim=mlp_dim,
    two_mlps=False,
    logits_bias=True,
    activation=activation,
    bias=bias,
    eps=eps,
    attention=attention,
    remat=remat,
    unroll=unroll,
    dtype=dtype,
  )
  return CaptionDecoder(decoder, length, mask_token)
