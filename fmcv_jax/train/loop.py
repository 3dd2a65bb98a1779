"""The one training loop: for each batch step, log, evaluate, save, stop."""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from fmcv_jax.errors import UserError
from fmcv_jax.train.checkpoint import Checkpointer
from fmcv_jax.train.goodput import GoodputTimer
from fmcv_jax.train.metrics import Writer
from fmcv_jax.train.state import TrainState
from fmcv_jax.train.step import StepFn


class Preempted(Exception):
  """The run was asked to stop; the state is saved, and the same command resumes from it."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """Length of a loop and its intervals, in steps.

  saves, evaluates   True for steps followed by a checkpoint, an evaluation; the last step is always saved
  evaluate_first     True to evaluate the initial state, if a stop prevented that evaluation
  """

  steps: int
  log_every: int
  saves: Callable[[int], bool]
  evaluates: Callable[[int], bool]
  max_nonfinite_steps: int
  evaluate_first: bool = False


def run(
  step_fn: StepFn,
  state: TrainState,
  batches: Iterator[Any],
  plan: LoopConfig,
  *,
  batch_size: int,
  step_flops: float,
  peak_flops: float | None,
  evaluate: Callable[[TrainState, int, Callable[[], None]], dict[str, float]],
  position: Callable[[], dict[str, Any]],
  checkpointer: Checkpointer,
  writer: Writer | None,
  clock: GoodputTimer,
) -> TrainState:
  """Trains from `state` to plan.steps and returns the final state, which is saved.

  `batches` yields device arrays; `position` returns the data position after the consumed batches; `evaluate` returns
  the metrics of the state at a step, and calls its third argument between batches to check for a stop (it then raises
  Preempted); step_flops and peak_flops are totals of all devices; `clock` records the time by cause. A state is saved
  before it is evaluated, so an evaluator that fails or is stopped loses no step. Raises Preempted after a SIGTERM (or
  the cluster's preemption notice) once the state is saved, and UserError after plan.max_nonfinite_steps consecutive
  steps with a non-finite loss or gradient.
  """
  step = int(state.step)
  stop = PreemptionGuard()
  window = ThroughputMeter(step)
  last_metrics, skipped = None, float(state.skipped)

  def save() -> None:
    with clock.during('save'):
      checkpointer.save(state, {'data': position()})

  def raise_if_stopped() -> None:
    if stop.requested_here():
      save()
      checkpointer.wait()
      raise Preempted(f'asked to stop while evaluating step {step}: saved; the same command resumes from here')

  def run_evaluators() -> None:
    with clock.during('evaluate'):
      metrics = evaluate(state, step, raise_if_stopped)
    if metrics:
      checkpointer.record(step, metrics)
      if writer:
        writer.evaluation(step, metrics)

  clock.begin(step)
  if plan.evaluate_first:
    run_evaluators()
    window.restart(step)
  while step < plan.steps:
    with window.waiting(), clock.during('input'):
      batch = next(batches)
    with clock.during('compile' if last_metrics is None else 'train'):
      state, metrics = step_fn(state, batch)
      step += 1
      # One step stays in flight while the host prepares the next; more would only take more memory.
      jax.block_until_ready(last_metrics)
    last_metrics = metrics

    if step % plan.log_every == 0 or step == plan.steps:
      with clock.during('train'):
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
      speed = window.close(step, batch_size, step_flops, peak_flops)
      if writer:
        writer.train(step, {**values, **speed})
        if values['skipped'] > skipped:
          writer.note(f'{values["skipped"] - skipped:.0f} steps up to {step} were skipped: loss or gradient not finite')
      skipped = values['skipped']
      if values['streak'] >= plan.max_nonfinite_steps:
        save()
        checkpointer.wait()
        first = step - int(values['streak']) + 1
        raise UserError(
          f'step {step}: loss or gradient was not finite since step {first}; the state before it is saved; look at the '
          f'learning rate, or at that step: fmcv replay --workdir {checkpointer.directory.parent} --at {first}'
        )
    if plan.saves(step) or step == plan.steps:
      save()
      window.restart(step)
    if plan.evaluates(step) and not stop.requested_here():
      run_evaluators()
      window.restart(step)
    stopping = stop.requested(step)
    if stopping:
      save()
    if step % plan.log_every == 0 or step == plan.steps or stopping:
      clock.write(step)
    if stopping and step < plan.steps:
      checkpointer.wait()
      raise Preempted(f'asked to stop at step {step}: saved; the same command resumes from here')
  checkpointer.wait()
  return state


class ThroughputMeter:
  """Throughput between two reports, and the fraction of that time spent waiting for input."""

  def __init__(self, step: int):
    self.restart(step)

  def restart(self, step: int) -> None:
    """Starts a new window: time between two windows (evaluation, saving) does not count."""
    self.step, self.start, self.waited = step, time.monotonic(), 0.0

  def waiting(self) -> 'ThroughputMeter':
    """A `with` block in which the loop waits for input."""
    return self

  def __enter__(self) -> None:
    self._since = time.monotonic()

  def __exit__(self, *_: Any) -> None:
    self.waited += time.monotonic() - self._since

  def close(self, step: int, batch: int, step_flops: float, peak_flops: float | None) -> dict[str, float]:
    """Throughput of the window that ends at `step`: metrics by name, with MFU if the peak FLOP/s of the devices are
    known."""
    seconds, steps = time.monotonic() - self.start, step - self.step
    figures = {
      'steps_per_second': steps / seconds,
      'images_per_second': steps * batch / seconds,
      'data_wait_fraction': self.waited / seconds,
    }
    if peak_flops:
      figures['utilization'] = steps * step_flops / seconds / peak_flops
    self.restart(step)
    return {name: value for name, value in figures.items() if math.isfinite(value)}


class PreemptionGuard:
  """Detects requests to stop: SIGTERM in a single process, jax's preemption notice in multi-process runs."""

  def __init__(self) -> None:
    self._asked = False
    if jax.process_count() == 1:
      signal.signal(signal.SIGTERM, self._ask)

  def _ask(self, *_: Any) -> None:
    self._asked = True

  def requested_here(self) -> bool:
    """True if a single process was asked to stop; several processes stop together, at the end of a step."""
    return self._asked

  def requested(self, step: int) -> bool:
    """True if the run was asked to stop; every process calls it after every step, and all return the same value."""
    if jax.process_count() == 1:
      return self._asked
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)
