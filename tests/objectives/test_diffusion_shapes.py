"""Diffusion of images that are not square, of clips, and with conditions of the network's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.augment.inpaint_masks import RandomInpaintMask
from fmcv_jax.config import build
from fmcv_jax.diffusion.options import SamplingOptions
from fmcv_jax.diffusion.process import Process
from fmcv_jax.diffusion.sharded_sampling import SamplerConfig, ShardedSampler
from fmcv_jax.models.common.positions import sincos_2d
from fmcv_jax.models.generative.autoencoder import Gaussian, autoencoder
from fmcv_jax.models.generative.dit import dit
from fmcv_jax.models.generative.mmdit import mmdit
from fmcv_jax.models.generative.unet import unet
from fmcv_jax.objectives.base import Objective
from fmcv_jax.objectives.diffusion import Diffusion
from fmcv_jax.objectives.image_condition import ImageCondition
from fmcv_jax.objectives.latent_space import LatentSpace
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import Placement
from fmcv_jax.registry import KINDS
from tests.objectives.toy_denoisers import Controlled, Mistaken, Unprovided, WorldModel
from tests.train.tiny import Trainer, batch_of, shaken

PREDICTS_X0 = Process('flow', 'image')


def sampled(objective, params, extra, **fields):
  """Images of two steps."""
  sampler = ShardedSampler(objective.generator, Placement(make_mesh(MeshShape(), jax.devices()[:1])), 2)
  config = SamplerConfig('ddim', SamplingOptions(steps=2).times(objective.process), guided=False)
  fields = {'number': np.arange(2, dtype=np.int32), **fields}
  return sampler.sample(params, extra, fields, config, seed=0)


def test_images_of_16_x_24_pixels_train_and_are_sampled():
  """A new DiT says 0: of white images, which are 1, the error is 1, and it samples 0, the middle gray."""
  objective = Diffusion(dit('mu/4', image_size=(16, 24), channels=3, num_classes=10), PREDICTS_X0)
  assert objective.input_shape == objective.image_shape == (16, 24, 3)
  batch = {**batch_of(objective), 'image': np.full((16, 16, 24, 3), 255, np.uint8)}
  trainer = Trainer(objective, devices=1)
  params = jax.device_get(trainer.state.params)
  images = sampled(objective, params, {}, label=np.array([1, 2], np.int32))
  np.testing.assert_array_equal(images, np.full((2, 16, 24, 3), 128))
  first, second = trainer.run([batch, batch])
  assert first == pytest.approx(1, abs=1e-6)
  assert second < first


@pytest.mark.slow
def test_latents_that_are_not_square_are_inpainted_and_known_pixels_stay():
  coder = autoencoder(channels=(4, 4), layers=1, latent_channels=4, image_size=(16, 24), middle_attention=False)
  small = dict(block_out_channels=(16,), depths=(0,), layers=1, cross_attention_dim=0, channels=4)
  network = unet('mu', image_size=(8, 12), extra_in_channels=5, **small)
  inpainting = ImageCondition(inpainting=RandomInpaintMask())
  objective = Diffusion(network, PREDICTS_X0, LatentSpace(coder, 0.5), image_condition=inpainting)
  assert (objective.input_shape, objective.image_shape) == ((8, 12, 4), (16, 24, 3))
  assert np.isfinite(Trainer(objective, devices=1).run([batch_of(objective)])).all()
  params, extra = (shaken(jax.device_get(x)) for x in jax.jit(objective.init)(jax.random.key(0)))
  image = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
  mask = np.zeros((2, 16, 24), bool)
  mask[:, 3:12, 5:20] = True
  filled = sampled(objective, params, extra, image=image, mask=mask)
  np.testing.assert_array_equal(filled[~mask], image[~mask])
  assert (filled[mask] != image[mask]).any()


def test_latents_that_do_not_fit_the_network_are_refused():
  coder = autoencoder(channels=(4, 4), layers=1, latent_channels=4, image_size=(16, 24), middle_attention=False)
  with pytest.raises(ValueError, match=r'input_shape is \(12, 8, 4\), but the latents .* shape \(8, 12, 4\)'):
    Diffusion(dit('mu/2', image_size=(12, 8), channels=4), latent_space=LatentSpace(coder))


def test_positions_of_a_wide_image_are_the_middle_of_the_square_table():
  """Esser et al. 2024, section 5.3.2: smaller images are a center crop of one grid."""
  side, reach = 6, 3
  network = mmdit('mu/2', image_size=(4, 8), channels=4, positions=(reach, side))
  whole = sincos_2d(side, side, network.width, step=reach / side).reshape(side, side, -1)
  np.testing.assert_allclose(network._table(2, 4), whole[2:4, 1:5].reshape(8, -1), atol=1e-6)
  with pytest.raises(ValueError, match='positions: 6 is less than the 7 patches of a side'):
    mmdit('mu/2', image_size=(4, 14), channels=4, positions=(reach, side))


@pytest.mark.parametrize('make', [lambda size: dit('mu/4', image_size=size), lambda size: unet('mu', image_size=size)])
def test_each_side_has_to_be_divisible(make):
  with pytest.raises(ValueError, match=r'image_size: \(16, 23\) is not divisible by'):
    make((16, 23))


def test_a_gaussian_may_have_any_axes():
  """The divergence from the standard normal of N(1, 1) is 1 / 2 for each value (closed form)."""
  shape = (2, 3, 4, 5, 6)
  np.testing.assert_allclose(Gaussian(jnp.ones(shape), jnp.zeros(shape)).kl(), [180.0, 180.0])


def test_a_denoiser_of_clips_trains_and_samples_unchanged():
  spec = {'name': 'diffusion', 'network': 'tests.objectives.toy_denoisers:clip_denoiser'}
  spec['process'] = {'schedule': 'flow', 'prediction': 'image'}
  objective = build(Objective, spec, KINDS)
  assert objective.example_batch['image'].shape == (3, 4, 6, 3)
  assert objective.input_size == (4, 6)  # of a frame
  assert objective.outputs()['samples'].kind == 'video'
  batch = {'image': np.full((16, 3, 4, 6, 3), 255, np.uint8)}
  first, second = Trainer(objective, devices=1).run([batch, batch])
  assert first == pytest.approx(1, abs=1e-6)
  assert second < first
  params, _ = objective.init(jax.random.key(0))
  params['network']['head']['bias'] = np.full(3, 0.5, np.float32)  # x0 = 0.5, which is 0.75 in [0, 1]
  np.testing.assert_array_equal(sampled(objective, params, {}), np.full((2, 3, 4, 6, 3), 191))


def test_a_network_reads_the_batch_fields_that_it_names():
  """The output is the action: its error from white images, which are 1, is the square of 1 - action."""
  objective = Diffusion(WorldModel(), PREDICTS_X0, condition_dropout=0.0)
  assert objective.condition_fields == ('action', 'second_time')
  assert list(objective.example_batch) == ['image', 'action', 'second_time']
  params, extra = objective.init(jax.random.key(0))
  action = np.array([[0.0, 0, 0], [1, 1, 1], [3, 1, 1]], np.float32)
  batch = {'image': np.full((3, 2, 2, 3), 255, np.uint8), 'action': action, 'second_time': np.ones(3, np.float32)}
  loss = jax.jit(objective.loss)(params, batch, jax.random.key(0), extra)
  assert float(loss.metrics['denoising'].value) == pytest.approx((1 + 0 + 4 / 3) / 3)
  fields = {name: batch[name][:2] for name in ('action', 'second_time')}
  np.testing.assert_array_equal(sampled(objective, params, extra, **fields)[:, 0, 0, 0], [128, 255])


def test_dropped_conditions_are_zero_but_for_those_without_which_the_task_is_another():
  objective = Diffusion(WorldModel(), PREDICTS_X0)
  batch = {'action': jnp.ones((2, 3)), 'second_time': jnp.array([5.0, 6.0])}
  condition = objective.condition({}, batch, jnp.array([True, False]))
  np.testing.assert_array_equal(condition['action'], [[1, 1, 1], [0, 0, 0]])
  np.testing.assert_array_equal(condition['second_time'], [5, 6])


def test_a_network_names_further_conditions_that_are_never_dropped():
  batch = {'action': jnp.ones((2, 3)), 'second_time': jnp.array([5.0, 6.0])}
  condition = Diffusion(Controlled()).condition({}, batch, jnp.array([True, False]))
  np.testing.assert_array_equal(condition['action'], np.ones((2, 3)))


def test_a_condition_that_is_never_dropped_has_to_be_read():
  with pytest.raises(ValueError, match=r"network.never_dropped: \['camera'\] are not in its condition_shapes"):
    Diffusion(Mistaken())


def test_a_condition_that_nothing_provides_is_refused_at_construction():
  message = r"network: reads the condition 'camera', which nothing provides; .* condition_shapes"
  with pytest.raises(ValueError, match=message):
    Diffusion(Unprovided())
