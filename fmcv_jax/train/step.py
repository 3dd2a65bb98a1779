"""The one train step of every objective: a single jit with donated, sharded state."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from fmcv_jax.objectives.base import Objective
from fmcv_jax.parallel.rules import Placement
from fmcv_jax.train.gradients import gradients
from fmcv_jax.train.state import TrainState

StepFn = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]

# Weights that FSDP splits are gathered ahead of their products. The compiler of TPUs would pass the pieces round, one
# small product after another ("windowed einsum"): DiT-XL/2 on v5e:4x4 then takes three times as many cycles.
NO_WINDOWED_EINSUM = {'xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000'}


def make_train_step(
  objective: Objective,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  placement: Placement,
  shardings: TrainState,
  batch_shardings: Any,
  *,
  microbatches: int = 1,
  ema: float | None = None,
) -> StepFn:
  """Builds step(state, batch) -> (state, metrics), jitted, with the old state's memory reused for the new.

  A step whose loss or gradient norm is not finite changes nothing but the counters. Metrics are float32 scalars,
  replicated: the objective's own, loss, gradient and parameter norms, learning rate, skipped and streak.
  """

  def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
    with placement.active():
      rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
      loss, metrics, aux, gradient = gradients(objective, state.params, batch, rng, state.extra, microbatches)
      norm = optax.tree.norm(gradient)
      finite = jnp.isfinite(loss) & jnp.isfinite(norm)

      updates, opt_state = tx.update(gradient, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
      extra = objective.update_extra(state.extra, params, aux, state.step)
      average = state.ema if ema is None else moving_average(state.ema, params, ema, state.step)

      def choose(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

      new_state = TrainState(
        step=state.step + 1,
        skipped=state.skipped + ~finite,
        streak=jnp.where(finite, 0, state.streak + 1),
        rng=state.rng,
        params=choose(params, state.params),
        opt_state=choose(opt_state, state.opt_state),
        extra=choose(extra, state.extra),
        ema=choose(average, state.ema),
      )
      # A state of another form than the last would be compiled anew at each step.
      chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
      metrics = {
        **metrics,
        'loss': loss,
        'gradient_norm': norm,
        'parameter_norm': optax.tree.norm(new_state.params),
        'learning_rate': schedule(state.step),
        'skipped': new_state.skipped,
        'streak': new_state.streak,
      }
      return new_state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

  on_tpu = placement.mesh.devices.flat[0].platform == 'tpu'
  return jax.jit(
    step,
    in_shardings=(shardings, batch_shardings),
    out_shardings=(shardings, placement.replicated()),
    donate_argnums=0,
    compiler_options=NO_WINDOWED_EINSUM if on_tpu and placement.mesh.shape['tensor'] == 1 else None,
  )


def moving_average(average: Any, params: Any, decay: float, step: jax.Array) -> Any:
  """average <- d * average + (1 - d) * params, d = min(decay, (1 + t) / (10 + t)): young averages follow fast."""
  d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return jax.tree.map(lambda a, p: a * d + p * (1 - d), average, params)
