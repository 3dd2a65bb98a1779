"""Language model as Gemma (Gemma Team 2024), which can read embeddings of other inputs before its tokens."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.bounds import PositiveFloat, PositiveInt
from fmcv_jax.models.backbones.text import Embedding
from fmcv_jax.models.common.attention.dispatch import Backend
from fmcv_jax.models.common.attention.masks import PrefixMask
from fmcv_jax.models.common.layers import (
  NORM_AXES,
  Activation,
  BlockConfig,
  Dtype,
  Stack,
  block_norm,
)
from fmcv_jax.models.common.positions import rope_1d
from fmcv_jax.models.common.scan import Remat, Unroll
from fmcv_jax.parallel.rules import with_logical_constraint


class TextDecoder(nn.Module):
  """Token ids int32 [B, T] -> logits of the next tokens, float32 [B, T, vocab_size], by tied output weights.

  Embeddings of tokens are multiplied by the square root of the width; those of other inputs are not. Positions are
  rotary, with base `rope_base`. `logit_softcap` bounds the logits to +-softcap by tanh, None for none. With a `window`,
  tokens after the prefix attend to the last `window` tokens only in every second block, beginning with the first.
  `length` is the largest number of text tokens in a row of the data.
  """

  logical_axes = (
    (r'(.*/)?tokens/embedding', ('vocab', 'embed')),
    NORM_AXES,
  )

  vocab_size: int
  length: int
  width: int
  stack: Stack
  logit_softcap: float | None = None
  rope_base: float = 10_000.0
  window: int | None = None

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    *,
    positions: jax.Array,
    mask: jax.Array | PrefixMask,
    local_mask: jax.Array | None = None,
    inputs: jax.Array | None = None,
    read: jax.Array | None = None,
    place: jax.Array | None = None,
    train: bool = False,
  ) -> jax.Array:
    """Logits float32 [B, T, vocab_size]; [B, 1, vocab_size] with `read`.

    positions  int32 [B or 1, N + T], of the inputs and the tokens
    mask       bool [B or 1, 1, N + T, S], True where attention is allowed, with S = N + T, or the size of the cache;
               without a cache also a PrefixMask
    local_mask bool likewise, of the blocks with a window; None: `mask` is that of all
    inputs     embeddings before the tokens, such as those of an image, [B, N, width]; None for none
    read       int32 [B], the one place among the N + T whose logits are computed; None for all T tokens
    place      int32 scalar: first place of the inputs and tokens in the collection 'cache'; None for no cache
    """
    block = self.stack.block
    dtype = jnp.dtype(block.dtype)
    embedding = Embedding(self.vocab_size, self.width, name='tokens')
    x = (embedding(tokens) * jnp.float32(self.width**0.5)).astype(dtype)
    if inputs is not None:
      x = jnp.concatenate([inputs.astype(dtype), x], axis=1)
    x = with_logical_constraint(x, 'batch', 'tokens', 'width')
    angles = rope_1d(positions, block.head_dim or self.width // block.num_heads, self.rope_base)
    x = self.stack(x, angles=angles, mask=mask, local_mask=local_mask, place=place, train=train)
    if read is not None:
      x = jnp.take_along_axis(x, read[:, None, None], axis=1)
    elif inputs is not None:
      x = x[:, inputs.shape[1] :]
    logits = embedding.attend(block_norm(block, 'norm')(x))
    return logits if self.logit_softcap is None else self.logit_softcap * jnp.tanh(logits / self.logit_softcap)


def text_decoder(
  vocab_size: PositiveInt,
  length: PositiveInt,
  width: PositiveInt,
  depth: PositiveInt,
  num_heads: PositiveInt,
  *,
  mlp_dim: PositiveInt | None = None,
  num_kv_heads: PositiveInt | None = None,
  head_dim: PositiveInt | None = None,
  query_scale: PositiveFloat | None = None,
  attention_softcap: PositiveFloat | None = None,
  logit_softcap: PositiveFloat | None = None,
  branch_norm: bool = False,
  activation: Activation = 'gelu_tanh',
  gated_mlp: bool = True,
  bias: bool = False,
  eps: PositiveFloat = 1e-6,
  rope_base: PositiveFloat = 10_000.0,
  window: PositiveInt | None = None,
  attention: Backend = 'auto',
  remat: Remat = 'none',
  unroll: Unroll = 1,
  dtype: Dtype = 'float32',
) -> TextDecoder:
  """A language model by its numbers; mlp_dim None is four times the width, `bias` is that of all linear layers."""
  block = BlockConfig(
    num_heads=num_heads,
    mlp_dim=mlp_dim or 4 * width,
    activation=activation,
    gated_mlp=gated_mlp,
    qkv_bias=bias,
    bias=bias,
    eps=eps,
    attention=attention,
    dtype=dtype,
    norm='rms',
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    query_scale=query_scale,
    logit_softcap=attention_softcap,
    branch_norm=branch_norm,
  )
  stack = Stack(depth, block, remat=remat, unroll=unroll)
  return TextDecoder(vocab_size, length, width, stack, logit_softcap, rope_base, window)
