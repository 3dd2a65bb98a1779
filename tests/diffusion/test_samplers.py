"""On a Gaussian target the best denoiser and the path of every x are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.diffusion.guidance import guided
from fmcv_jax.diffusion.process import Process
from fmcv_jax.diffusion.samplers import SOLVERS, Ddpm, Heun, add_noise, sample, sampling_timesteps

MEAN, STD = 0.7, 0.4


def gaussian(process):
  """The denoiser that knows that every pixel is N(MEAN, STD^2)."""

  def denoise(x, time):
    alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in process.alpha_sigma(time))
    image = (alpha * STD**2 * x + sigma**2 * MEAN) / (alpha**2 * STD**2 + sigma**2)
    noise = (x - alpha * image) / sigma
    return process.target(image, noise, time)

  return denoise


def along(process, x, start, end):
  """Where the probability flow takes x: it keeps its place in the distribution."""
  (alpha, sigma), (alpha_s, sigma_s) = process.alpha_sigma(np.float64(start)), process.alpha_sigma(np.float64(end))
  scale = np.sqrt((alpha_s**2 * STD**2 + sigma_s**2) / (alpha**2 * STD**2 + sigma**2))
  return alpha_s * MEAN + scale * (x - alpha * MEAN)


@pytest.mark.parametrize(
  ('process', 'spacing'),
  [(Process('flow', 'flow'), 'uniform'), (Process('edm', 'edm'), 'karras'), (Process('scaled_linear'), 'karras')],
  ids=['flow', 'edm', 'scaled_linear'],
)
@pytest.mark.parametrize(('solver', 'order'), [('ddim', 1), ('heun', 2), ('dpm++', 2), ('unipc', 2)])
def test_order_of_convergence(solver, order, process, spacing):
  x = np.linspace(-2, 2, 8, dtype=np.float32).reshape(2, 2, 2, 1)
  errors = []
  for steps in (20, 40):
    times = sampling_timesteps(process, steps, spacing)[2 if process.schedule == 'flow' else 0 :]
    start = along(process, x, process.last, times[0]).astype(np.float32)
    _, images = jax.jit(
      lambda x, times=times: sample(gaussian(process), process, x, times, solver=SOLVERS[solver], trace=True)
    )(start)
    # The image predicted by the last call, at the x that the solver reached.
    there = along(process, start.astype(np.float64), times[0], times[-1])
    alpha, sigma = process.alpha_sigma(times[-1])
    exact = (alpha * STD**2 * there + sigma**2 * MEAN) / (alpha**2 * STD**2 + sigma**2)
    errors.append(np.abs(images[-1] - exact).max())
  assert np.log2(errors[0] / errors[1]) > order - 0.3, errors


@pytest.mark.parametrize('solver', ['ddpm', 'euler_ancestral', 'dpm++_sde'])
@pytest.mark.parametrize('process', [Process('scaled_linear'), Process('flow', 'flow')], ids=['table', 'flow'])
def test_stochastic_solvers_reach_the_distribution(solver, process):
  keys = jax.random.split(jax.random.key(0), 64)
  times = sampling_timesteps(process, 1000)
  x = add_noise(process, 0.0, keys, (16, 16, 1), times[0])
  images = jax.jit(lambda x, keys: sample(gaussian(process), process, x, times, solver=SOLVERS[solver], keys=keys))(
    x, keys
  )
  # 16,384 pixels: standard errors of 0.003 and 0.002, and 1000 steps are not infinitely many.
  assert float(images.mean()) == pytest.approx(MEAN, abs=0.015)
  assert float(images.std()) == pytest.approx(STD, rel=0.02)


def test_learned_variance_lies_between_its_bounds():
  process = Process('linear', learned_variance=True)
  times = sampling_timesteps(process, 50)
  keys = jax.random.split(jax.random.key(0), 2)
  x = add_noise(process, 0.0, keys, (8, 8, 1), times[0])

  def run(variance, value):
    plain = gaussian(process)

    def denoise(x, time):
      return jnp.concatenate([plain(x, time), jnp.full_like(x, value)], axis=-1)

    return jax.jit(lambda x: sample(denoise, process, x, times, solver=Ddpm(variance), keys=keys))(x)

  np.testing.assert_allclose(run('learned', -1.0), run('small', 0.0), atol=1e-4)
  np.testing.assert_allclose(run('learned', 1.0), run('large', 0.0), atol=1e-4)


def test_an_image_depends_only_on_its_key():
  process = Process('flow', 'flow')
  keys, times = jax.random.split(jax.random.key(0), 4), sampling_timesteps(process, 5)

  @jax.jit
  def run(keys):
    x = add_noise(process, 0.0, keys, (4, 4, 3), times[0])
    return sample(gaussian(process), process, x, times, solver=SOLVERS['euler_ancestral'], keys=keys)

  together, alone = run(keys), run(keys[2:3])
  np.testing.assert_allclose(together[2:3], alone, atol=1e-6)
  assert np.abs(together[0] - together[1]).max() > 0.1


def test_guidance():
  def denoise(x, time, condition):
    return condition.reshape(-1, 1, 1, 1) * jnp.ones_like(x)

  x, time = jnp.zeros((2, 2, 2, 1)), jnp.array([500.0, 100.0])
  wanted, empty = jnp.array([2.0, 3.0]), jnp.array([1.0, 1.0])
  per_example = guided(denoise, wanted, empty, jnp.array([3.0, 1.0]))(x, time)
  np.testing.assert_allclose(per_example[:, 0, 0, 0], [1 + 3 * 1, 3])
  within = guided(denoise, wanted, empty, 3.0, interval=(200.0, 800.0))(x, time)
  np.testing.assert_allclose(within[:, 0, 0, 0], [4, 3])


def test_rescaled_guidance_has_the_deviation_of_the_conditioned_output():
  noise = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))

  def denoise(x, time, condition):
    return noise[: len(x)] * condition.reshape(-1, 1, 1, 1)

  x, time = jnp.zeros((2, 8, 8, 1)), jnp.zeros(2)
  result = guided(denoise, jnp.array([2.0, 2.0]), jnp.array([1.0, 1.0]), 5.0, rescale=1.0)(x, time)
  np.testing.assert_allclose(result.std((1, 2, 3)), 2 * noise[:2].std((1, 2, 3)), rtol=1e-5)


def test_bad_requests_are_refused():
  process = Process('scaled_linear')
  for steps in (0, -3, 1001):
    with pytest.raises(ValueError, match=f'steps: {steps} is not between 1 and 1000'):
      sampling_timesteps(process, steps)
  with pytest.raises(ValueError, match='keys: this solver draws noise'):
    sample(gaussian(process), process, jnp.zeros((1, 2, 2, 1)), sampling_timesteps(process, 2), solver=SOLVERS['ddpm'])
  zero = Process('zero_snr', 'velocity')
  with pytest.raises(ValueError, match='heun divides by alpha'):
    sample(gaussian(zero), zero, jnp.zeros((1, 2, 2, 1)), sampling_timesteps(zero, 2), solver=Heun())
  with pytest.raises(ValueError, match='this network has no learned variance'):
    sample(
      gaussian(process),
      process,
      jnp.zeros((1, 2, 2, 1)),
      sampling_timesteps(process, 2),
      solver=Ddpm('learned'),
      keys=jax.random.split(jax.random.key(0), 1),
    )
