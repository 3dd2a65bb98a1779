"""Solvers of the reverse process, run as one scan over the sampling steps.

Solvers use the predicted x_0 and noise, so every solver works with every schedule and parameterization. Their
coefficients are precomputed in float64.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from fmcv_jax.diffusion.process import STEPS, Process, log_ratios
from fmcv_jax.shapes import AnyArray, Float, Key

Spacing = Literal['trailing', 'leading', 'uniform', 'quadratic', 'karras']
Denoise = Callable[[jax.Array, jax.Array], jax.Array]
Draw = Callable[[], jax.Array]
Coefficients = Mapping[str, np.ndarray]
Stepped = tuple[jax.Array, Any]  # the next x and the next memory of the solver


def sampling_timesteps(process: Process, steps: int, spacing: Spacing = 'trailing') -> Float[np.ndarray, ' {steps}']:
  """Times of the network evaluations of a sampler, float64 [steps], decreasing; the last step leads to x_0.

  'trailing' starts at pure noise, 'leading' ends next to x_0 (Lin et al. 2024, table 2), 'uniform' does both;
  'quadratic' has more steps near x_0 (Song et al. 2021), 'karras' has equal steps of (sigma / alpha)^(1/7) (Karras
  et al. 2022). Raises ValueError for steps < 1, and for more steps than a tabulated schedule has.
  """
  if steps < 1 or (process.tabulated and steps > STEPS):
    raise ValueError(f'steps: {steps} is not between 1 and {STEPS}')
  # 'flow' and 'edm' end where the noise is invisible.
  first = 0.0 if process.tabulated else 1.0 if process.schedule == 'flow' else STEPS / 4 * np.log(0.002)
  if spacing == 'karras':
    alpha, sigma = process.alpha_sigma(np.array([process.last, first]))
    if alpha[0] < 1e-6:
      raise ValueError('spacing: karras needs a schedule whose last SNR is not zero; use trailing')
    high, low = (sigma / alpha) ** (1 / 7)
    times = _time_of(process, np.log(np.linspace(high, low, steps)) * 7)
  elif spacing in ('uniform', 'quadratic'):
    power = 2 if spacing == 'quadratic' else 1
    times = first + np.linspace(1, 0, steps) ** power * (process.last - first)
  elif process.tabulated:
    stride = STEPS / steps
    times = (
      np.arange(STEPS, 0, -stride)[:steps] - 1 if spacing == 'trailing' else np.arange(steps)[::-1] * (stride // 1)
    )
  elif spacing == 'trailing':
    times = process.last - np.arange(steps) * (process.last - (0.0 if process.schedule == 'flow' else first)) / steps
  else:
    raise ValueError(f'spacing: leading is for tabulated schedules, not for {process.schedule}')
  if process.tabulated and spacing != 'karras':
    return np.round(times)
  return process.shifted(times) if process.schedule == 'flow' else times


def _time_of(process: Process, log_ratio: np.ndarray) -> np.ndarray:
  if process.schedule == 'flow':
    return STEPS * np.exp(log_ratio) / (1 + np.exp(log_ratio))
  if process.schedule == 'edm':
    return STEPS / 4 * log_ratio
  return np.interp(log_ratio, log_ratios(process.schedule), np.arange(STEPS))


class Trajectory(NamedTuple):
  """The times [n], and alpha and sigma [n + 1] with those of x_0 at the end; float64."""

  times: Float[np.ndarray, ' n']
  alpha: Float[np.ndarray, ' n+1']
  sigma: Float[np.ndarray, ' n+1']

  @property
  def log_snr(self) -> np.ndarray:
    """log(alpha / sigma) [n + 1], the last of them infinite."""
    with np.errstate(divide='ignore'):
      return np.log(self.alpha) - np.log(self.sigma)


class ModelPrediction(NamedTuple):
  """The prediction at a time: x_0, the noise and the raw output [B, ...]."""

  image: Float[jax.Array, ' batch *shape']
  noise: Float[jax.Array, ' batch *shape']
  output: Float[jax.Array, 'batch ...']


class Solver(abc.ABC):
  """A rule for the next x, as a frozen dataclass; one row of coefficients for each call of the network."""

  stochastic = False

  @abc.abstractmethod
  def coefficients(self, process: Process, path: Trajectory) -> Coefficients:
    """Coefficients, arrays [calls]: 'time' of the call, 'alpha' and 'sigma' of the next x, and the solver's own."""

  def start(self, x: jax.Array) -> Any:
    """Initial solver memory."""
    return ()

  @abc.abstractmethod
  def step(self, x: jax.Array, prediction: ModelPrediction, memory: Any, row: Any, draw: Draw) -> Stepped:
    """(next x, next memory); draw() is standard normal noise."""


