"""Adaptive layer normalization (Peebles & Xie 2023): the shared parts of DiT and MMDiT."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.models.common.layers import BlockConfig, dense
from fmcv_jax.models.common.patches import unpatchify

MODULATION_AXES = (
  (r'(.*/)?modulation/kernel', ('embed', None)),
  (r'(.*/)?modulation/bias', (None,)),
)


def modulation(c: jax.Array, parts: int, width: int, dtype: str) -> list[jax.Array]:
  """`parts` vectors [B, 1, D] from the condition c [B, D]; zero at first."""
  y = dense(parts * width, dtype, 'modulation', init=nn.initializers.zeros)(jax.nn.silu(c))
  return jnp.split(y[:, None], parts, axis=-1)


def modulated_layer_norm(x: jax.Array, config: BlockConfig, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """LayerNorm with scale and shift from the condition (adaLN)."""
  return layer_norm_no_affine(config)(x) * (1 + scale) + shift


def layer_norm_no_affine(config: BlockConfig) -> nn.LayerNorm:
  """LayerNorm without parameters."""
  return nn.LayerNorm(epsilon=config.eps, dtype=jnp.dtype(config.dtype), use_bias=False, use_scale=False)


def final_layer(
  x: jax.Array, c: jax.Array, config: BlockConfig, grid: tuple[int, int], patch: int, outputs: int
) -> jax.Array:
  """Tokens x [B, T, D] of a grid, conditioned on c [B, D] -> [B, H, W, outputs], float32; zero at first.

  To be called in the compact method that owns the scopes `modulation` and `head`.
  """
  shift, scale = modulation(c, 2, x.shape[-1], config.dtype)
  x = modulated_layer_norm(x, config, shift, scale)
  x = dense(patch**2 * outputs, config.dtype, 'head', init=nn.initializers.zeros)(x)
  return unpatchify(x.astype(jnp.float32), grid, patch)
