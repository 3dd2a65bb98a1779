"""Sampling options shared by the Python API, the command line and the evaluators."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fmcv_jax.diffusion.process import Process
from fmcv_jax.diffusion.samplers import SOLVERS, Spacing, coefficients, sampling_timesteps
from fmcv_jax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
  """Sampling options; raises UserError, starting with the option name, for an invalid value.

  steps                 default 20. Number of solver steps
  guidance              default 4.0; 1 disables it. Classifier-free guidance scale (Ho & Salimans 2022), one or one per
                        image
  interval              (low, high). Guidance is applied only at times in between (Kynkaanniemi et al. 2024)
  rescale               0 to 1. CFG rescale factor phi (Lin et al. 2024)
  negative              negative prompt, in place of the empty text
  solver                one of SOLVERS
  spacing               timestep spacing, see `sampling_timesteps`
  seed                  0 to 2^31 - 1
  strength              above 0, at most 1. Denoising strength of an edit (Meng et al. 2022, SDEdit)
  control_scale         ControlNet conditioning scale
  control_preprocessed  True if the control images are control maps (edges, say); otherwise control maps are computed
                        from them, as in training
  """

  steps: int = 20
  guidance: float | tuple[float, ...] = 4.0
  interval: tuple[float, float] | None = None
  rescale: float = 0.0
  negative: str = ''
  solver: str = 'dpm++'
  spacing: Spacing = 'trailing'
  seed: int = 0
  strength: float = 0.6
  control_scale: float = 1.0
  control_preprocessed: bool = False

  def __post_init__(self) -> None:
    if np.ndim(self.guidance):  # hashable, whatever sequence was given
      object.__setattr__(self, 'guidance', tuple(float(scale) for scale in np.asarray(self.guidance).ravel()))
    if self.interval is not None:
      object.__setattr__(self, 'interval', tuple(self.interval))
    if self.solver not in SOLVERS:
      raise UserError(f'solver: unknown {self.solver!r}; {did_you_mean(self.solver, SOLVERS)}')
    if self.steps < 1:
      raise UserError(f'steps: {self.steps} is not at least 1')
    if not 0 <= self.seed < 2**31:
      raise UserError(f'seed: {self.seed} is not from 0 to 2147483647')
    if self.interval is not None and not self.interval[0] <= self.interval[1]:
      raise UserError(f'interval: {self.interval[0]} to {self.interval[1]}; give the lower time first')
    if not 0 <= self.rescale <= 1:
      raise UserError(f'rescale: {self.rescale} is not from 0 to 1')
    if not np.isfinite(self.guidance).all():
      raise UserError(f'guidance: {self.guidance} is not finite')
    if not 0 < self.strength <= 1:
      raise UserError(f'strength: {self.strength} is not above 0 and at most 1')
    if not math.isfinite(self.control_scale):
      raise UserError(f'control_scale: {self.control_scale} is not finite')

  def changed(self, changes: Mapping[str, Any], function: str, others: Iterable[str] = ()) -> 'SamplingOptions':
    """These options with the changes of a call of a public `function`; TypeError for a name that is not an option.

    others  the other keyword arguments of the function, for the error
    """
    names = [field.name for field in dataclasses.fields(self)]
    for name in changes:
      if name == 'strength' and function != 'edit':
        raise TypeError(f'{function}: unexpected option {name!r}; it is one of edit')
      if name not in names:
        raise TypeError(f'{function}: unexpected option {name!r}; {did_you_mean(name, [*names, *others])}')
    return dataclasses.replace(self, **changes)

  @property
  def guided(self) -> bool:
    """True if the guidance scale of any image differs from 1."""
    return bool((np.asarray(self.guidance) != 1).any())

  def times(self, process: Process, strength: float = 1.0) -> tuple[float, ...]:
    """Times of the steps, starting at `strength`; UserError if the solver does not support the process."""
    try:
      times = sampling_timesteps(process, self.steps, self.spacing)
      times = times[len(times) - max(1, round(strength * len(times))) :]
      coefficients(process, SOLVERS[self.solver], times)
    except ValueError as error:
      raise UserError(str(error)) from error
    return tuple(times)
