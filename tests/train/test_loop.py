"""The order of saving, evaluating and stopping, on a loop whose step only counts."""

import os
import signal
import types

import jax
import jax.numpy as jnp
import pytest

from fmcv_jax.train import loop
from fmcv_jax.train.goodput import GoodputTimer
from fmcv_jax.train.loop import LoopConfig, Preempted
from fmcv_jax.train.state import TrainState


class Recorder:
  """A checkpointer that notes what it is asked, in order."""

  def __init__(self, events):
    self.events, self.saved = events, set()
    self.directory = types.SimpleNamespace(parent='run')

  def save(self, state, run):
    if int(state.step) not in self.saved:
      self.saved.add(int(state.step))
      self.events.append(f'save {int(state.step)}')

  def record(self, step, metrics):
    self.events.append(f'record {step}')

  def wait(self):
    pass


def state_at(step):
  zero = jnp.zeros((), jnp.int32)
  return TrainState(
    step=jnp.asarray(step), skipped=zero, streak=zero, rng=zero, params={}, opt_state={}, extra={}, ema=None
  )


def run(evaluate, *, start=0, first=False, steps=4):
  events = []
  zeros = {'skipped': jnp.zeros(()), 'streak': jnp.zeros(()), 'loss': jnp.zeros(())}

  def step(state, batch):
    return state.replace(step=state.step + 1), zeros

  def evaluated(state, at, raise_if_stopped):
    events.append(f'evaluate {at}')
    return evaluate(raise_if_stopped)

  handler = signal.getsignal(signal.SIGTERM)
  try:
    loop.run(
      jax.jit(step),
      state_at(start),
      iter(lambda: {}, None),
      LoopConfig(steps, 100, lambda s: s % 4 == 0, lambda s: s % 2 == 0, 100, evaluate_first=first),
      batch_size=1,
      step_flops=0.0,
      peak_flops=None,
      evaluate=evaluated,
      position=dict,
      checkpointer=Recorder(events),
      writer=None,
      clock=GoodputTimer(None),
    )
  except (Preempted, ValueError) as error:
    events.append(type(error).__name__)
  finally:
    signal.signal(signal.SIGTERM, handler)
  return events


def test_a_state_is_saved_before_it_is_evaluated_and_a_failing_evaluator_loses_nothing():
  assert run(lambda _: {'val/top1': 1.0}) == ['evaluate 2', 'record 2', 'save 4', 'evaluate 4', 'record 4']

  def fails(_):
    raise ValueError

  assert run(fails, start=2) == ['save 4', 'evaluate 4', 'ValueError']


def test_a_preemption_inside_an_evaluator_is_noticed_and_the_evaluation_is_repeated():
  def stopped(raise_if_stopped):
    os.kill(os.getpid(), signal.SIGTERM)
    raise_if_stopped()
    raise AssertionError('did not stop')

  assert run(stopped) == ['evaluate 2', 'save 2', 'Preempted']
  assert run(lambda _: {'val/top1': 1.0}, start=2, first=True)[:2] == ['evaluate 2', 'record 2']


@pytest.mark.parametrize('steps', [3, 4])
def test_the_last_step_is_saved(steps):
  assert f'save {steps}' in run(lambda _: {}, steps=steps)
