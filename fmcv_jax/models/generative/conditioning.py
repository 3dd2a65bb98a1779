"""Embeddings of timesteps and classes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmcv_jax.models.common.layers import HIDDEN_AXES, dense


def timestep_embedding(time: jax.Array, dim: int, *, include_last: bool = False) -> jax.Array:
  """time [B] -> float32 [B, dim]: cosines, then sines, at frequencies from 1 to 1 / 10,000 (Vaswani et al. 2017).

  include_last: the last frequency is 1 / 10,000 itself, as in Ho et al. 2020, not the one that precedes it.
  """
  half = dim // 2
  # In float64: an error of a frequency is multiplied by the time, up to 1000.
  frequency = 10_000.0 ** -(np.arange(half) / (half - include_last))
  angles = time.astype(jnp.float32)[:, None] * frequency.astype(np.float32)
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class MLPEmbedder(nn.Module):
  """[B, D] -> [B, width], through one hidden layer with SiLU."""

  logical_axes = (*HIDDEN_AXES,)

  width: int
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.initializers.normal(0.02)
    x = dense(self.width, self.dtype, 'hidden1', init=init)(x)
    return dense(self.width, self.dtype, 'hidden2', init=init)(jax.nn.silu(x))


class ClassEmbedding(nn.Module):
  """int32 [B] -> [B, width]; row `num_classes` stands for 'no class'."""

  logical_axes = ((r'(.*/)?classes/embedding', (None, 'embed')),)

  num_classes: int
  width: int

  @nn.compact
  def __call__(self, label: jax.Array) -> jax.Array:
    table = self.param('embedding', nn.initializers.normal(0.02), (self.num_classes + 1, self.width))
    return jnp.take(table, label, axis=0)
