"""`fmcv replay`: re-runs one training step, and reports its records and the values that are not finite."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmcv_jax.console import make_console
from fmcv_jax.data.loader import TrainLoader, record_keys, resume
from fmcv_jax.errors import UserError
from fmcv_jax.parallel.batches import to_devices
from fmcv_jax.parallel.rules import path_of
from fmcv_jax.run import Run
from fmcv_jax.train.checkpoint import Checkpointer
from fmcv_jax.train.gradients import gradients
from fmcv_jax.train.state import TrainState

SHOWN = 8


def run(workdir: str, at: int, overrides: Sequence[str] = ()) -> None:
  """Prints loss, records and the non-finite parts of the gradient of step `at`, counted from 1.

  Starts from the latest checkpoint before the step, or from a later one if all steps in between were skipped, so that
  the parameters are the same. Raises UserError if there is neither.
  """
  console = make_console()
  replayed = Run.reopen(workdir, overrides)
  e = replayed.experiment
  state, examples = _before(replayed, at)
  loader = TrainLoader(
    e.data,
    batch=e.train.batch_size,
    seed=e.seed,
    fields=tuple(replayed.batch_shapes),
    tokenizer=e.tokenizer,
    start=examples,
  )
  batches = (to_devices(local, replayed.placement) for local in loader)
  try:
    step_fn = replayed.train_step()
    for batch in itertools.islice(batches, at - 1 - int(state.step)):
      state, _ = step_fn(state, batch)
    batch = next(batches)
  finally:
    loader.close()

  loss, norm, bad = _measured(replayed, state, batch)
  console.print(f'step {at}: loss {loss:g}, gradient norm {norm:g}', highlight=False)
  keys = record_keys(e.data, e.seed, (at - 1) * e.train.batch_size, e.train.batch_size)
  console.print(f'its records: {_some(keys)}', highlight=False)
  if not bad and np.isfinite(loss):
    overflow = '' if np.isfinite(norm) else ', but it is so large that its square is not'
    console.print(f'all of the gradient is finite{overflow}', highlight=False)
    return
  console.print(f'not finite in the gradient of: {_some(bad)}', highlight=False)
  jax.config.update('jax_debug_nans', True)
  jax.config.update('jax_debug_infs', True)
  try:
    _measured(replayed, state, batch)
    console.print('no single operation produced a non-finite value when run op by op', highlight=False)
  except FloatingPointError as error:
    console.print(f'first in: {str(error).strip().splitlines()[0]}', highlight=False)
  finally:
    jax.config.update('jax_debug_nans', e.debug.nans)
    jax.config.update('jax_debug_infs', False)


def _before(run: Run, at: int) -> tuple[TrainState, int]:
  """The state before step `at`, and the number of examples consumed until then."""
  checkpointer = Checkpointer(run.workdir, run.experiment.checkpoint, create=False)
  try:
    steps = checkpointer.steps()
    if before := [step for step in steps if step < at]:
      state, kept = checkpointer.restore(run.abstract_state, run.shardings, before[-1])
      return state, resume(kept['data'], run.experiment.data, run.experiment.seed)
    for step in steps:
      state, kept = checkpointer.restore(run.abstract_state, run.shardings, step)
      if step - int(state.streak) < at:
        examples = resume(kept['data'], run.experiment.data, run.experiment.seed)
        back = step - (at - 1)
        first = jax.device_put(jnp.int32(at - 1), run.shardings.step)
        return state.replace(step=first), examples - back * run.experiment.train.batch_size
  finally:
    checkpointer.close()
  raise UserError(f'{run.workdir}: step {at} is older than the available checkpoints: {", ".join(map(str, steps))}')


def _measured(run: Run, state: TrainState, batch: Any) -> tuple[float, float, list[str]]:
  """The loss, the norm of the gradient, and the paths of the parameters whose gradient is not finite."""
  e = run.experiment

  @jax.jit
  def measured(state: TrainState, batch: Any) -> Any:
    with run.placement.active():
      rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
      loss, _, _, gradient = gradients(e.objective, state.params, batch, rng, state.extra, e.train.grad_accum_steps)
      return loss, optax.tree.norm(gradient), jax.tree.map(lambda x: jnp.isfinite(x).all(), gradient)

  loss, norm, finite = measured(state, batch)
  flat, _ = jax.tree_util.tree_flatten_with_path(finite)
  return float(loss), float(norm), [path_of(path) for path, good in flat if not good]


def _some(names: Sequence[str]) -> str:
  more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
  return ', '.join(names[:SHOWN]) + more
