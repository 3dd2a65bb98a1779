"""Attention, MLP, block and scanned stack of blocks, shared by all transformers.

Letters in shapes: B batch, T tokens, D width, H heads, K head dimension, L depth.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fmcv_jax.models.common.attention.dispatch import Backend, attention
from fmcv_jax.models.common.attention.masks import PrefixMask
from fmcv_jax.models.common.norms import RMSNorm, layer_norm
from fmcv_jax.models.common.positions import rotate
from fmcv_jax.models.common.scan import Remat, Unroll, scan_layers
from fmcv_jax.parallel.rules import with_logical_constraint

Activation = Literal['gelu', 'gelu_tanh', 'quick_gelu', 'silu', 'relu']
Dtype = Literal['float32', 'bfloat16']
Norm = Literal['layer', 'layer_no_bias', 'rms']

ACTIVATIONS = {
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
  'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
  'silu': jax.nn.silu,
  'relu': jax.nn.relu,
}


# Logical axes of parameters that several modules share (see parallel/parameter_axes.py).
NORM_AXES = (r'(.*/)?\w*norm\w*/(scale|bias)', (None,))
ATTENTION_AXES = (
  (r'(.*/)?(query|key|value)/kernel', ('embed', 'heads')),
  (r'(.*/)?(query|key|value)/bias', ('heads',)),
  (r'(.*/)?(\w+_)?attention/out/kernel', ('heads', 'embed')),
  (r'(.*/)?(\w+_)?attention/out/bias', (None,)),
  NORM_AXES,
)
HEAD_AXES = (
  (r'(.*/)?(head|distillation_head)/kernel', ('embed', None)),
  (r'(.*/)?(head|distillation_head)/bias', (None,)),
)
HIDDEN_AXES = (
  (r'(.*/)?hidden\d+/kernel', ('embed', None)),
  (r'(.*/)?hidden\d+/bias', (None,)),
)


@dataclasses.dataclass(frozen=True)
class BlockConfig:
  """Options shared by the blocks of a stack.

  `eps` is the epsilon of LayerNorm; `layer_scale` the initial value of LayerScale (Touvron et al. 2021), None for none;
  `gated` makes the MLP a GLU (Shazeer 2020); `qkv_bias` adds biases to the query, key and value projections; `dropout`
  acts on both residual branches; `post_norm` normalizes after each residual sum instead of before each branch (Vaswani
  et al. 2017, BERT); `parallel` adds attention and MLP of the same normalized input in one sum, and `qk_norm`
  normalizes queries and keys per head (both Dehghani et al. 2023, section 2.1); `dtype` is the dtype of matmuls
  (parameters, norm statistics, softmax and the residual sum of float32 inputs stay float32).

  Those of language models: `norm` 'rms' replaces LayerNorm by RMSNorm, 'layer_no_bias' removes its bias; `bias` False
  removes the biases of the output projection and of the MLP; `num_kv_heads` heads of keys and values, None for one per
  query head, serve groups of query heads (Ainslie et al. 2023); `head_dim`, None for width / num_heads; `query_scale`
  multiplies the logits, None for head_dim ** -0.5; `logit_softcap` bounds the logits to +-softcap by tanh, and
  `branch_norm` also normalizes the output of each branch (both Gemma Team 2024, Gemma 2, section 2).
  """

  num_heads: int
  mlp_dim: int
  activation: Activation = 'gelu'
  gated_mlp: bool = False
  qkv_bias: bool = True
  eps: float = 1e-6
  layer_scale: float | None = None
  dropout: float = 0.0
  causal: bool = False
  post_norm: bool = False
  parallel: bool = False
  qk_norm: bool = False
  attention: Backend = 'auto'
  dtype: Dtype = 'float32'
  norm: Norm = 'layer'
  bias: bool = True
  num_kv_heads: int | None = None
  head_dim: int | None = None
  query_scale: float | None = None
  logit_softcap: float | None = None
  branch_norm: bool = False

  def __post_init__(self) -> None:
    if self.num_kv_heads is not None and (self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads):
      raise ValueError(f'num_kv_heads: {self.num_heads} heads are not divisible by {self.num_kv_heads}')
    if self.branch_norm and (self.parallel or self.post_norm):
      raise ValueError('branch_norm: only for blocks that are neither parallel nor post_norm')


class Dense(nn.Module):
  """x [..., D] -> [..., features], with parameters `kernel` [D, features] and `bias` in float32, and products in dtype.

  The bias is added in float32, so that its gradient is a float32 sum over all tokens.
  """

  features: int
  dtype: jnp.dtype
  use_bias: bool = True
  kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param('kernel', self.kernel_init, (x.shape[-1], self.features))
    y = jnp.dot(x.astype(self.dtype), cast_param(kernel, self.dtype))
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, (self.features,))
      y = (y.astype(bias.dtype) + bias).astype(self.dtype)
    return checkpoint_name(y, 'dense')


def cast_param(parameter: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """A parameter cast to the dtype of the matmuls.

  The barrier keeps XLA from fusing the cast, and the slice out of stacked layers, into every product that reads the
  parameter: on a TPU it is then prefetched (docs/plan.md has the measured gain).
  """
  if parameter.dtype == dtype:
    return parameter
  return jax.lax.optimization_barrier(parameter.astype(dtype))


def dense(
  features: int,
  dtype: str,
  name: str,
  *,
  bias: bool = True,
  init: nn.initializers.Initializer = nn.initializers.xavier_uniform(),
) -> Dense:
  """`Dense` with a name; `init` initializes the kernel."""
  return Dense(features, jnp.dtype(dtype), bias, init, name=name)


def block_norm(config: BlockConfig, name: str) -> nn.Module:
  """A norm of the kind that the blocks have."""
  if config.norm == 'rms':
    return RMSNorm(config.eps, jnp.dtype(config.dtype), name=name)
  return layer_norm(config.eps, config.dtype, name, bias=config.norm == 'layer')


def stochastic_depth(y: jax.Array, rate: jax.Array | float, rng: jax.Array) -> jax.Array:
  """Zeros each example of y [B, ...] with probability `rate` and scales the others to preserve the mean."""
  keep = 1.0 - rate
  kept = jax.random.bernoulli(rng, keep, (y.shape[0], *(1,) * (y.ndim - 1)))
  return jnp.where(kept, y / keep, 0).astype(y.dtype)


class Attention(nn.Module):
  """Multi-head attention of x [B, T, D] over `context` [B, S, D] (x itself if None) -> [B, T, D].

  `values` [B, S, D] are what is averaged, if not the context, such as the context without its positions.
  config.causal applies to self-attention only: all tokens of a context are visible.

  With a `place` (int32 scalar), self-attention writes its keys and values to the collection 'cache' from that token on,
  and attends to the whole cache through `mask` [B or 1, 1, T, S] alone, whose last axis is the size S of the cache.
  Keys and values of a context are stored there too; `cached_context` True reads them instead of a context.
  """

  logical_axes = (*ATTENTION_AXES,)

  config: BlockConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    context: jax.Array | None = None,
    *,
    values: jax.Array | None = None,
    angles: jax.Array | None = None,
    mask: jax.Array | PrefixMask | None = None,
    place: jax.Array | None = None,
    cached_context: bool = False,
  ) -> jax.Array:
    c, width = self.config, x.shape[-1]
    if c.head_dim is None and width % c.num_heads:
      raise ValueError(f'width {width} is not divisible by {c.num_heads} heads')
    head_dim, kv_heads = c.head_dim or width // c.num_heads, c.num_kv_heads or c.num_heads
    is_self = context is None and not cached_context
    # A context (a text, say) is short, and not sharded along its tokens.
    tokens: str | None = 'tokens' if is_self else None
    backend: Backend = c.attention if is_self and place is None else 'xla'
    causal = c.causal and is_self and place is None
    context = x if context is None else context

    def project(inputs: jax.Array, name: str, tokens: str | None, count: int) -> jax.Array:
      y = dense(count * head_dim, c.dtype, name, bias=c.qkv_bias)(inputs)
      return with_logical_constraint(y.reshape(*y.shape[:2], count, -1), 'batch', tokens, _heads(count), None)

    query = project(x, 'query', 'tokens', c.num_heads)
    query = layer_norm(c.eps, c.dtype, 'query_norm')(query) if c.qk_norm else query
    query = query if angles is None else rotate(query, angles)
    key: jax.Array
    value: jax.Array
    if cached_context:
      key, value = (self.get_variable('cache', f'context_{name}') for name in ('key', 'value'))
    else:
      key = project(context, 'key', tokens, kv_heads)
      value = project(context if values is None else values, 'value', tokens, kv_heads)
      key = layer_norm(c.eps, c.dtype, 'key_norm')(key) if c.qk_norm else key
      key = key if angles is None else rotate(key, angles)
    if place is not None and is_self:
      key, value = (self._cached(name, x, place, mask) for name, x in (('key', key), ('value', value)))
    elif place is not None and not cached_context:
      self.put_variable('cache', 'context_key', key)
      self.put_variable('cache', 'context_value', value)
    y = attention(
      query, key, value, causal=causal, mask=mask, scale=c.query_scale, softcap=c.logit_softcap, backend=backend
    )
    # For `attention_maps`; no cost unless the caller of `apply` makes 'intermediates' mutable, or passes 'probes'.
    self.sow('intermediates', 'projections', (query, key, value))
    if self.has_variable('probes', 'mixed'):
      y = y + self.get_variable('probes', 'mixed')
    y = checkpoint_name(y.reshape(*x.shape[:2], c.num_heads * head_dim), 'attention')
    return dense(width, c.dtype, 'out', bias=c.bias)(y)

  def _cached(self, name: str, x: jax.Array, place: jax.Array, mask: Any) -> jax.Array:
    """The whole cache [B, S, H, K] of keys or values, with x [B, T, H, K] written from `place` on."""
    shape = (x.shape[0], mask.shape[-1], *x.shape[2:])
    cache = self.variable('cache', f'cached_{name}', jnp.zeros, shape, x.dtype)
    whole = jax.lax.dynamic_update_slice_in_dim(cache.value, x, place, axis=1)
    cache.value = with_logical_constraint(whole, 'batch', None, _heads(x.shape[2]), None)
    return cache.value


def _heads(count: int) -> str | None:
  """Logical axis of `count` heads; a single head is never sharded."""
  return 'heads' if count > 1 else None


class Mlp(nn.Module):
  """Two-layer perceptron on the last axis of x [B, T, D] -> [B, T, D]."""

  logical_axes = (
    (r'(.*/)?(\w+_)?mlp/(up|gate)/kernel', ('embed', 'mlp')),
    (r'(.*/)?(\w+_)?mlp/(up|gate)/bias', ('mlp',)),
    (r'(.*/)?(\w+_)?mlp/down/kernel', ('mlp', 'embed')),
    (r'(.*/)?(\w+_)?mlp/down/bias', (None,)),
  )

  config: BlockConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    y = ACTIVATIONS[c.activation](dense(c.mlp_dim, c.dtype, 'gate' if c.gated_mlp else 'up', bias=c.bias)(x))
    if c.gated_mlp:
      y = y * dense(c.mlp_dim, c.dtype, 'up', bias=c.bias)(x)
    y = with_logical_constraint(y, 'batch', 'tokens', 'mlp')
    return dense(x.shape[-1], c.dtype, 'down', bias=c.bias)(y)


class Block(nn.Module):
  """Transformer block, x [B, T, D] -> [B, T, D], in the (carry, input) -> (carry, output) form of a scan."""

  logical_axes = (
    NORM_AXES,
    (r'(.*/)?scale[12]', (None,)),
  )

  config: BlockConfig
  train: bool = False

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    drop_path: jax.Array | None = None,
    is_local: jax.Array | None = None,
    angles: jax.Array | None = None,
    mask: jax.Array | PrefixMask | None = None,
    local_mask: jax.Array | None = None,
    place: jax.Array | None = None,
  ) -> tuple[jax.Array, None]:
    """drop_path: fraction of examples that skip a branch (Huang et al. 2016); needs the rng 'dropout'.

    is_local: bool scalar, True for a block that attends through `local_mask` instead of `mask`.
    """
    c = self.config
    if is_local is not None:
      assert isinstance(mask, jax.Array) and local_mask is not None, 'a stack with local blocks is given both masks'  # noqa: PT018
      mask = jnp.where(is_local, local_mask, mask)
    # A scan body must return the dtype of its carry, so the residual stream has one dtype throughout.
    x = with_logical_constraint(x, 'batch', 'tokens', 'width')
    norm1, norm2 = (block_norm(c, name) for name in ('norm1', 'norm2'))
    attention = Attention(c, name='attention')
    if c.parallel:
      y = norm1(x)
      y = attention(y, angles=angles, mask=mask) + Mlp(c, name='mlp')(y)
      return with_logical_constraint(
        x + self._branch(y, 'scale1', drop_path).astype(x.dtype), 'batch', 'tokens', 'width'
      ), None
    y = attention(x if c.post_norm else norm1(x), angles=angles, mask=mask, place=place)
    y = block_norm(c, 'attention_norm')(y) if c.branch_norm else y
    x = x + self._branch(y, 'scale1', drop_path).astype(x.dtype)
    x = norm1(x).astype(x.dtype) if c.post_norm else x
    y = Mlp(c, name='mlp')(x if c.post_norm else norm2(x))
    y = block_norm(c, 'mlp_norm')(y) if c.branch_norm else y
    x = x + self._branch(y, 'scale2', drop_path).astype(x.dtype)
    x = norm2(x).astype(x.dtype) if c.post_norm else x
    return with_logical_constraint(x, 'batch', 'tokens', 'width'), None

  def _branch(self, y: jax.Array, scale: str, drop_path: jax.Array | None) -> jax.Array:
    if self.config.layer_scale is not None:
      init = nn.initializers.constant(self.config.layer_scale)
      y = y * self.param(scale, init, (y.shape[-1],)).astype(y.dtype)
    if self.train and self.config.dropout:
      y = nn.Dropout(self.config.dropout, deterministic=False)(y)
    if drop_path is not None:
      y = stochastic_depth(y, drop_path, self.make_rng('dropout'))
    return y


@dataclasses.dataclass(frozen=True)
class Stack:
  """A stack of `depth` blocks; parameters have a leading axis of that length.

  drop_path increases linearly from 0 in the first block to its full value in the last; without `drop_path_rise` it is
  the same in all (DeiT III, Touvron et al. 2022). `unroll` is the number of blocks per scan iteration: all of them
  (True) give the fastest program and the longest compile time, 1 the reverse; parameters and results are the same.
  """

  depth: int
  block: BlockConfig
  drop_path: float = 0.0
  remat: Remat = 'none'
  unroll: Unroll = 1
  drop_path_rise: bool = True

  def __call__(
    self,
    x: jax.Array,
    *,
    angles: jax.Array | None = None,
    mask: jax.Array | PrefixMask | None = None,
    local_mask: jax.Array | None = None,
    place: jax.Array | None = None,
    train: bool = False,
  ) -> jax.Array:
    """Runs x [B, T, D] through the blocks; to be called in the compact method that owns the scope `blocks`.

    local_mask: mask of every second block, beginning with the first (Gemma 2); None: `mask` is that of all.
    """
    rates, local = self.drop_rates(train), local_mask is not None
    in_axes = (nn.broadcast if rates is None else 0, 0 if local else nn.broadcast, *(nn.broadcast,) * 4)
    blocks = scan_layers(Block, self.depth, in_axes, remat=self.remat, unroll=self.unroll)(
      self.block, train, name='blocks'
    )
    is_local = jnp.arange(self.depth) % 2 == 0 if local else None
    return blocks(x, rates, is_local, angles, mask, local_mask, place)[0]

  def drop_rates(self, train: bool) -> jax.Array | None:
    """Rates of stochastic depth by block, float32 [depth]; None where there is none."""
    if not train or not self.drop_path:
      return None
    return jnp.linspace(0.0 if self.drop_path_rise else self.drop_path, self.drop_path, self.depth)
