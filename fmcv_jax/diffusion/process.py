"""The forward process x_t = alpha_t x_0 + sigma_t eps, parameterizations of the prediction, and loss weights.

Time is on the scale that networks read: it rises with the noise, from 0 to STEPS (but for 'edm').
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fmcv_jax.bounds import PositiveFloat
from fmcv_jax.shapes import AnyArray, Float, Key, Shaped

ScheduleName = Literal['linear', 'scaled_linear', 'cosine', 'zero_snr', 'flow', 'edm']
Prediction = Literal['noise', 'image', 'velocity', 'flow', 'edm']
WeightName = Literal['simple', 'min_snr', 'p2', 'sigmoid', 'flow']
TimesName = Literal['uniform', 'logit_normal', 'log_normal']

STEPS = 1000


@functools.cache
def alphas_cumprod(schedule: ScheduleName) -> np.ndarray:
  """alpha^2 of the tabulated schedules, float64 [STEPS], for times 0, 1, ..."""
  if schedule == 'cosine':  # Nichol & Dhariwal 2021, eq. 17, betas clipped at 0.999
    f = np.cos((np.arange(STEPS + 1) / STEPS + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))
  if schedule == 'linear':  # Ho et al. 2020, section 4
    return np.cumprod(1 - np.linspace(1e-4, 0.02, STEPS))
  table = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, STEPS) ** 2)  # Rombach et al. 2022, released models
  if schedule == 'scaled_linear':
    return table
  # Lin et al. 2024, algorithm 1: shifted so that the signal is zero at the end, scaled to the same start.
  alpha = np.sqrt(table)
  return np.square((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1]))


@functools.cache
def log_ratios(schedule: ScheduleName) -> np.ndarray:
  """log(sigma / alpha) of the tabulated schedules, float64 [STEPS]; at most 18, where alpha is 1e-8: none at all."""
  table = alphas_cumprod(schedule)
  with np.errstate(divide='ignore'):
    return np.minimum(0.5 * np.log((1 - table) / table), 18.0)


@dataclasses.dataclass(frozen=True)
class Process:
  """A noise schedule and what the network predicts.

  schedule          'linear' (DDPM), 'cosine' (iDDPM), 'scaled_linear' (LDM, Stable Diffusion), 'zero_snr' (Lin et al.
                    2024): tables at integer times, log(sigma / alpha) is interpolated between them.
                    'flow': alpha = 1 - t, sigma = t, where t = time / STEPS (rectified flow, Liu et al. 2023).
                    'edm': sigma / alpha = exp(4 time / STEPS), scaled to unit variance for data of standard deviation
                    `data_std` (Karras et al. 2022).
  prediction        'noise': eps. 'image': x_0. 'velocity': alpha eps - sigma x_0 (Salimans & Ho 2022). 'flow':
                    eps - x_0. 'edm': F of Karras et al. 2022, eq. 7.
  learned_variance  the network's second half of channels places the variance of a step of ancestral sampling between
                    its bounds (Nichol & Dhariwal 2021, eq. 15); for tabulated schedules
  shift             moves the times of 'flow' towards noise, for larger images (Esser et al. 2024, eq. 23)
  """

  schedule: ScheduleName = 'scaled_linear'
  prediction: Prediction = 'noise'
  learned_variance: bool = False
  shift: PositiveFloat = 1.0
  data_std: PositiveFloat = 0.5

  def __post_init__(self) -> None:
    if self.schedule == 'zero_snr' and self.prediction == 'noise':
      raise ValueError('prediction: noise is undefined at zero SNR; use velocity with zero_snr')
    if self.shift != 1 and self.schedule != 'flow':
      raise ValueError('shift is for the schedule flow')
    if self.learned_variance and not self.tabulated:
      raise ValueError('learned_variance needs a tabulated schedule')

  @property
  def tabulated(self) -> bool:
    """True for schedules that are tables of STEPS entries, whose training times are integers."""
    return self.schedule not in ('flow', 'edm')

  @property
  def last(self) -> float:
    """The time of the most noise."""
    if self.schedule == 'edm':
      return float(STEPS / 4 * np.log(80.0))
    return STEPS - 1 if self.tabulated else STEPS

  def alpha_sigma(self, time: Any) -> tuple[Any, Any]:
    """(alpha, sigma) at `time`: float32 from jax arrays, float64 from numpy's."""
    xp: Any = jnp if isinstance(time, jax.Array) else np
    time = xp.asarray(time, xp.float32 if xp is jnp else xp.float64)
    if self.schedule == 'flow':
      t = time / STEPS
      return 1 - t, t
    if self.schedule == 'edm':
      ratio = xp.exp(4 * time / STEPS)
      alpha = 1 / xp.sqrt(ratio**2 + self.data_std**2)
      return alpha, ratio * alpha
    log_ratio = xp.interp(time, np.arange(STEPS), log_ratios(self.schedule))
    return xp.sqrt(_sigmoid(-2 * log_ratio)), xp.sqrt(_sigmoid(2 * log_ratio))

  def add_noise(
    self,
    image: Float[AnyArray, ' batch *shape'],
    noise: Float[AnyArray, ' batch *shape'],
    time: Shaped[AnyArray, ' batch'],
  ) -> Float[AnyArray, ' batch *shape']:
    """x_t of x_0 [B, ...] at times [B]."""
    alpha, sigma = self._at(time, image)
    return alpha * image + sigma * noise

  def target(
    self,
    image: Float[AnyArray, ' batch *shape'],
    noise: Float[AnyArray, ' batch *shape'],
    time: Shaped[AnyArray, ' batch'],
  ) -> Float[AnyArray, ' batch *shape']:
    """The target of the network's output for x_t."""
    alpha, sigma = self._at(time, image)
    if self.prediction == 'noise':
      return noise
    if self.prediction == 'image':
      return image
    if self.prediction == 'velocity':
      return alpha * noise - sigma * image
    if self.prediction == 'flow':
      return noise - image
    skip, out = self._edm(alpha, sigma)
    return (image - skip * (alpha * image + sigma * noise)) / out

  def image(
    self,
    output: Float[AnyArray, ' batch *shape'],
    x: Float[AnyArray, ' batch *shape'],
    time: Shaped[AnyArray, ' batch'],
  ) -> Float[AnyArray, ' batch *shape']:
    """x_0 as the network's output (without the channels of a learned variance) has it; exact for each prediction."""
    alpha, sigma = self._at(time, x)
    if self.prediction == 'noise':
      return (x - sigma * output) / alpha
    if self.prediction == 'image':
      return output
    if self.prediction == 'velocity':
      return (alpha * x - sigma * output) / (alpha**2 + sigma**2)
    if self.prediction == 'flow':
      return (x - sigma * output) / (alpha + sigma)
    skip, out = self._edm(alpha, sigma)
    return skip * x + out * output

  def noise(
    self, image: Float[AnyArray, ' batch *shape'], x: Float[AnyArray, ' batch *shape'], time: Shaped[AnyArray, ' batch']
  ) -> Float[AnyArray, ' batch *shape']:
    """eps, given x_t and x_0."""
    alpha, sigma = self._at(time, x)
    return (x - alpha * image) / sigma

  def weight(
    self, time: Shaped[AnyArray, ' batch'], name: WeightName, strength: float | None = None
  ) -> Float[jax.Array, ' batch']:
    """Weight [B] of the squared error of the network's output.

    'simple' is 1. The others are published as weights of the error of the noise, and converted. 'min_snr':
    min(SNR, strength) / SNR (Hang et al. 2023; 5); 'p2': (1 + SNR)^-strength (Choi et al. 2022; 1); 'sigmoid':
    sigmoid(strength - log SNR) (Kingma & Gao 2023; 2). 'flow' is the error of eps - x_0 whatever the network predicts,
    the velocity loss of Li & He 2025 (JiT): for 'image' and the schedule 'flow' 1 / max(sigma, strength)^2 (0.05).
    """
    if name == 'simple':
      return jnp.ones_like(time, jnp.float32)
    strength = {'min_snr': 5.0, 'p2': 1.0, 'sigmoid': 2.0, 'flow': 0.05}[name] if strength is None else strength
    alpha, sigma = self.alpha_sigma(time)
    snr = jnp.square(alpha / sigma)
    if name == 'min_snr':
      weight = jnp.minimum(snr, strength) / snr
    elif name == 'p2':
      weight = (1 + snr) ** -strength
    elif name == 'flow':
      weight = jnp.square((alpha + sigma) / alpha * jnp.minimum(1, sigma / strength))
    else:
      weight = jax.nn.sigmoid(strength - jnp.log(snr))
    # By how much an error of the output is one of the noise.
    gain = {
      'noise': lambda: 1.0,
      'image': lambda: alpha / sigma,
      'velocity': lambda: alpha / (alpha**2 + sigma**2),
      'flow': lambda: alpha / (alpha + sigma),
      'edm': lambda: alpha / sigma * self._edm(alpha, sigma)[1],
    }[self.prediction]()
    return weight * gain**2

  def sample_timesteps(
    self, keys: Key[jax.Array, ' batch'], name: TimesName, mean: float, std: float
  ) -> Float[jax.Array, ' batch']:
    """A random time for each key [B].

    'uniform' over the schedule (integers, where it is a table); 'logit_normal': the logit of time / STEPS is normal
    (Esser et al. 2024); 'log_normal': the logarithm of sigma / alpha is normal (Karras et al. 2022), for 'edm'.
    """
    if name == 'uniform':
      u = jax.vmap(lambda key: jax.random.uniform(key, maxval=1 - 1e-6))(keys)
      if self.tabulated:
        return jnp.floor(u * STEPS)
      if self.schedule == 'edm':
        low = STEPS / 4 * np.log(0.002)
        return low + u * (self.last - low)
      return self.shifted(STEPS * u)
    normal = mean + std * jax.vmap(jax.random.normal)(keys)
    if name == 'log_normal':
      return STEPS / 4 * normal
    time = self.shifted(STEPS * jax.nn.sigmoid(normal))
    return jnp.round(time).clip(0, STEPS - 1) if self.tabulated else time

  def shifted(self, time: Any) -> Any:
    """Time in steps after the shift towards noise (Esser et al. 2024, eq. 23): s t / (1 + (s - 1) t)."""
    t = time / STEPS
    return STEPS * self.shift * t / (1 + (self.shift - 1) * t)

  def _edm(self, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """(skip, out): x_0 = skip x_t + out F, from Karras et al. 2022, table 1."""
    ratio = sigma / alpha
    total = ratio**2 + self.data_std**2
    return self.data_std**2 / total / alpha, ratio * self.data_std / jnp.sqrt(total)

  def _at(self, time: AnyArray, like: AnyArray) -> tuple[AnyArray, AnyArray]:
    alpha, sigma = self.alpha_sigma(time)
    return tuple(x.reshape(-1, *(1,) * (like.ndim - 1)) for x in (alpha, sigma))  # type: ignore[return-value]


def _sigmoid(x: Any) -> Any:
  return jax.nn.sigmoid(x) if isinstance(x, jax.Array) else 1 / (1 + np.exp(-x))
