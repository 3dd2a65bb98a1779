"""Layers in sequence as one scan over stacked parameters, with rematerialization."""

from typing import Any, Literal

import flax.linen as nn
import jax

from fmcv_jax.bounds import PositiveInt

Remat = Literal['none', 'dots', 'full']
Unroll = PositiveInt | bool  # as in jax.lax.scan: number of steps to unroll, True for all

_NAMED = jax.checkpoint_policies.save_only_these_names('dense', 'attention')


def _saves_matmuls(primitive: Any, *args: Any, **params: Any) -> bool:
  """Remat policy: saves results of dense layers (with their bias), attention and convolutions, the slow operations.

  Norms, activations and attention logits are recomputed: they are fast to compute but large.
  """
  return primitive is jax.lax.conv_general_dilated_p or _NAMED(primitive, *args, **params)


# Values that are saved for the backward pass; the rest is recomputed. 'none' recomputes nothing.
REMAT_POLICIES = {'dots': _saves_matmuls, 'full': jax.checkpoint_policies.nothing_saveable}


def rematerialize(module: type[nn.Module], remat: Remat, *, in_scan: bool = False) -> Any:
  """The module with rematerialization: the backward pass recomputes the values that `remat` does not save.

  XLA's common subexpression elimination would undo this. A scan prevents it by itself; elsewhere it takes an
  optimization barrier, which also prevents fusion.
  """
  if remat == 'none':
    return module
  return nn.remat(module, policy=REMAT_POLICIES[remat], prevent_cse=not in_scan)


def scan_layers(
  module: type[nn.Module], length: int, in_axes: Any, *, remat: Remat = 'none', unroll: Unroll = 1
) -> Any:
  """`length` modules in sequence, each (carry, *inputs) -> (carry, output); parameters have an axis of that length.

  in_axes: for each input 0, if it has such an axis as well, or nn.broadcast; `unroll` as in `Stack`.
  """
  side_by_side = length if unroll is True else min(unroll, length)
  return nn.scan(
    rematerialize(module, remat, in_scan=side_by_side < length),
    variable_axes={'params': 0, 'batch_stats': 0, 'intermediates': 0, 'probes': 0, 'cache': 0},
    split_rngs={'params': True, 'dropout': True},
    in_axes=in_axes,
    length=length,
    unroll=side_by_side,
  )
