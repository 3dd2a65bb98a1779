"""Text transformer: CLIP's causal one (Radford et al. 2021), and two that look both ways: SigLIP's and BERT.

SigLIP: Zhai et al. 2023. BERT: Devlin et al. 2019, as ALIGN's text tower (Jia et al. 2021). CoCa: Yu et al. 2022.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.bounds import Decay, NonNegativeInt, PositiveFloat, PositiveInt
from fmcv_jax.models.common.attention.dispatch import Backend
from fmcv_jax.models.common.cache import CacheRead
from fmcv_jax.models.common.layers import (
  HEAD_AXES,
  NORM_AXES,
  Activation,
  BlockConfig,
  Dtype,
  Stack,
  cast_param,
  dense,
  layer_norm,
)
from fmcv_jax.models.common.outputs import Features
from fmcv_jax.models.common.scan import Remat, Unroll
from fmcv_jax.parallel.rules import with_logical_constraint

Pool = Literal['eot', 'first', 'last', 'mean', 'cls']
PROJECTION = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')


class Embedding(nn.Module):
  """Looks tokens up in a table: int32 [B, T] -> float32 [B, T, width]. `deviation` is that of the initial values."""

  size: int
  width: int
  deviation: float = 0.02

  @override
  def setup(self) -> None:
    self.embedding = self.param('embedding', nn.initializers.normal(self.deviation), (self.size, self.width))

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Rows of the table."""
    # The rows are made whole before the lookup: left split, the partitioner would replicate the looked-up batch.
    return jnp.take(with_logical_constraint(self.embedding, 'vocab', 'width'), tokens, axis=0)

  def attend(self, x: jax.Array) -> jax.Array:
    """Products with every row of the table (tied output weights): [B, T, width] -> logits float32 [B, T, size]."""
    table = cast_param(with_logical_constraint(self.embedding, 'vocab', 'width'), x.dtype)
    logits = jnp.einsum('btd,vd->btv', x, table, preferred_element_type=jnp.float32)
    return with_logical_constraint(logits, 'batch', None, 'vocab')


class TextTransformer(nn.Module):
  """Token ids int32 [B, T <= length] -> Features.

  pool 'eot' reads the position of the largest id, which is the end-of-text token of our tokenizers as of CLIP's, or the
  first position of `end_id` where it is another (MetaCLIP 2);
  'first' the start-of-text token (BERT's [CLS]); 'last' the last position (SigLIP, whose texts are padded to full
  length); 'mean' averages what is not padding (id 0). Post-norm blocks (BERT) have a norm before the first instead of
  one after the last.

  'cls' reads a learned token after the text, in a causal transformer (CoCa). As OpenCLIP's published weights need it,
  the last norm acts on this token alone, the tokens of the Features are without it and before that norm, and the mask
  of padding is shifted by one: key j is attended to if token j - 1 is not padding.
  """

  logical_axes = (
    (r'(.*/)?tokens/embedding', ('vocab', 'embed')),
    (r'(.*/)?(position|class_token)', (None, 'embed')),
    *HEAD_AXES,
    NORM_AXES,
  )

  vocab_size: int
  length: int
  width: int
  stack: Stack
  pool: Pool = 'eot'
  attend_padding: bool = True
  num_classes: int = 0
  head_bias: bool = False
  end_id: int | None = None

  @nn.compact
  def __call__(self, tokens: jax.Array, *, cache: CacheRead | None = None, train: bool = False) -> Features:
    """Features of texts; with a `cache`, of tokens [B, 1] that continue those before, pooled at the last one."""
    block = self.stack.block
    if tokens.shape[1] > self.length:
      raise ValueError(f'texts of {tokens.shape[1]} tokens for a text transformer of length {self.length}')
    x = Embedding(self.vocab_size, self.width, name='tokens')(tokens).astype(block.dtype)
    words, appended = tokens != 0, int(self.pool == 'cls')
    if appended:
      token = self.param('class_token', nn.initializers.normal(0.01), (1, self.width))
    if appended and cache is None:
      x = jnp.concatenate([x, jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width))], axis=1)
    table = self.param('position', nn.initializers.normal(0.01), (self.length + appended, self.width))
    places = table[: x.shape[1]] if cache is None else cache.rows(table)
    x = with_logical_constraint(x + places.astype(x.dtype), 'batch', 'tokens', 'width')
    if block.post_norm:
      x = layer_norm(block.eps, block.dtype, 'embed_norm')(x)
    if cache is not None:
      x = self.stack(x, mask=cache.mask, place=cache.place)
    elif appended:
      x = self.stack(x, mask=jnp.pad(words, ((0, 0), (1, 0)), constant_values=True)[:, None, None, :], train=train)
    else:
      x = self.stack(x, mask=None if self.attend_padding else words[:, None, None, :], train=train)
    if not block.post_norm and not appended:
      x = layer_norm(block.eps, block.dtype, 'norm')(x)
    if appended:
      pooled = layer_norm(block.eps, block.dtype, 'norm')(x[:, -1])
      x = x if cache is not None else x[:, :-1]
    elif self.pool == 'eot':
      ends = tokens if self.end_id is None else tokens == self.end_id
      pooled = x[jnp.arange(x.shape[0]), jnp.argmax(ends, axis=1)]
    elif self.pool in ('first', 'last'):
      pooled = x[:, 0 if self.pool == 'first' else -1]
    else:
      weights = words / jnp.maximum(words.sum(axis=1, keepdims=True), 1)
      pooled = jnp.einsum('bt,btd->bd', weights, x.astype(jnp.float32)).astype(x.dtype)
    if not self.num_classes:
      return Features(pooled, pooled, x)
    head = dense(self.num_classes, block.dtype, 'head', bias=self.head_bias, init=PROJECTION)
    return Features(head(pooled), pooled, x)


def text_transformer(
  vocab_size: PositiveInt,
  length: PositiveInt,
  width: PositiveInt,
  depth: PositiveInt,
  num_heads: PositiveInt,
  *,
  mlp_dim: PositiveInt | None = None,
  causal: bool = True,
  pool: Pool = 'eot',
  attend_padding: bool = True,
  num_classes: NonNegativeInt = 0,
  head_bias: bool = False,
  end_id: NonNegativeInt | None = None,
  activation: Activation = 'gelu',
  eps: PositiveFloat = 1e-5,
  dropout: Decay = 0.0,
  post_norm: bool = False,
  attention: Backend = 'auto',
  remat: Remat = 'none',
  unroll: Unroll = 1,
  dtype: Dtype = 'float32',
) -> TextTransformer:
  """A text transformer by its numbers; mlp_dim None is four times the width."""
  if pool == 'cls' and (not causal or post_norm or not attend_padding):
    raise ValueError("pool: 'cls' is the pool of a causal transformer without post_norm, with attend_padding=True")
  block = BlockConfig(
    num_heads=num_heads,
    mlp_dim=mlp_dim or 4 * width,
    activation=activation,
    eps=eps,
    dropout=dropout,
    causal=causal,
    post_norm=post_norm,
    attention=attention,
    dtype=dtype,
  )
  return TextTransformer(
    vocab_size=vocab_size,
    length=length,
    width=width,
    stack=Stack(depth, block, remat=remat, unroll=unroll),
    pool=pool,
    attend_padding=attend_padding,
    num_classes=num_classes,
    head_bias=head_bias,
    end_id=end_id,
  )
