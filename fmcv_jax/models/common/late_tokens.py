"""Tokens that join a stack of blocks before its last ones, as the queries of EoMT (Kerssies et al. 2025) do."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmcv_jax.models.common.layers import Block, Stack
from fmcv_jax.models.common.scan import REMAT_POLICIES


class LateTokens(NamedTuple):
  """Tokens that are put in front of the others before the last `blocks` blocks.

  tokens  float32 [N, D]
  mask    called before each of these blocks with its number, from 0, and the normalized tokens [B, N + T, D]: returns
          the attention that the block allows, bool [B, 1, N + T, N + T], or None for all
  """

  tokens: jax.Array
  blocks: int
  mask: Callable[[int, jax.Array], jax.Array | None]


def run_with_late_tokens(
  stack: Stack,
  params: Any,
  x: jax.Array,
  late: LateTokens,
  norm: Callable[[jax.Array], jax.Array],
  *,
  angles: jax.Array | None,
  rng: jax.Array | None,
) -> jax.Array:
  """Tokens [B, T, D] -> [B, N + T, D], the late tokens first.

  params  those of the whole stack, with a leading axis of its depth: the first blocks are one scan, the last ones are
          unrolled, since a mask depends on the tokens
  norm    normalizes tokens for `late.mask`
  rng     for dropout and stochastic depth in training; None for inference
  """
  first, train = stack.depth - late.blocks, rng is not None
  rates, keys = stack.drop_rates(train), None if rng is None else jax.random.split(rng, stack.depth)
  inputs = params, rates, keys

  def apply(
    x: jax.Array, inputs: Any, angles: jax.Array | None, mask: jax.Array | None = None
  ) -> tuple[jax.Array, None]:
    params, rate, key = inputs
    block = Block(stack.block, train, parent=None)
    rngs = {} if key is None else {'dropout': key}
    out: Any = block.apply({'params': params}, x, rate, None, angles, mask, rngs=rngs)
    return out

  def rematerialized(in_scan: bool) -> Any:
    if stack.remat == 'none':
      return apply
    return jax.checkpoint(apply, policy=REMAT_POLICIES[stack.remat], prevent_cse=not in_scan)

  if first:
    side_by_side = first if stack.unroll is True else min(stack.unroll, first)
    body = functools.partial(rematerialized(side_by_side < first), angles=angles)
    x, _ = jax.lax.scan(body, x, jax.tree.map(lambda leaf: leaf[:first], inputs), unroll=side_by_side)
  tokens = jnp.broadcast_to(late.tokens.astype(x.dtype), (len(x), *late.tokens.shape))
  x = jnp.concatenate([tokens, x], axis=1)
  if angles is not None:  # late tokens have no position
    angles = jnp.concatenate([jnp.zeros((len(late.tokens), angles.shape[-1]), angles.dtype), angles])
  for number in range(late.blocks):
    mask = late.mask(number, norm(x))
    own = jax.tree.map(lambda leaf, place=first + number: leaf[place], inputs)
    x, _ = rematerialized(in_scan=False)(x, own, angles, mask)
  return x
