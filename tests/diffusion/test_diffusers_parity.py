"""Samplers against diffusers' schedulers: the same denoiser, the same start, the same noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.diffusion import samplers
from fmcv_jax.diffusion.process import Process
from fmcv_jax.diffusion.samplers import Ddim, Ddpm, DpmPlusPlus, Heun, UniPC, sample, sampling_timesteps

torch = pytest.importorskip('torch')
schedulers = pytest.importorskip('diffusers').schedulers

SHAPE = (2, 4, 4, 3)
VP = {'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'scaled_linear'}
TARGET = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
KEYS = jax.random.split(jax.random.key(0))  # of draws that a test replaces
PREDICTIONS = {'noise': 'epsilon', 'image': 'sample', 'velocity': 'v_prediction'}


def network(x, time, where):
  """A toy with a bend in it: not a Gaussian's score, so that orders and coefficients matter."""
  x = x + 0.3 * where.sin(x * 2 + time / 300) - 0.2 * where.asarray(TARGET)
  return 0.8 * where.tanh(x)


def ours(process, solver, start, times, draws=None, network_time=lambda time: time, **options):
  def denoise(x, time):
    return network(x, network_time(time.reshape(-1, 1, 1, 1)), jnp)

  with pytest.MonkeyPatch.context() as patch:
    if draws is not None:
      patch.setattr(samplers, 'normal', lambda keys, shape, call: jnp.asarray(draws)[call])
    run = jax.jit(lambda x: sample(denoise, process, x, times, solver=solver, keys=KEYS, **options))
    return np.asarray(run(jnp.asarray(start)))


def theirs(scheduler, start, steps, monkeypatch, draws=None, steps_of=None):
  scheduler.set_timesteps(steps)
  if draws is not None:
    left = [torch.tensor(x) for x in draws]
    for module in ('ddim', 'ddpm', 'euler_ancestral_discrete', 'dpmsolver_multistep'):
      name = f'diffusers.schedulers.scheduling_{module}.randn_tensor'
      monkeypatch.setattr(name, lambda *args, **kwargs: left.pop(0))
  x = torch.tensor(start)
  for time in scheduler.timesteps:
    inputs = scheduler.scale_model_input(x, time) if hasattr(scheduler, 'scale_model_input') else x
    x = scheduler.step(network(inputs, float(time), torch), time, x, **(steps_of or {})).prev_sample
  return x.numpy()


def start_of(process, times, scheduler):
  """The same noise for both: diffusers scales it by `init_noise_sigma`, ours by sigma."""
  noise = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
  alpha, sigma = process.alpha_sigma(np.asarray(times[0]))
  scaled_by_alpha = scheduler.__class__.__name__.startswith(('Euler', 'Heun'))
  return (sigma * noise).astype(np.float32), (sigma / (alpha if scaled_by_alpha else 1) * noise).astype(np.float32)


KARRAS = {'use_karras_sigmas': True}
PAIRS = {
  'ddim': (Ddim(), 'DDIMScheduler', {'clip_sample': False}),
  'ddim-eta': (Ddim(0.7), 'DDIMScheduler', {'clip_sample': False}),
  'ddpm': (Ddpm(), 'DDPMScheduler', {'clip_sample': False}),
  'ddpm-large': (Ddpm('large'), 'DDPMScheduler', {'clip_sample': False, 'variance_type': 'fixed_large'}),
  'euler': (Ddim(), 'EulerDiscreteScheduler', {}),
  'euler-karras': (Ddim(), 'EulerDiscreteScheduler', KARRAS),
  'ancestral': (Ddim(1.0), 'EulerAncestralDiscreteScheduler', {}),
  'heun': (Heun(), 'HeunDiscreteScheduler', {}),
  'heun-karras': (Heun(), 'HeunDiscreteScheduler', KARRAS),
  'dpm++': (DpmPlusPlus(), 'DPMSolverMultistepScheduler', {'final_sigmas_type': 'zero'}),
  'dpm++-karras': (DpmPlusPlus(), 'DPMSolverMultistepScheduler', KARRAS),
  'dpm++-sde': (DpmPlusPlus(sde=True), 'DPMSolverMultistepScheduler', {'algorithm_type': 'sde-dpmsolver++'}),
  'dpm++-sde-karras': (
    DpmPlusPlus(sde=True),
    'DPMSolverMultistepScheduler',
    {'algorithm_type': 'sde-dpmsolver++', **KARRAS},
  ),
  'unipc': (UniPC(), 'UniPCMultistepScheduler', {'final_sigmas_type': 'zero'}),
  'unipc-karras': (UniPC(), 'UniPCMultistepScheduler', {'final_sigmas_type': 'zero', **KARRAS}),
}


