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
  """The machine was asked to stop; the state is saved and the same command goes on from it."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """The numbers of a loop, in steps: its length, and how often it does what else it does."""

  steps: int
  log_every: int
  save_every: int
  evaluate_every: Callable[[int], bool]
  max_streak: int


def run(
  step_fn: StepFn,
  state: TrainState,
  batches: Iterator[Any],
  plan: LoopConfig,
  *,
  batch_size: int,
  step_flops: float,
  peak_flops: float | None,
  evaluate: Callable[[TrainState, int], dict[str, float]],
  position: Callable[[], dict[str, Any]],
  checkpointer: Checkpointer,
  writer: Writer | None,
  clock: GoodputTimer,
) -> TrainState:
  """Trains from `state` to plan.steps and returns the final state, which is saved.

  `batches` yields device arrays; `position` describes the data position after the batches taken; `evaluate` gives
  figures of the state at a step; step_flops and peak_flops are those of all devices; `clock` is told where the time
  goes. Raises Preempted after a SIGTERM (or the cluster's preemption notice) once the state is saved, and UserError
  after plan.max_streak bad steps in a row.
  """
  step = int(state.step)
  figures: dict[str, float] = {}
  stop = PreemptionGuard()
  window = ThroughputMeter(step)
  last_metrics, skipped = None, float(state.skipped)

  def save():
    with clock.during('save'):
      checkpointer.save(state, {'data': position(), 'figures': figures}, figures)

  clock.begin(step)
  while step < plan.steps:
    with window.waiting(), clock.during('input'):
      batch = next(batches)
    with clock.during('compile' if last_metrics is None else 'train'):
      state, metrics = step_fn(state, batch)
      step += 1
      # One step stays in flight while the host prepares the next; more would only queue up memory.
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
      if values['streak'] >= plan.max_streak:
        save()
        checkpointer.wait()
        first = step - int(values['streak']) + 1
        raise UserError(
          f'step {step}: loss or gradient was not finite since step {first}; the state before it is saved; look at the '
          f'learning rate, or at that step: fmcv replay --workdir {checkpointer.directory.parent} --at {first}'
        )
    if plan.evaluate_every(step):
      with clock.during('evaluate'):
        figures = evaluate(state, step)
      if writer and figures:
        writer.evaluation(step, figures)
      window.restart(step)
    stopping = stop.requested(step)
    if step % plan.save_every == 0 or step == plan.steps or stopping:
      save()
      window.restart(step)
    if step % plan.log_every == 0 or step == plan.steps or stopping:
      clock.write(step)
    if stopping and step < plan.steps:
      checkpointer.wait()
      raise Preempted(f'asked to stop at step {step}: saved; the same command goes on from here')
  checkpointer.wait()
  return state


class ThroughputMeter:
  """Throughput between two reports, and the share of that time spent waiting for input."""

  def __init__(self, step: int):
    self.restart(step)

  def restart(self, step: int) -> None:
    """Begins anew: what lies between two windows (evaluation, saving) is no training time."""
    self.step, self.start, self.waited = step, time.monotonic(), 0.0

  def waiting(self) -> 'ThroughputMeter':
    return self

  def __enter__(self):
    self._since = time.monotonic()

  def __exit__(self, *_):
    self.waited += time.monotonic() - self._since

  def close(self, step: int, batch: int, step_flops: float, peak_flops: float | None) -> dict[str, float]:
    seconds, steps = time.monotonic() - self.start, step - self.step
    figures = {
      'steps_per_second': steps / seconds,
      'images_per_second': steps * batch / seconds,
      'input_wait': self.waited / seconds,
    }
    if peak_flops:
      figures['utilization'] = steps * step_flops / seconds / peak_flops
    self.restart(step)
    return {name: value for name, value in figures.items() if math.isfinite(value)}


class PreemptionGuard:
  """Whether this run was asked to stop: by SIGTERM in one process, by jax's preemption notice among several."""

  def __init__(self):
    self._asked = False
    if jax.process_count() == 1:
      signal.signal(signal.SIGTERM, self._ask)

  def _ask(self, *_):
    self._asked = True

  def requested(self, step: int) -> bool:
    """Called by every process after every step; all of them answer True at the same step."""
    if jax.process_count() == 1:
      return self._asked
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)