@dataclasses.dataclass(frozen=True)
class Ddim(Solver):
  """Song et al. 2021, eq. 12. eta 0 follows the probability flow: Euler's method in sigma / alpha (Karras et al. 2022)
  and, for 'flow', in t, are the same steps. eta 1 is ancestral sampling with the posterior's variance (Ho et al. 2020),
  also known as Euler ancestral.
  """

  eta: float = 0.0

  @property
  @override
  def stochastic(self) -> bool:  # type: ignore[override]
    return self.eta > 0

  @override
  def coefficients(self, process: Process, path: Trajectory) -> Coefficients:
    alpha, sigma, variance = path.alpha[1:], path.sigma[1:], _posterior_variance(path)
    kept = np.sqrt(sigma**2 - self.eta**2 * variance)
    return {'time': path.times, 'alpha': alpha, 'sigma': sigma, 'noise': kept, 'fresh': self.eta * np.sqrt(variance)}

  @override
  def step(self, x: jax.Array, prediction: ModelPrediction, memory: Any, row: Any, draw: Draw) -> Stepped:
    x = row['alpha'] * prediction.image + row['noise'] * prediction.noise
    return (x + row['fresh'] * draw() if self.stochastic else x), memory


@dataclasses.dataclass(frozen=True)
class Ddpm(Solver):
  """Ancestral sampling (Ho et al. 2020, algorithm 2) with the posterior variance, the variance of the forward step
  ('large'), or the learned variance (Nichol & Dhariwal 2021)."""

  variance: Literal['small', 'large', 'learned'] = 'small'
  stochastic = True

  @override
  def coefficients(self, process: Process, path: Trajectory) -> Coefficients:
    if self.variance == 'learned' and not process.learned_variance:
      raise ValueError('solver: this network has no learned variance')
    small = _posterior_variance(path)
    large = path.sigma[:-1] ** 2 - (path.alpha[:-1] / path.alpha[1:] * path.sigma[1:]) ** 2
    last = path.sigma[1:] == 0  # x_0 is the mean: noise would be visible
    return {
      'time': path.times,
      'alpha': path.alpha[1:],
      'sigma': path.sigma[1:],
      'noise': np.sqrt(path.sigma[1:] ** 2 - small),
      'fresh': np.where(last, 0, np.sqrt(small if self.variance != 'large' else large)),
      'more': 0.5 * np.log(large / np.where(last, large, small)),
    }

  @override
  def step(self, x: jax.Array, prediction: ModelPrediction, memory: Any, row: Any, draw: Draw) -> Stepped:
    fresh = row['fresh'] * draw()
    if self.variance == 'learned':
      between = (prediction.output[..., prediction.image.shape[-1] :] + 1) / 2
      fresh = fresh * jnp.exp(between * row['more'])
    return row['alpha'] * prediction.image + row['noise'] * prediction.noise + fresh, memory


@dataclasses.dataclass(frozen=True)
class Heun(Solver):
  """Heun's second-order method (Karras et al. 2022, algorithm 1), in sigma / alpha or, for 'flow', in t.

  Two network evaluations per step, except for the last, which is an Euler step.
  """

  @override
  def coefficients(self, process: Process, path: Trajectory) -> Coefficients:
    flow = process.schedule == 'flow'
    alpha, sigma = path.alpha, path.sigma
    if not flow and alpha[0] < 1e-6:
      raise ValueError('solver: heun divides by alpha, which is zero at the end of this schedule; use ddim or dpm++')
    scale = np.ones_like(alpha) if flow else alpha
    along = sigma / scale
    keep, move = scale[1:] / scale[:-1], scale[1:] * np.diff(along)
    calls = 2 * len(path.times) - 1
    step, second = np.arange(calls) // 2, np.arange(calls) % 2
    return {
      'time': path.times[step + second],
      'alpha': alpha[step + 1],
      'sigma': sigma[step + 1],
      'keep': keep[step],
      'move': move[step],
      'second': second.astype(np.float64),
      'image': np.full(calls, float(flow)),
    }

  @override
  def start(self, x: jax.Array) -> Any:
    return x, jnp.zeros_like(x)

  @override
  def step(self, x: jax.Array, prediction: ModelPrediction, memory: Any, row: Any, draw: Draw) -> Stepped:
    before, slope = memory
    second = row['second']
    now = prediction.noise - row['image'] * prediction.image
    before = jnp.where(second == 1, before, x)
    mean = jnp.where(second == 1, (slope + now) / 2, now)
    return row['keep'] * before + row['move'] * mean, (before, now)


