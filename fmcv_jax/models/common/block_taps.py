"""Outputs of chosen blocks of a stack, for networks that read several depths of an encoder."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.models.common.layers import Block, Stack
from fmcv_jax.models.common.scan import scan_layers


class TappedBlock(Block):
  """A block whose carry also holds outputs of blocks: (x, kept [K, B, T, D]), with the place of its own output."""

  @override
  def __call__(self, carry: Any, slot: jax.Array, *inputs: Any) -> tuple[Any, None]:  # type: ignore[override]
    x, kept = carry
    x, _ = super().__call__(x, *inputs)
    return (x, kept.at[slot].set(x, mode='drop')), None


def run_with_taps(
  stack: Stack, x: jax.Array, taps: Sequence[int], *, angles: jax.Array | None = None, train: bool = False
) -> tuple[jax.Array, jax.Array]:
  """The stack on x [B, T, D], and the outputs of the blocks `taps`, [len(taps), B, T, D].

  taps  increasing numbers of blocks, from 1 to the depth of the stack

  To be called in the compact method that owns the scope `blocks`, as the stack itself.
  """
  if list(taps) != sorted(set(taps)) or not taps or taps[0] < 1 or taps[-1] > stack.depth:
    raise ValueError(f'taps: expected increasing numbers of blocks from 1 to {stack.depth}, got {tuple(taps)}')
  # Each block writes where the next tap is kept, which that one overwrites; behind the last one nothing is kept.
  slots = jnp.searchsorted(jnp.array(taps), jnp.arange(1, stack.depth + 1))
  rates, kept = stack.drop_rates(train), jnp.zeros((len(taps), *x.shape), x.dtype)
  in_axes = (0, nn.broadcast if rates is None else 0, *(nn.broadcast,) * 5)
  blocks = scan_layers(TappedBlock, stack.depth, in_axes, remat=stack.remat, unroll=stack.unroll)(
    stack.block, train, name='blocks'
  )
  found: Any = blocks((x, kept), slots, rates, None, angles, None, None, None)[0]
  return found
