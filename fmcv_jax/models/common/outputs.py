"""What an image network returns, and the linear head that reads it."""

from typing import NamedTuple

import flax.linen as nn
import jax

from fmcv_jax.models.common.layers import Dense, dense


class Features(NamedTuple):
  """What a network makes of its input: output [B, out] (the head's, or pooled), pooled [B, D], tokens [B, T, D].

  num_heads: of a network with two, the class token's output and the distillation token's, whose mean is `output`.
  """

  output: jax.Array
  pooled: jax.Array
  tokens: jax.Array
  num_heads: tuple[jax.Array, jax.Array] | None = None


def linear_head(outputs: int, bias: bool, dtype: str, name: str = 'head') -> Dense:
  """The head on pooled features: with bias a classifier, born zero; without, a projection into an embedding space."""
  init = nn.initializers.zeros if bias else nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
  return dense(outputs, dtype, name, bias=bias, init=init)
