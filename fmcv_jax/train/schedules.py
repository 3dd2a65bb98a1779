"""Learning-rate schedules."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from typing_extensions import override

from fmcv_jax.bounds import NonNegativeFloat, NonNegativeInt, PositiveInt


class Schedule(abc.ABC):
  """A learning rate by step: linear warm-up from 0 to `peak_lr` over `warmup_steps`, then a decay."""

  peak_lr: NonNegativeFloat
  warmup_steps: NonNegativeInt

  def __call__(self, total_steps: int) -> optax.Schedule:
    """The schedule of a run of `total_steps`.

    The decay reaches its end one step after the last: of 10 steps, 2 of them warm-up, a cosine's last is 0.038 of the
    peak.
    """
    if not self.peak_lr:
      raise ValueError('peak_lr is 0: nothing would be learned; set it above 0')
    if self.warmup_steps >= total_steps:
      raise ValueError(f'warmup_steps {self.warmup_steps} must be smaller than the number of steps, {total_steps}')
    if not self.warmup_steps:
      return self.decay(total_steps)
    # The first step has rate peak / warmup_steps, not 0: a step that changes nothing is a step wasted.
    warmup = optax.linear_schedule(self.peak_lr / self.warmup_steps, self.peak_lr, self.warmup_steps - 1 or 1)
    return optax.join_schedules([warmup, self.decay(total_steps - self.warmup_steps)], [self.warmup_steps])

  @abc.abstractmethod
  def decay(self, steps: int) -> optax.Schedule:
    """The rate over the `steps` after warm-up."""


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
  """Half a cosine from `peak_lr` to `end` (Loshchilov & Hutter 2017)."""

  peak_lr: NonNegativeFloat
  warmup_steps: NonNegativeInt = 0
  end: NonNegativeFloat = 0.0

  @override
  def decay(self, steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(self.peak_lr, steps, alpha=self.end / self.peak_lr)


@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
  """A straight line from `peak_lr` to `end`."""

  peak_lr: NonNegativeFloat
  warmup_steps: NonNegativeInt = 0
  end: NonNegativeFloat = 0.0

  @override
  def decay(self, steps: int) -> optax.Schedule:
    return optax.linear_schedule(self.peak_lr, self.end, steps)


@dataclasses.dataclass(frozen=True)
class Rsqrt(Schedule):
  """peak_lr / sqrt(1 + t / timescale), then linearly to 0 over the last `cooldown_steps` (Zhai et al. 2022)."""

  peak_lr: NonNegativeFloat
  warmup_steps: NonNegativeInt = 0
  timescale: PositiveInt = 10_000
  cooldown_steps: NonNegativeInt = 0

  @override
  def decay(self, steps: int) -> optax.Schedule:
    if self.cooldown_steps > steps:
      raise ValueError(f'cooldown_steps {self.cooldown_steps} is longer than the {steps} steps after warm-up')

    def rate(step: Any) -> jax.Array:
      cooldown = jnp.clip((steps - step) / max(self.cooldown_steps, 1), 0, 1) if self.cooldown_steps else 1.0
      return self.peak_lr * jax.lax.rsqrt(1 + step / self.timescale) * cooldown

    return rate