# These schedulers of diffusers do not support prediction of the image.
OF_NO_IMAGES = ('HeunDiscreteScheduler', 'EulerAncestralDiscreteScheduler')
THERE = [
  (pair, prediction)
  for pair, (_, name, _) in PAIRS.items()
  for prediction in PREDICTIONS
  if not (name in OF_NO_IMAGES and prediction == 'image')
]


@pytest.mark.parametrize(('pair', 'prediction'), THERE)
def test_variance_preserving(pair, prediction, monkeypatch):
  solver, name, options = PAIRS[pair]
  process = Process(prediction=prediction)
  karras = 'use_karras_sigmas' in options
  # With the large variance diffusers adds noise to the image itself, unless the last time is 0.
  spacing = 'leading' if pair == 'ddpm-large' else 'linspace' if karras else 'trailing'
  options = {**VP, 'prediction_type': PREDICTIONS[prediction], 'timestep_spacing': spacing, **options}
  steps = 10
  scheduler = getattr(schedulers, name)(**options)
  times = sampling_timesteps(process, steps, 'karras' if karras else spacing)
  draws = np.random.default_rng(2).normal(size=(steps, *SHAPE)).astype(np.float32)
  start, their_start = start_of(process, times, scheduler)
  extra = {'eta': 0.7} if pair == 'ddim-eta' else None
  want = theirs(scheduler, their_start, steps, monkeypatch, draws, extra)
  # Between the times of its table, diffusers rounds the time in some solvers and gives the exact time in others.
  network_time = jnp.round if karras and 'Multistep' in name else lambda time: time
  got = ours(process, solver, start, times, draws, network_time)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize('spacing', ['leading', 'trailing'])
