"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1): one function, several implementations."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def xla_attention(query, key, value, *, causal: bool = False, mask: jax.Array | None = None) -> jax.Array:
  """Plain einsums, which XLA fuses: query [B, Q, H, K], key and value [B, T, H, K] -> [B, Q, H, K].

  mask: bool, broadcastable to [B, H, Q, T], True where a query may look. Logits and softmax are float32 whatever the
  inputs are. A query that may look nowhere gets the mean of all values (never NaN).
  """
  logits = jnp.einsum('bqhk,bthk->bhqt', query, key, preferred_element_type=jnp.float32)
  logits = logits * (query.shape[-1] ** -0.5)
  if causal:
    triangle = jnp.tril(jnp.ones((query.shape[1], key.shape[1]), bool))
    mask = triangle if mask is None else mask & triangle
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  return jnp.einsum('bhqt,bthk->bqhk', weights, value)


ATTENTION: dict[str, Callable[..., jax.Array]] = {'xla': xla_attention}
