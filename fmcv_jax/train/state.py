"""The state of a run: one pytree, whose shardings are known before anything is allocated."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from fmcv_jax.objectives.base import Objective
from fmcv_jax.parallel.parameter_axes import Rows, class_name, trace_init
from fmcv_jax.parallel.rules import Placement, path_of


class TrainState(flax.struct.PyTreeNode):
  """Everything a step reads and writes; restoring it restores the run.

  step      int32, steps taken (skipped ones too)
  skipped   int32, steps whose loss or gradient was not finite and which therefore changed nothing
  streak    int32, how many of the latest steps were skipped in a row
  rng       uint32 key data; a step's randomness is fold_in(rng, step), so it needs no update
  ema       moving average of params, or None
  """

  step: jax.Array
  skipped: jax.Array
  streak: jax.Array
  rng: jax.Array
  params: Any
  opt_state: Any
  extra: Any
  ema: Any

  @property
  def eval_params(self) -> Any:
    """The parameters to evaluate and to ship: the average where one is kept."""
    return self.params if self.ema is None else self.ema


def init_state(objective: Objective, tx: optax.GradientTransformation, seed: int, *, ema: bool) -> TrainState:
  """The state before the first step. Pure: wrap it in eval_shape for the shapes, in jit for sharded arrays."""
  key = jax.random.key(seed)
  params, extra = objective.init(jax.random.fold_in(key, 0))
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    skipped=jnp.zeros((), jnp.int32),
    streak=jnp.zeros((), jnp.int32),
    rng=jax.random.key_data(jax.random.fold_in(key, 1)),
    params=params,
    opt_state=tx.init(params),
    extra=extra,
    ema=jax.tree.map(jnp.copy, params) if ema else None,
  )


def trace_state(
  objective: Objective, tx: optax.GradientTransformation, seed: int, *, ema: bool
) -> tuple[TrainState, Rows]:
  """(shapes and dtypes of the state before the first step, rows of axes of its parameters); nothing is allocated."""
  state, rows = trace_init(lambda: init_state(objective, tx, seed, ema=ema))
  return state, {**rows, class_name(type(objective)): objective.logical_axes}


def state_shardings(state: TrainState, placement: Placement, rows: Rows, frozen: tuple[str, ...] = ()) -> TrainState:
  """Shardings of an abstract state, leaf by leaf; it and the rows are those of `trace_state`.

  The parameter rules place `params`, `ema`, the subtrees `frozen` of `extra`, and every leaf of the optimizer's or of
  `extra` that mirrors a parameter: same path at its end, same shape. What mirrors none (counters, factored moments,
  centers) is small and replicated.
  """
  params = placement.parameters(state.params, rows)
  flat, _ = jax.tree_util.tree_flatten_with_path(state.params)
  mirrors = {
    (path_of(key_path), leaf.shape): sharding
    for (key_path, leaf), sharding in zip(flat, jax.tree.leaves(params), strict=True)
  }

  def mirrored(key_path: Any, leaf: Any) -> Any:
    parts = path_of(key_path).split('/')
    for start in range(len(parts)):
      sharding = mirrors.get(('/'.join(parts[start:]), leaf.shape))
      if sharding is not None:
        return sharding
    return placement.replicated()

  scalar: Any = placement.replicated()
  return TrainState(
    step=scalar,
    skipped=scalar,
    streak=scalar,
    rng=scalar,
    params=params,
    opt_state=jax.tree_util.tree_map_with_path(mirrored, state.opt_state),
    extra={
      **jax.tree_util.tree_map_with_path(mirrored, state.extra),
      **{name: placement.parameters(state.extra[name], rows) for name in frozen},
    },
    ema=None if state.ema is None else params,
  )
