"""Attention over tokens that are split over devices (Liu et al. 2023, Ring Attention with Blockwise Transformers).

Queries stay, keys and values rotate; the softmax is accumulated online (Milakov & Gimelshein 2018). The backward pass
is a second rotation that recomputes the weights, so nothing of size Q x T is stored.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fmcv_jax.parallel.ring import ring_scan
from fmcv_jax.parallel.rules import num_shards, shard_mapped

# Maximum number of keys processed at once.
BLOCK = 512

LOWEST = float(jnp.finfo(jnp.float32).min)


def ring_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array | None = None, *, causal: bool = False
) -> jax.Array:
  """query [B, Q, H, K], key and value [B, T, H, K], valid [B, T] bool (None: all) -> [B, Q, H, K].

  Any number of tokens: they are padded to a multiple of the number of devices.
  """
  queries, tokens = query.shape[1], key.shape[1]
  missing = -tokens % num_shards('tokens')
  if missing:
    valid = jnp.ones(key.shape[:2], bool) if valid is None else valid
    key, value, valid = (_padded(x, missing) for x in (key, value, valid))
  return _attention(causal, _padded(query, -queries % num_shards('tokens')), key, value, valid)[:, :queries]


def _padded(x: jax.Array, missing: int) -> jax.Array:
  return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(causal: bool, query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array | None) -> jax.Array:
  return _forward(causal, query, key, value, valid)[0]


def _axes(query: jax.Array) -> Any:
  each = ('batch', 'tokens', 'heads' if query.shape[2] > 1 else None, None)
  return each, each[:3], each[:2]


def _over_heads(function: Callable[..., Any]) -> Callable[..., Any]:
  """`function` of [Q, ...] arrays, vmapped over B and H of [B, Q, H, ...]; the last argument has no heads."""

  def of_heads(*args: Any) -> Any:
    return jax.vmap(function, in_axes=(1,) * (len(args) - 1) + (None,), out_axes=1)(*args)

  return jax.vmap(of_heads)


def _forward(causal: bool, query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array | None) -> Any:
  each, of_heads, of_tokens = _axes(query)

  def local(query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array | None) -> Any:
    def body(carry: Any, items: Any, _: None) -> Any:
      best, total, mixed = carry
      start, (key, value, valid) = items
      logits = _logits(causal, query, key, valid, start)[0]
      higher = jnp.maximum(best, logits.max(axis=1))
      weights, fade = jnp.exp(logits - higher[:, None]), jnp.exp(best - higher)
      mixed = mixed * fade[:, None] + _product('qt,tk->qk', weights.astype(value.dtype), value)
      return (higher, total * fade + weights.sum(axis=1), mixed), None

    rows = len(query)
    carry = (jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros((rows, value.shape[1])))
    (best, total, mixed), _ = ring_scan(body, carry, (key, value, valid), None, jnp.add, axis='tokens', block=BLOCK)
    return (mixed / total[:, None]).astype(query.dtype), best, total

  run = shard_mapped(_over_heads(local), inputs=(each, each, each, of_tokens), outputs=(each, of_heads, of_heads))
  y, best, total = run(query, key, value, valid)
  return y, (query, key, value, valid, y, best, total)


def _backward(causal: bool, saved: Any, cotangent: jax.Array) -> Any:
  each, of_heads, of_tokens = _axes(saved[0])

  def local(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    y: jax.Array,
    best: jax.Array,
    total: jax.Array,
    cotangent: jax.Array,
    valid: jax.Array | None,
  ) -> Any:
    # Subtracted from the gradient of each logit (softmax backward).
    mean = jnp.sum(y.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=1, keepdims=True)

    def body(by_query: Any, items: Any, gradients: Any) -> Any:
      start, (key, value, valid) = items
      by_key, by_value = gradients
      logits, visible = _logits(causal, query, key, valid, start)
      weights = jnp.exp(logits - best[:, None]) / total[:, None]
      by_value += _product('qt,qk->tk', weights.astype(cotangent.dtype), cotangent)
      by_logit = weights * (_product('qk,tk->qt', cotangent, value) - mean) * query.shape[1] ** -0.5
      by_logit = jnp.where(visible, by_logit, 0).astype(query.dtype)
      by_key += _product('qt,qk->tk', by_logit, query)
      return by_query + _product('qt,tk->qk', by_logit, key), (by_key, by_value)

    gradients = (jnp.zeros(key.shape), jnp.zeros(value.shape))
    by_query = jnp.zeros(query.shape)
    by_query, (by_key, by_value) = ring_scan(
      body, by_query, (key, value, valid), gradients, jnp.add, axis='tokens', block=BLOCK
    )
    return by_query.astype(query.dtype), by_key.astype(key.dtype), by_value.astype(value.dtype)

  query, key, value, valid, y, best, total = saved
  run = shard_mapped(
    _over_heads(local),
    inputs=(each, each, each, each, of_heads, of_heads, each, of_tokens),
    outputs=(each, each, each),
  )
  return *run(query, key, value, y, best, total, cotangent, valid), None


_attention.defvjp(_forward, _backward)


def _logits(
  causal: bool, query: jax.Array, key: jax.Array, valid: jax.Array | None, start: Any
) -> tuple[jax.Array, jax.Array]:
  """Float32 logits [Q, c] of one block of keys, and their mask (bool, broadcastable; True where not masked)."""
  logits = _product('qk,tk->qt', query, key) * query.shape[1] ** -0.5
  visible = jnp.ones((1, 1), bool) if valid is None else valid[None]
  if causal:
    visible = visible & (jnp.arange(len(query))[:, None] >= start + jnp.arange(len(key)))
  return jnp.where(visible, logits, LOWEST), visible


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