@dataclasses.dataclass(frozen=True)
class DpmPlusPlus(Solver):
  """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), or its SDE variant: second order, one evaluation per step."""

  sde: bool = False

  @property
  @override
  def stochastic(self) -> bool:  # type: ignore[override]
    return self.sde

  @override
  def coefficients(self, process: Process, path: Trajectory) -> Coefficients:
    step, ratio = _steps(path)
    alpha, sigma = path.alpha[1:], path.sigma[1:]
    decay = np.exp(-step)
    image = alpha * (-np.expm1(-2 * step) if self.sde else -np.expm1(-step))
    return {
      'time': path.times,
      'alpha': alpha,
      'sigma': sigma,
      'x': sigma / path.sigma[:-1] * (decay if self.sde else 1),
      'now': image * (1 + 0.5 * ratio),
      'before': -image * 0.5 * ratio,
      'fresh': sigma * np.sqrt(-np.expm1(-2 * step)),
    }

  @override
  def start(self, x: jax.Array) -> Any:
    return jnp.zeros_like(x)

  @override
  def step(self, x: jax.Array, prediction: ModelPrediction, memory: Any, row: Any, draw: Draw) -> Stepped:
    x = row['x'] * x + row['now'] * prediction.image + row['before'] * memory
    return (x + row['fresh'] * draw() if self.sde else x), prediction.image


@dataclasses.dataclass(frozen=True)
class UniPC(Solver):
  """Unified predictor-corrector of order two with B(h) = exp(h) - 1 (Zhao et al. 2023, algorithms 5 and 6).

  The prediction at a predicted x also corrects that x, without another evaluation.
  """

  @override
  def coefficients(self, process: Process, path: Trajectory) -> Coefficients:
    step, ratio = _steps(path)
    count = len(step)
    change = np.expm1(-step)  # B(h), and phi_1
    keep = path.sigma[1:] / path.sigma[:-1]
    alpha = path.alpha[1:]
    # Predictor, eq. 9: one half of the difference quotient of the last two predictions.
    predict = {'x': keep, 'now': -alpha * change * (1 + 0.5 * ratio), 'before': alpha * change * 0.5 * ratio}
    # Corrector of the step that came before each call, from the x before it: none at the first.
    correct: dict[str, np.ndarray] = {name: np.zeros(count) for name in ('kept', 'old', 'older', 'newest')}
    correct['as_is'] = np.eye(1, count)[0]
    for i in range(1, count):
      h, b = step[i - 1], change[i - 1]
      phi2 = b / -h - 1
      if ratio[i - 1] == 0:
        by_older, by_newest = 0.0, 0.5
      else:
        r = -1 / ratio[i - 1]
        phi3 = phi2 / -h - 0.5
        by_older, by_newest = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [phi2 / b, 2 * phi3 / b])
        by_older /= r
      correct['kept'][i] = keep[i - 1]
      correct['old'][i] = alpha[i - 1] * (-b + b * (by_older + by_newest))
      correct['older'][i] = -alpha[i - 1] * b * by_older
      correct['newest'][i] = -alpha[i - 1] * b * by_newest
    return {'time': path.times, 'alpha': alpha, 'sigma': path.sigma[1:], **predict, **correct}

  @override
  def start(self, x: jax.Array) -> Any:
    return (jnp.zeros_like(x),) * 3

  @override
  def step(self, x: jax.Array, prediction: ModelPrediction, memory: Any, row: Any, draw: Draw) -> Stepped:
    before, old, older = memory
    x = (
      row['as_is'] * x
      + row['kept'] * before
      + row['old'] * old
      + row['older'] * older
      + row['newest'] * prediction.image
    )
    return row['x'] * x + row['now'] * prediction.image + row['before'] * old, (x, prediction.image, old)


