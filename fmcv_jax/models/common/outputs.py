"""Outputs of image networks, the linear head on them, and the protocols by which networks offer maps of an image."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax

from fmcv_jax.models.common.layers import Dense, dense


class Features(NamedTuple):
  """Outputs of a network: output [B, out] (of the head, or pooled), pooled [B, D], tokens [B, T, D].

  head_outputs: for a network with two heads, the outputs of the class and distillation tokens, whose mean is `output`.
  queries: [B, N, D], outputs of an attention pooling with several queries, without the first, which is `pooled`; or the
  tokens that joined the last blocks (see late_tokens.py).
  taps: [K, B, T, D], normalized tokens after the blocks that the caller asked for.
  """

  output: jax.Array
  pooled: jax.Array
  tokens: jax.Array
  head_outputs: tuple[jax.Array, jax.Array] | None = None
  queries: jax.Array | None = None
  taps: jax.Array | None = None


@runtime_checkable
class PatchNetwork(Protocol):
  """A network whose `tokens` are `prefix` special tokens and then the patches, row by row, of `patch_size` pixels."""

  patch_size: Any
  prefix: Any
  apply: Any


@runtime_checkable
class AttentionNetwork(PatchNetwork, Protocol):
  """A transformer of images that sows the queries, keys and values of its blocks.

  Its parameters are 'blocks' (of the scanned `stack`), the last 'norm', and 'map_pool' or 'query_pool', and
  'head', if it has them.

  sows_projections  True
  pool              'cls' (the token 0), 'gap', 'map', or 'queries' of a ViT
  num_classes       outputs of the head, 0 without one; `head_bias` is True if it has a bias
  """

  sows_projections: Any
  pool: Any
  stack: Any
  width: Any
  num_classes: Any
  head_bias: Any


@runtime_checkable
class AveragePooledNetwork(Protocol):
  """A network whose output is a linear 'head' of `num_classes` (0: none) on the mean of its `tokens`.

  average_pooled  True
  patch_size      pixels along the side of each token; the last ones may stand for fewer
  """

  average_pooled: Any
  num_classes: Any
  patch_size: Any
  apply: Any


def linear_head(outputs: int, bias: bool, dtype: str, name: str = 'head') -> Dense:
  """Linear head on pooled features: with bias a zero-initialized classifier; without, an embedding projection."""
  init = nn.initializers.zeros if bias else nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
  return dense(outputs, dtype, name, bias=bias, init=init)
