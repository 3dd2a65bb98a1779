"""Attention by kernels that keep their logits on the chip: Pallas' splash attention on TPUs, cuDNN's on GPUs.

Every device runs the kernel on its own examples and heads.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fmcv_jax.parallel.rules import platform, shard_mapped

LANES = 128  # tokens come in multiples of a TPU vector register's lanes
TILE = 1024  # at most so many queries and keys are met at once
WIDE = 256  # of wider heads half as many, or they do not fit the vector memory


def splash_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  valid: jax.Array | None = None,
  *,
  causal: bool = False,
  prefix: jax.Array | None = None,
  softcap: float | None = None,
) -> jax.Array:
  """query [B, Q, H, K], key and value [B, T, H, K], valid [B, T] bool (None: all) -> [B, Q, H, K].

  prefix: bool [B, T], Q = T, the tokens that all attend to; attention after them is causal. The kernel knows one mask
  for all examples, so it runs twice: over the keys of the prefix for its queries, and causally for the others.

  softcap: bounds the scaled logits to softcap * tanh(logits / softcap).

  Tokens are padded to whole tiles. On other platforms than TPU the kernel is interpreted, which is slow.
  """
  if prefix is not None:
    within = splash_attention(query, key, value, prefix, softcap=softcap)
    after = splash_attention(query, key, value, causal=True, softcap=softcap)
    return jnp.where(prefix[:, :, None, None], within, after)

  def local(query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array | None) -> jax.Array:
    queries, tokens = query.shape[1], key.shape[1]
    rows, columns = (_tiles(count, query.shape[-1]) for count in (queries, tokens))
    if valid is None and math.prod(columns) > tokens:
      valid = jnp.ones(key.shape[:2], bool)
    kernel = _splash(query.shape[2], rows, columns, causal, softcap, platform() != 'tpu')
    scaled = (query.astype(jnp.float32) * query.shape[-1] ** -0.5).astype(query.dtype)
    query, key, value = (
      jnp.pad(x, ((0, 0), (0, math.prod(tiles) - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)
      for x, tiles in ((scaled, rows), (key, columns), (value, columns))
    )
    if valid is None:
      y = jax.vmap(kernel)(query, key, value)
    else:
      # A query sees the keys of its own segment: 1 for all queries and for the valid keys.
      segments = jnp.pad(valid.astype(jnp.int32), ((0, 0), (0, math.prod(columns) - tokens)))
      own = jnp.ones((len(query), math.prod(rows)), jnp.int32)
      y = jax.vmap(kernel)(query, key, value, _segment_ids(own, segments))
    return y.swapaxes(1, 2)[:, :queries].astype(value.dtype)

  return on_devices(local, query, key, value, valid)


def cudnn_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array | None = None, *, causal: bool = False
) -> jax.Array:
  """query [B, Q, H, K], key and value [B, T, H, K], valid [B, T] bool (None: all) -> [B, Q, H, K]; 16-bit inputs."""

  def local(query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array | None) -> jax.Array:
    mask = None if valid is None else valid[:, None, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal, implementation='cudnn')

  return on_devices(local, query, key, value, valid)


def on_devices(
  local: Callable[..., jax.Array], query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array | None
) -> jax.Array:
  """local(query, key, value, valid) by each device, of its own examples and heads."""
  each, shared = (('batch', None, 'heads' if x.shape[2] > 1 else None, None) for x in (query, key))
  return shard_mapped(local, inputs=(each, shared, shared, ('batch', None)), outputs=each)(query, key, value, valid)


def _tiles(tokens: int, dim: int) -> tuple[int, int]:
  """(number of tiles, tokens of one): as few as may be, as small as may be, in whole lanes."""
  count = -(-tokens // (TILE if dim <= WIDE else TILE // 2))
  return count, -(-tokens // (count * LANES)) * LANES


def _segment_ids(query: jax.Array, key: jax.Array) -> Any:
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

  return splash.SegmentIds(query, key)


def _splash(
  heads: int, rows: tuple[int, int], columns: tuple[int, int], causal: bool, softcap: float | None, interpret: bool
) -> Any:
  # Imported here: Pallas takes a second to load, and few runs need it.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  shape = (math.prod(rows), math.prod(columns))
  mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
  q, kv = rows[1], columns[1]
  sizes = splash.BlockSizes(
    block_q=q,
    block_kv=kv,
    block_q_dkv=q,
    block_kv_dkv=kv,
    block_q_dq=q,
    block_kv_dq=kv,
  )
  heads_mask = masks.MultiHeadMask([mask] * heads)
  return splash.make_splash_mha(
    heads_mask,
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=softcap,
    interpret=interpret,
  )