@pytest.mark.parametrize('schedule', ['linear', 'cosine', 'zero_snr'])
def test_schedules_and_spacings(schedule, spacing, monkeypatch):
  process = Process(schedule=schedule, prediction='velocity')
  theirs_of = {
    'linear': {},
    'cosine': {'beta_schedule': 'squaredcos_cap_v2'},
    'zero_snr': {**VP, 'rescale_betas_zero_snr': True},
  }[schedule]
  scheduler = schedulers.DDIMScheduler(
    clip_sample=False, prediction_type='v_prediction', timestep_spacing=spacing, **theirs_of
  )
  times = sampling_timesteps(process, 20, spacing)
  scheduler.set_timesteps(20)
  np.testing.assert_array_equal(times, scheduler.timesteps)
  np.testing.assert_allclose(
    process.alpha_sigma(np.arange(1000.0))[0] ** 2, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7
  )
  start, their_start = start_of(process, times, scheduler)
  want = theirs(scheduler, their_start, 20, monkeypatch)
  np.testing.assert_allclose(ours(process, Ddim(), start, times), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize('shift', [1.0, 3.0])
@pytest.mark.parametrize(
  ('solver', 'name'), [(Ddim(), 'FlowMatchEulerDiscreteScheduler'), (Heun(), 'FlowMatchHeunDiscreteScheduler')]
)
def test_flow(solver, name, shift, monkeypatch):
  process = Process('flow', 'flow', shift=shift)
  scheduler = getattr(schedulers, name)(shift=shift)
  scheduler.set_timesteps(8)
  sigmas = scheduler.sigmas[:-1].numpy()
  times = 1000 * (sigmas if solver == Ddim() else np.append(sigmas[::2][: 8 - 1], sigmas[-1]))
  if shift == 1:
    np.testing.assert_allclose(sampling_timesteps(process, 8, 'uniform'), times, rtol=1e-5)
  start = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
  want = theirs(scheduler, start, 8, monkeypatch)
  np.testing.assert_allclose(ours(process, solver, start, times), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize('shift', [1.0, 3.0])
@pytest.mark.parametrize(
  ('solver', 'name'),
  [
    (DpmPlusPlus(), 'DPMSolverMultistepScheduler'),
    (DpmPlusPlus(sde=True), 'DPMSolverMultistepScheduler'),
    (UniPC(), 'UniPCMultistepScheduler'),
  ],
)
def test_multistep_flow(solver, name, shift, monkeypatch):
  process = Process('flow', 'flow', shift=shift)
  options = {'algorithm_type': 'sde-dpmsolver++'} if solver == DpmPlusPlus(sde=True) else {}
  scheduler = getattr(schedulers, name)(
    use_flow_sigmas=True, prediction_type='flow_prediction', flow_shift=shift, final_sigmas_type='zero', **options
  )
  scheduler.set_timesteps(8)
  draws = np.random.default_rng(2).normal(size=(8, *SHAPE)).astype(np.float32)
  start = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
  times = 1000 * scheduler.sigmas[:-1].numpy().astype(np.float64)
  want = theirs(scheduler, start, 8, monkeypatch, draws)
  got = ours(process, solver, start, times, draws, jnp.floor)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
  ('solver', 'name'), [(Ddim(), 'EDMEulerScheduler'), (DpmPlusPlus(), 'EDMDPMSolverMultistepScheduler')]
)
def test_edm(solver, name, monkeypatch):
  process = Process('edm', 'edm')
  scheduler = getattr(schedulers, name)()
  times = sampling_timesteps(process, 10, 'karras')
  noise = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
  _, sigma = process.alpha_sigma(times[0])
  want = theirs(scheduler, (80 * noise).astype(np.float32), 10, monkeypatch)
  # The time input is a quarter of the log noise level in diffusers, and 1000 times that here.
  got = ours(process, solver, (sigma * noise).astype(np.float32), times, network_time=lambda time: time / 1000)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_learned_variance(monkeypatch):
  process = Process('linear', 'noise', learned_variance=True)
  # Diffusers adds noise to the image itself, unless the last time is 0.
  scheduler = schedulers.DDPMScheduler(
    beta_end=0.02, clip_sample=False, variance_type='learned_range', timestep_spacing='leading'
  )
  scheduler.set_timesteps(10)
  times = sampling_timesteps(process, 10, 'leading')
  draws = np.random.default_rng(2).normal(size=(10, *SHAPE)).astype(np.float32)
  left = [torch.tensor(np.moveaxis(x, -1, 1)) for x in draws]
  monkeypatch.setattr('diffusers.schedulers.scheduling_ddpm.randn_tensor', lambda *args, **kwargs: left.pop(0))
  noise = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)

  def between(x, where):
    return where.tanh(2 * x)

  x = torch.tensor(np.moveaxis(noise, -1, 1))
  for time in scheduler.timesteps:
    last = x.movedim(1, -1)
    output = torch.cat([network(last, float(time), torch), between(last, torch)], -1).movedim(-1, 1)
    x = scheduler.step(output, time, x).prev_sample

  def denoise(x, time):
    return jnp.concatenate([network(x, time.reshape(-1, 1, 1, 1), jnp), between(x, jnp)], axis=-1)

  monkeypatch.setattr(samplers, 'normal', lambda keys, shape, call: jnp.asarray(draws)[call])
  got = jax.jit(lambda x: sample(denoise, process, x, times, solver=Ddpm('learned'), keys=KEYS))(jnp.asarray(noise))
  np.testing.assert_allclose(got, np.moveaxis(x.numpy(), 1, -1), rtol=0, atol=1e-4)
