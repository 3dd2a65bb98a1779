import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.diffusion.process import Process, alphas_cumprod

PREDICTIONS = ('noise', 'image', 'velocity', 'flow', 'edm')
SCHEDULES = ('linear', 'scaled_linear', 'cosine', 'zero_snr', 'flow', 'edm')
CASES = [(s, p) for s in SCHEDULES for p in PREDICTIONS if (s, p) != ('zero_snr', 'noise')]


@pytest.mark.parametrize(('schedule', 'prediction'), CASES)
def test_image_and_noise_are_recovered_from_every_target(schedule, prediction):
  process = Process(schedule, prediction)
  image, noise = np.random.default_rng(0).normal(size=(2, 6, 2, 2, 3)).astype(np.float32)
  time = jnp.array([50.0, 250.5, 400.0, 500.0, 700.25, 800.0])
  x = process.add_noise(image, noise, time)
  target = process.target(image, noise, time)
  np.testing.assert_allclose(process.image(target, x, time), image, atol=2e-4)
  np.testing.assert_allclose(process.noise(image, x, time), noise, atol=2e-4)


@pytest.mark.parametrize('name', ['min_snr', 'p2', 'sigmoid', 'flow'])
@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_a_weighting_is_the_same_loss_for_every_prediction(prediction, name):
  """An error in the image costs the same as when the network predicts the noise."""
  image, noise, off = np.random.default_rng(0).normal(size=(3, 4, 2, 2, 3)).astype(np.float32)
  time = jnp.array([100.0, 300.0, 500.0, 700.0])

  def loss(process):
    other = image + off
    noise_of_other = process.noise(other, process.add_noise(image, noise, time), time)
    error = process.target(other, noise_of_other, time) - process.target(image, noise, time)
    return process.weight(time, name, 2.0) * jnp.square(error).mean((1, 2, 3))

  np.testing.assert_allclose(
    loss(Process('scaled_linear', prediction)), loss(Process('scaled_linear', 'noise')), rtol=2e-4
  )


def test_weights_are_the_published_ones():
  time = np.array([20.0, 300.0, 800.0])
  alpha, sigma = Process('linear').alpha_sigma(time)
  snr = alpha**2 / sigma**2
  published = {
    ('min_snr', 'noise'): np.minimum(snr, 5) / snr,  # Hang et al. 2023, section 3.4
    ('min_snr', 'image'): np.minimum(snr, 5),
    ('min_snr', 'velocity'): np.minimum(snr, 5) / (snr + 1),
    ('p2', 'noise'): 1 / (1 + snr),  # Choi et al. 2022, eq. 8, with k = 1 and gamma = 1
    ('sigmoid', 'noise'): 1 / (1 + np.exp(np.log(snr) - 2)),  # Kingma & Gao 2023, section 5, with a bias of 2
  }
  for (name, prediction), weight in published.items():
    got = Process('linear', prediction).weight(jnp.asarray(time), name)
    np.testing.assert_allclose(got, weight, rtol=1e-4, err_msg=f'{name} {prediction}')


def test_the_flow_weighting_is_the_velocity_loss_of_jit():
  """Li & He 2025, section 3: v = (x_0 - z_t) / max(1 - t, 0.05) of the prediction and of the image."""
  image, noise, off = np.random.default_rng(0).normal(size=(3, 5, 2, 2, 3))
  t = np.array([0.001, 0.2, 0.5, 0.9, 0.999])  # 1 is the image
  z = t[:, None, None, None] * image + (1 - t[:, None, None, None]) * noise
  predicted = image + off
  difference = [(x - z) / np.maximum(1 - t, 0.05)[:, None, None, None] for x in (predicted, image)]
  expected = np.square(difference[0] - difference[1]).mean((1, 2, 3))
  weight = Process('flow', 'image').weight(jnp.asarray(1000 * (1 - t)), 'flow')
  np.testing.assert_allclose(weight * np.square(off).mean((1, 2, 3)), expected, rtol=1e-4)
  np.testing.assert_allclose(Process('flow', 'flow').weight(jnp.array([60.0, 500.0, 999.0]), 'flow'), 1, rtol=1e-5)


def test_tables_are_the_published_ones():
  """The end of DDPM's, and of Stable Diffusion's."""
  assert alphas_cumprod('linear')[-1] == pytest.approx(4.0358e-5, rel=1e-4)
  assert np.sqrt(alphas_cumprod('scaled_linear')[-1]) == pytest.approx(0.068265, rel=1e-4)
  assert alphas_cumprod('zero_snr')[-1] == 0
  assert alphas_cumprod('zero_snr')[0] == pytest.approx(alphas_cumprod('scaled_linear')[0])


def test_edm_targets_have_unit_variance_at_every_noise():
  """The design of Karras et al. 2022, appendix B.6."""
  process = Process('edm', 'edm', data_std=0.5)
  image = 0.5 * jax.random.normal(jax.random.key(0), (4, 100, 100, 1))
  noise = jax.random.normal(jax.random.key(1), image.shape)
  time = process.sample_timesteps(jax.random.split(jax.random.key(2), 4), 'log_normal', -1.2, 1.2)
  np.testing.assert_allclose(process.target(image, noise, time).var((1, 2, 3)), 1, rtol=0.05)
  np.testing.assert_allclose(process.add_noise(image, noise, time).var((1, 2, 3)), 1, rtol=0.05)


def test_times_follow_their_distributions():
  from scipy import stats

  keys = jax.random.split(jax.random.key(0), 4000)
  uniform = Process('linear').sample_timesteps(keys, 'uniform', 0, 1)
  assert set(np.unique(uniform % 1)) == {0.0}
  assert 0 <= uniform.min() <= uniform.max() <= 999
  assert stats.kstest(uniform / 1000, 'uniform').pvalue > 0.01
  logit = np.asarray(Process('flow', 'flow').sample_timesteps(keys, 'logit_normal', 0.5, 1.2)) / 1000
  assert stats.kstest(np.log(logit / (1 - logit)), stats.norm(0.5, 1.2).cdf).pvalue > 0.01
  moved = Process('flow', 'flow', shift=3.0).sample_timesteps(keys, 'uniform', 0, 1)
  assert np.median(moved) == pytest.approx(750, abs=15)  # 3 t / (1 + 2 t) at one half


def test_impossible_processes_are_refused():
  with pytest.raises(ValueError, match='use velocity with zero_snr'):
    Process('zero_snr', 'noise')
  with pytest.raises(ValueError, match='shift is for the schedule flow'):
    Process('linear', shift=2.0)
  with pytest.raises(ValueError, match='learned_variance needs a tabulated schedule'):
    Process('flow', 'flow', learned_variance=True)