SOLVERS: dict[str, Solver] = {
  'ddim': Ddim(),
  'ddpm': Ddpm(),
  'ddpm_learned': Ddpm('learned'),
  'euler': Ddim(),
  'euler_ancestral': Ddim(eta=1.0),
  'heun': Heun(),
  'dpm++': DpmPlusPlus(),
  'dpm++_sde': DpmPlusPlus(sde=True),
  'unipc': UniPC(),
}


def sample(
  denoise: Denoise,
  process: Process,
  x: Float[AnyArray, ' batch *shape'],
  times: Float[np.ndarray, ' steps'],
  *,
  solver: Solver = Ddim(),
  keys: Key[jax.Array, ' batch'] | None = None,
  clip: float | None = None,
  adjust: Callable[[jax.Array, Any, Any, Any], jax.Array] | None = None,
  trace: bool = False,
) -> Any:
  """Images [B, ...] from x [B, ...] at times[0] (see `add_noise`), by one scan over the calls of the network.

  denoise   (x, time [B]) -> the network's raw output
  times     decreasing, from `sampling_timesteps`, or a suffix of them for img2img
  keys      one rng key per example, for the noise of stochastic solvers: an image does not depend on the others
  clip      predictions of x_0 are clipped to +-clip
  adjust    (x, alpha, sigma, call) -> x, applied after each step, for example to restore the known pixels
  trace     also return the prediction of x_0 at each evaluation, [calls, B, ...]
  """
  rows = {name: jnp.asarray(values, jnp.float32) for name, values in coefficients(process, solver, times).items()}
  calls = len(rows['time'])

  def visit(carry: Any, inputs: Any) -> Any:
    x, memory = carry
    call, row = inputs
    time = jnp.broadcast_to(row['time'], x.shape[:1])
    output = denoise(x, time)
    image = process.image(output[..., : x.shape[-1]], x, time)
    if clip is not None:
      image = jnp.clip(image, -clip, clip)
    prediction = ModelPrediction(image, process.noise(image, x, time), output)

    def draw() -> jax.Array:
      if keys is None:
        raise ValueError('keys: this solver draws noise')
      return normal(keys, x.shape[1:], call)

    x, memory = solver.step(x, prediction, memory, row, draw)
    if adjust is not None:
      x = adjust(x, row['alpha'], row['sigma'], call)
    return (x, memory), image if trace else None

  (x, _), images = jax.lax.scan(visit, (x, solver.start(x)), (jnp.arange(calls), rows))
  return (x, images) if trace else x


def coefficients(process: Process, solver: Solver, times: Any) -> Coefficients:
  """Coefficients of a solver for these times; ValueError if the solver does not support the process."""
  if len(times) == 0:
    raise ValueError('steps: must be at least 1')
  alpha, sigma = process.alpha_sigma(np.asarray(times))
  return solver.coefficients(process, Trajectory(np.asarray(times), np.append(alpha, 1.0), np.append(sigma, 0.0)))


def add_noise(
  process: Process,
  image: Float[AnyArray, ' batch *shape'] | float,
  keys: Key[jax.Array, ' batch'],
  shape: tuple[int, ...],
  time: float,
) -> Float[jax.Array, ' batch *shape']:
  """Start of sampling: x_0 (or 0) noised to `time`, [B, *shape]. Each example's noise is drawn from its own key."""
  alpha, sigma = process.alpha_sigma(np.asarray(time))
  return jnp.float32(alpha) * image + jnp.float32(sigma) * normal(keys, shape, -1)


def normal(keys: Key[jax.Array, ' batch'], shape: tuple[int, ...], number: Any) -> Float[jax.Array, 'batch ...']:
  """Standard normal float32 [B, *shape]: draw `number` (-1 or more) of each example's key."""
  return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number + 1), shape))(keys)


def _posterior_variance(path: Trajectory) -> np.ndarray:
  """Variance of the next x given the current x and x_0, [n]."""
  # Products, not ratios: alpha may be zero at the end of noise.
  kept = path.sigma[1:] * path.alpha[:-1] / (path.sigma[:-1] * path.alpha[1:])
  return path.sigma[1:] ** 2 * (1 - kept**2)


def _steps(path: Trajectory) -> tuple[np.ndarray, np.ndarray]:
  """Steps of log(alpha / sigma) [n], and the ratio of each to the previous step [n]: 0 for first-order steps.

  First-order steps are the first, which has no predecessor, and the last, which is infinite.
  """
  step = np.diff(path.log_snr)
  ratio = np.zeros(len(step))
  ratio[1:-1] = step[1:-1] / step[:-2]
  return step, ratio
