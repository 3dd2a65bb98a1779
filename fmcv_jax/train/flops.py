"""How much arithmetic a function is: its matrix products and convolutions, counted from its jaxpr, not measured."""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import numpy as np
from jax.extend import core


def matmul_flops(fn: Callable[..., Any], *args: Any) -> int:
  """Floating-point operations, two per multiply-add, of all matrix products and convolutions in fn(*args).

  args are pytrees of arrays or ShapeDtypeStructs; nothing is computed. Loops count each of their passes, conditionals
  their dearest branch, a shard_map all of its devices, a Pallas kernel each point of its grid (tiles that a causal mask
  skips too), and rematerialization what it computes again: the count is of what is executed, so model FLOPs (MFU) are
  those of a twin with remat='none'. A convolution's padding counts as input, as in the papers' tables; the holes that a
  transposed convolution puts between its inputs do not.

  Not counted: elementwise operations, reductions, gathers, sorts, factorizations. Results that nobody reads count as
  long as they are in the jaxpr. A matrix product whose number of passes or of operations the jaxpr does not tell
  (a while loop, a grid of unknown size) is a ValueError, never a guess.
  """
  # What is jitted is looked at itself: inside of another jit, compiler options would be refused.
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
    raise ValueError(f'matmul_flops cannot see into {name}; count a twin of the function that does without it')

  inner = [_of_jaxpr(jaxpr) for jaxpr in core.jaxprs_in_params(params)]
  if not any(inner):
    return 0
  if name == 'pallas_call':
    grid = params['grid_mapping'].grid
    if not all(isinstance(size, int) for size in grid):
      raise ValueError(f'matmul_flops: a Pallas kernel on the grid {grid}, whose size is not known before it runs')
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
  """Multiply-adds: outputs x what each sums over, which are channels of one group x taps that meet no hole."""
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
