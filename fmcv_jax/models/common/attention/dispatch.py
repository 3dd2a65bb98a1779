"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1): one function, several implementations.

Letters in shapes: B batch, Q queries, T keys, H heads, K head dimension.
"""

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp

from fmcv_jax.models.common.attention.fused import cudnn_attention, splash_attention
from fmcv_jax.models.common.attention.masks import PrefixMask
from fmcv_jax.models.common.attention.ring import ring_attention
from fmcv_jax.models.common.attention.single_tile import fits, shares_keys, short_attention
from fmcv_jax.parallel.rules import mesh_axes, platform
from fmcv_jax.shapes import AnyArray, Bool, Float

ArrayOrShape = AnyArray | jax.ShapeDtypeStruct
Backend = Literal['auto', 'xla', 'short', 'splash', 'cudnn', 'ring']

# Number of tokens from which the tiled kernel is faster than plain einsums on TPU, despite padding to whole tiles.
SPLASH_FROM = 1024
SHORT_FROM = 16  # queries; with fewer the rows of the kernel are mostly padding

logger = logging.getLogger(__name__)


def attention(
  query: Float[AnyArray, 'batch queries heads dim'],
  key: Float[AnyArray, 'batch keys kv_heads dim'],
  value: Float[AnyArray, 'batch keys kv_heads dim'],
  *,
  causal: bool = False,
  mask: Bool[AnyArray, '...'] | PrefixMask | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  backend: Backend = 'auto',
) -> Float[jax.Array, 'batch queries heads dim']:
  """query [B, Q, H, K], key and value [B, T, H, K] -> [B, Q, H, K].

  mask: bool, broadcastable to [B, H, Q, T], True where attention is allowed, or a PrefixMask. Logits and softmax are
  float32 for any input dtype. Fully masked queries return the mean of values instead of NaN.

  Keys and values may have fewer heads, of which each serves a group of adjacent query heads (Ainslie et al. 2023).

  scale     factor of the logits, default K ** -0.5
  softcap   bounds the logits to softcap * tanh(logits / softcap), before the mask
  backend   'xla': plain einsums. 'short': a Pallas TPU kernel that keeps all logits of a head in VMEM (interpreted on
            other platforms). 'splash': tiled TPU kernel for many tokens. 'cudnn': flash attention on GPUs, for 16-bit
            inputs. 'ring': keys and values rotate over the mesh axes that split `tokens`. 'auto': selected by platform,
            mesh and shapes; the reason is logged once.
            All but 'xla' require masks that are the same for every query, [B or 1, 1, 1, T]; 'short' and 'splash'
            take a PrefixMask and a softcap too. Without an active placement the backend is always 'xla'.
  """
  if backend == 'auto':
    backend, reason = choose(query, key, mask, softcap)
    if platform() is not None:
      _log_once(f'attention over {key.shape[1]} tokens: {backend} ({reason})')
  if platform() is None:
    backend = 'xla'
  prefix = mask.prefix if isinstance(mask, PrefixMask) else None
  if backend == 'xla':
    dense = mask.dense() if isinstance(mask, PrefixMask) else mask
    return xla_attention(query, key, value, causal=causal, mask=dense, scale=scale, softcap=softcap)
  if backend in ('cudnn', 'ring') and (softcap is not None or prefix is not None):
    raise ValueError(f'attention={backend!r} has no softcap and no mask of a prefix; use xla')
  valid = None
  if mask is not None and not isinstance(mask, PrefixMask):
    if not _of_keys(mask):
      raise ValueError(f'attention={backend!r} takes masks of shape [B, 1, 1, T], got {mask.shape}; use xla')
    valid = jnp.broadcast_to(mask[:, 0, 0], (query.shape[0], key.shape[1]))
  if backend != 'ring' and mesh_axes('tokens'):
    raise ValueError(f'attention={backend!r} needs all tokens on each device, but the mesh splits them; use ring')
  if scale is not None:  # the kernels multiply by K ** -0.5 themselves
    query = (query.astype(jnp.float32) * (scale * query.shape[-1] ** 0.5)).astype(query.dtype)
  if not (backend == 'short' and shares_keys(key.shape[2], key.shape[3])):
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
  if backend in ('cudnn', 'ring'):
    function = cudnn_attention if backend == 'cudnn' else ring_attention
    return function(query, key, value, valid, causal=causal)
  kernel = short_attention if backend == 'short' else splash_attention
  return kernel(query, key, value, valid, causal=causal, prefix=prefix, softcap=softcap)


def choose(
  query: ArrayOrShape, key: ArrayOrShape, mask: ArrayOrShape | PrefixMask | None, softcap: float | None = None
) -> tuple[Backend, str]:
  """Backend that 'auto' selects, and the reason, from the shapes and dtypes of the arguments and the placement."""
  tokens, dim = key.shape[1], key.shape[-1]
  if mask is not None and not isinstance(mask, PrefixMask) and not _of_keys(mask):
    return 'xla', 'its mask differs from query to query'
  if platform() != 'tpu' or mesh_axes('tokens'):
    if softcap is not None:
      return 'xla', 'its logits are bounded by a softcap'
    if isinstance(mask, PrefixMask):
      return 'xla', 'its mask is that of a prefix'
  if mesh_axes('tokens'):
    return 'ring', 'the mesh splits the tokens'
  if platform() == 'tpu':
    if query.shape[1] >= SHORT_FROM and query.dtype.itemsize == 2 and fits(query.shape[1], tokens, *query.shape[2:]):
      return 'short', "TPU, 16 bits, and few enough tokens for a head's whole logits"
    if tokens >= SPLASH_FROM:
      return 'splash', f'TPU, {SPLASH_FROM} tokens or more'
    return 'xla', f'TPU, but too few queries, or {query.dtype}, or heads of {dim} for a kernel'
  if platform() in ('gpu', 'cuda'):
    if query.dtype.itemsize != 2:
      return 'xla', f'GPU, but {query.dtype} where cuDNN wants 16 bits'
    if dim > 128 or dim % 8:
      return 'xla', f'GPU, but a head dimension of {dim} where cuDNN wants a multiple of 8, at most 128'
    if mask is not None and (tokens % 2 or query.shape[1] % 2):
      return 'xla', 'GPU, but a mask over an odd number of tokens, which cuDNN does not take'
    return 'cudnn', 'GPU'
  return 'xla', 'the only one without a TPU or GPU'


def xla_attention(
  query: Float[AnyArray, 'batch queries heads dim'],
  key: Float[AnyArray, 'batch keys kv_heads dim'],
  value: Float[AnyArray, 'batch keys kv_heads dim'],
  *,
  causal: bool = False,
  mask: Bool[AnyArray, '...'] | None = None,
  scale: float | None = None,
  softcap: float | None = None,
) -> Float[jax.Array, 'batch queries heads dim']:
  """Plain einsums, fused by XLA; fully masked queries return the mean of all values."""
  batch, queries, heads, dim = query.shape
  groups = key.shape[2]
  if groups == heads:
    logits = jnp.einsum('bqhk,bthk->bhqt', query, key, preferred_element_type=jnp.float32)
  else:
    grouped = query.reshape(batch, queries, groups, heads // groups, dim)
    logits = jnp.einsum('bqghk,btgk->bghqt', grouped, key, preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, heads, queries, -1)
  logits = logits * (dim**-0.5 if scale is None else scale)
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  if causal:
    triangle = jnp.tril(jnp.ones((queries, key.shape[1]), bool))
    mask = triangle if mask is None else mask & triangle
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  if groups == heads:
    return jnp.einsum('bhqt,bthk->bqhk', weights, value)
  weights = weights.reshape(batch, groups, heads // groups, queries, -1)
  return jnp.einsum('bghqt,btgk->bqghk', weights, value).reshape(batch, queries, heads, -1)


def _of_keys(mask: ArrayOrShape) -> bool:
  return mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1


@functools.cache
def _log_once(line: str) -> None:
  logger.info(line)
