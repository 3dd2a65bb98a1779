"""Outputs of image networks, and the linear head on them."""

from typing import NamedTuple

import flax.linen as nn
import jax

from fmcv_jax.models.common.layers import Dense, dense


class Features(NamedTuple):
  """Outputs of a network: output [B, out] (of the head, or pooled), pooled [B, D], tokens [B, T, D].

  head_outputs: for a network with two heads, the outputs of the class and distillation tokens, whose mean is `output`.
  """

  output: jax.Array
  pooled: jax.Array
  tokens: jax.Array
  head_outputs: tuple[jax.Array, jax.Array] | None = None


def linear_head(outputs: int, bias: bool, dtype: str, name: str = 'head') -> Dense:
  """Linear head on pooled features: with bias a zero-initialized classifier; without, an embedding projection."""
  init = nn.initializers.zeros if bias else nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
  return dense(outputs, dtype, name, bias=bias, init=init)
