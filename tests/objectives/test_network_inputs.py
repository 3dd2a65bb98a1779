import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmcv_jax.augment.color import ColorJitter
from fmcv_jax.augment.control_maps import Edges
from fmcv_jax.augment.geometry import Flip
from fmcv_jax.augment.inpaint_masks import RandomInpaintMask
from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.dataset_statistics import IMAGENET
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.generative.unet import unet
from fmcv_jax.models.self_supervised.dino import dino
from fmcv_jax.models.self_supervised.mae import mae
from fmcv_jax.objectives.diffusion import Diffusion
from fmcv_jax.objectives.dino import SelfDistillation
from fmcv_jax.objectives.image_condition import ImageCondition
from fmcv_jax.objectives.mae import MaskedAutoencoding
from fmcv_jax.objectives.network_inputs import masked_patches, network_inputs

AUGMENT = (Flip(), ColorJitter(brightness=0.4, hue=0.2))
NORMALIZE = Normalize(**IMAGENET)
COUNT = 4


def given_to(objective, batch, rng):
  """What the network's own calls receive when the loss runs, in order: (arguments, keyword arguments)."""

  @jax.jit
  def traced(batch, rng):
    calls = []

    def listen(call, args, kwargs, context):
      if context.module.name is None and context.method_name == '__call__':
        calls.append((args, {name: value for name, value in kwargs.items() if isinstance(value, (jax.Array, int))}))
      return call(*args, **kwargs)

    shapes = jax.eval_shape(objective.init, rng)
    params, extra = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    with nn.intercept_methods(listen):
      objective.loss(params, batch, rng, extra)
    return calls

  return traced(batch, rng)


def batch_of(objective):
  generator = np.random.default_rng(0)
  return {
    name: generator.integers(0, 256, (COUNT, *x.shape), dtype=np.uint8) for name, x in objective.example_batch.items()
  }


def test_masked_autoencoding_shows_the_input_of_its_network():
  network = mae(vit('mu/8', image_size=32, depth=1), width=32, depth=1, num_heads=2)
  objective = MaskedAutoencoding(network, augment=AUGMENT, normalize=NORMALIZE)
  batch, rng = batch_of(objective), jax.random.key(5)
  ((images, order), options) = given_to(objective, batch, rng)[0]
  (ours,) = network_inputs(objective, batch, rng)
  assert ours.shape == (COUNT, 1, 32, 32, 3)
  np.testing.assert_allclose(ours[:, 0], NORMALIZE.undo(images), atol=1e-5)
  hidden = np.asarray(masked_patches(objective, batch, rng))
  assert hidden.shape == (COUNT, 1, 4, 4)
  for example, row in zip(hidden, np.asarray(order)):
    assert set(np.flatnonzero(example)) == set(row[options['visible'] :].tolist())


def test_self_distillation_shows_the_input_of_its_student():
  encoder = vit('mu/8', image_size=32, depth=1, mask_token=True)
  objective = SelfDistillation(
    dino(encoder, prototypes=8, hidden=16, bottleneck=8),
    momentum_steps=10,
    local_crops_number=3,
    local_size=16,
    ibot_loss_weight=1.0,
    global_augments=(AUGMENT, ()),
    local_augment=AUGMENT,
    normalize=NORMALIZE,
  )
  batch, rng = batch_of(objective), jax.random.key(6)
  _, (large_args, options), (small_args, _) = given_to(objective, batch, rng)  # the teacher is first
  large, small = network_inputs(objective, batch, rng)
  assert (large.shape, small.shape) == ((COUNT, 2, 32, 32, 3), (COUNT, 3, 16, 16, 3))
  np.testing.assert_allclose(large.reshape(-1, 32, 32, 3), NORMALIZE.undo(large_args[0]), atol=1e-5)
  np.testing.assert_allclose(small.reshape(-1, 16, 16, 3), NORMALIZE.undo(small_args[0]), atol=1e-5)
  np.testing.assert_array_equal(large[:, 1], batch['global_views'][:, 1] / jnp.float32(255))  # not augmented
  hidden = np.asarray(masked_patches(objective, batch, rng))
  assert hidden.any()
  np.testing.assert_array_equal(hidden.reshape(COUNT * 2, -1), options['masked'])


def test_control_maps_and_masked_images_are_shown_with_the_image():
  small = dict(image_size=16, channels=3, block_out_channels=(16,), depths=(0,), layers=1, cross_attention_dim=0)
  controlled = Diffusion(unet('mu', **small), image_condition=ImageCondition(control=Edges()), normalize=NORMALIZE)
  filled = Diffusion(
    unet('mu', **small, extra_in_channels=4),
    image_condition=ImageCondition(inpainting=RandomInpaintMask(full_mask_probability=0.0)),
    normalize=NORMALIZE,
  )
  for objective in (controlled, filled):
    batch, rng = batch_of(objective), jax.random.key(7)
    image, second = network_inputs(objective, batch, rng)
    np.testing.assert_allclose(image[:, 0], batch['image'] / np.float32(255), atol=1e-6)
    if objective is controlled:
      np.testing.assert_array_equal(second[:, 0], Edges()(image[:, 0]))
    else:
      hidden = (second[:, 0] != image[:, 0]).any(-1)
      assert hidden.any((1, 2)).all()
      np.testing.assert_allclose(second[:, 0][hidden], np.broadcast_to(NORMALIZE.mean, (hidden.sum(), 3)), atol=1e-6)
