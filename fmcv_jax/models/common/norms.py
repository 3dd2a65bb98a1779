"""Normalization of the last axis."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def layer_norm(eps: float, dtype: str, name: str, *, bias: bool = True) -> nn.LayerNorm:
  """LayerNorm over the last axis with a scale and, by default, a bias; statistics float32, output in `dtype`."""
  # The variance is E[x^2] - E[x]^2 in float32, in one pass over the tokens (docs/plan.md has the measured gain).
  # Cancellation is small, since the mean over the channels is small compared to their standard deviation.
  return nn.LayerNorm(epsilon=eps, dtype=jnp.dtype(dtype), use_bias=bias, name=name)


class RMSNorm(nn.Module):
  """RMSNorm (Zhang & Sennrich 2019) of the last axis, x / rms(x) * (1 + scale), computed in float32.

  `scale` is stored as the difference from 1, as in Gemma, so that weight decay acts towards the identity.
  """

  eps: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param('scale', nn.initializers.zeros, (x.shape[-1],))
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * (1 + scale)).astype(self.dtype)


def l2_normalize(x: jax.Array, axis: int = -1) -> jax.Array:
  """x scaled to unit length along an axis, in float32; zero vectors stay zero, with a finite gradient."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=axis, keepdims=True), 1e-12))
