"""FLOP count of the matrix products and convolutions of a function, from its jaxpr."""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import numpy as np
from jax.extend import core


def matmul_flops(fn: Callable[..., Any], *args: Any) -> int:
  """Floating-point operations, two per multiply-add, of all matrix products and convolutions in fn(*args).

  args are pytrees of arrays or ShapeDtypeStructs; nothing is computed. Loops count every iteration, conditionals the
  most expensive branch, a shard_map all devices, a Pallas kernel every point of its grid (including tiles that a causal
  mask skips), and rematerialization the recomputation: the count is of executed FLOPs, so for model FLOPs (MFU) count
  the same function with remat='none'. Padding of a convolution counts as input, as in the tables of papers; the zeros
  that a transposed convolution inserts between inputs do not count.

  Not counted: elementwise operations, reductions, gathers, sorts, factorizations. Unused results count if they are in
  the jaxpr. A matrix product whose number of executions the jaxpr does not determine (a while loop, a grid of unknown
  size) is a ValueError.
  """
  # A jitted function is unwrapped: inside of another jit, compiler options are not allowed.
  closed = fn.trace(*args).jaxpr if isinstance(fn, jax.stages.Wrapped) else jax.make_jaxpr(fn)(*args)
  return _of_jaxpr(closed.jaxpr)


def _of_jaxpr(jaxpr: core.Jaxpr) -> int:
  return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: core.JaxprEqn) -> int:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    lhs = _shape(equation.invars[0])
    return 2 * prod(_shape(equation.outvars[0])) * prod(lhs[axis] for axis in contracted)
  if name == 'conv_general_dilated':
    return 2 * _convolution(equation)
  if name == 'ragged_dot_general':
    raise ValueError(f'matmul_flops does not support {name}; count an equivalent function without it')

  inner = [_of_jaxpr(jaxpr) for jaxpr in core.jaxprs_in_params(params)]
  if not any(inner):
    return 0
  if name == 'pallas_call':
    grid = params['grid_mapping'].grid
    if not all(isinstance(size, int) for size in grid):
      raise ValueError(f'matmul_flops: a Pallas kernel on the grid {grid}, whose size is not static')
    return prod(grid) * _of_jaxpr(params['jaxpr'])
  if name == 'scan':
    return params['length'] * inner[0]
  if name == 'cond':
    return max(inner)
  if name == 'shard_map':  # its body has the shapes of one device
    return prod(params['mesh'].shape[axis] for axis in params['newly_manual_axes']) * inner[0]
  if name == 'while':
    raise ValueError(
      'matmul_flops: a matrix product in a while loop, whose number of passes is not known before it runs; '
      'use lax.scan, or a fori_loop with constant bounds'
    )
  if len(inner) != 1:
    raise ValueError(f'matmul_flops does not know which of the {len(inner)} functions in {name} run, or how often')
  return inner[0]  # jit, remat, custom_jvp, custom_vjp


def _convolution(equation: core.JaxprEqn) -> int:
  """Multiply-adds: outputs x channels of one group x taps on inputs (not on the zeros of a transposed convolution)."""
  params = equation.params
  _, rhs, out = params['dimension_numbers']
  kernel, shape = _shape(equation.invars[1]), _shape(equation.outvars[0])
  pairs = 1
  for i in range(len(shape) - 2):
    size, taps = shape[out[2 + i]], kernel[rhs[2 + i]]
    start = np.arange(size) * params['window_strides'][i] - params['padding'][i][0]
    position = start[:, None] + np.arange(taps) * params['rhs_dilation'][i]
    pairs *= int(np.count_nonzero(position % params['lhs_dilation'][i] == 0))
  return shape[out[0]] * shape[out[1]] * kernel[rhs[1]] * pairs


def _shape(variable: Any) -> tuple[int, ...]:
  return variable.aval.shape
