import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.augment.control_maps import Edges
from fmcv_jax.augment.inpaint_masks import RandomInpaintMask
from fmcv_jax.diffusion.learned_variance import variance_bits
from fmcv_jax.diffusion.process import Process, alphas_cumprod
from fmcv_jax.models.backbones.text import text_transformer
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.generative.autoencoder import autoencoder
from fmcv_jax.models.generative.dit import dit
from fmcv_jax.models.generative.unet import unet
from fmcv_jax.objectives.diffusion import Diffusion
from fmcv_jax.objectives.image_condition import ImageCondition
from fmcv_jax.objectives.latent_space import LatentSpace
from fmcv_jax.objectives.repa import REPA
from fmcv_jax.objectives.text_condition import TextCondition
from fmcv_jax.parallel.mesh import MeshShape
from tests.train.tiny import Trainer, batch_of, shaken

CODER = autoencoder(channels=(4, 4), layers=1, latent_channels=4, image_size=16, middle_attention=False)
TEXT = text_transformer(64, 8, 16, 1, 2, causal=False, attend_padding=False)
EMPTY = TextCondition(TEXT).empty_text


def text_to_image(**changes):
  """Everything at once: latents, texts, REPA."""
  options = dict(
    network=dit('mu/2', image_size=8, channels=4, cross_attention=True, pooled_text=True),
    process=Process('flow', 'flow'),
    latent_space=LatentSpace(CODER, scale=0.5),
    text_condition=TextCondition(TEXT),
    repa=REPA(vit('mu/8', image_size=16), layer=1, hidden=16),
  )
  return Diffusion(**{**options, **changes})


def class_conditional(**changes):
  network = dit('mu/4', image_size=16, channels=3, num_classes=10, out_channels=6)
  return Diffusion(network, Process('cosine', learned_variance=True), **changes)


def test_training_on_eight_devices_equals_one_and_leaves_what_is_frozen_as_it_was():
  batches = [batch_of(text_to_image(), seed) for seed in range(2)]
  trainer = Trainer(text_to_image(), devices=1)
  before = jax.device_get(trainer.state.extra)
  assert set(before) == {'autoencoder', 'text', 'teacher'}
  one = trainer.run(batches)
  jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(trainer.state.extra))
  eight = Trainer(text_to_image(), MeshShape(data=2, fsdp=2, tensor=2)).run(batches)
  np.testing.assert_allclose(eight, one, rtol=2e-5)


def controlled():
  network = unet(
    'mu',
    image_size=8,
    channels=3,
    block_out_channels=(16,),
    depths=(0,),
    layers=1,
    num_classes=10,
    cross_attention_dim=0,
  )
  return Diffusion(network, Process('linear'), image_condition=ImageCondition(control=Edges()), condition_dropout=0.5)


@pytest.mark.slow
def test_a_new_controlnet_changes_nothing_and_a_trained_one_changes_the_output():
  objective = controlled()
  params, extra = jax.jit(lambda key: (lambda params, extra: (params, shaken(extra)))(*objective.init(key)))(
    jax.random.key(1)
  )
  images, time = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3)), jnp.array([3.0, 700.0])
  batch = {'image': (255 * images).astype(jnp.uint8), 'label': jnp.array([1, 2])}

  @jax.jit
  def said(params):
    model = objective.generator(params, extra)
    condition = {**model.condition(batch), 'control': model.control(images)}
    return model.denoise(images, time, condition)

  alone = Diffusion(objective.network, objective.process).generator(extra, {})
  expected = jax.jit(lambda: alone.denoise(images, time, alone.condition(batch)))()
  np.testing.assert_allclose(said(params), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  assert np.abs(said(shaken(params)) - expected).max() > 1e-3
  assert (set(params), set(extra), objective.frozen_networks) == ({'control'}, {'network'}, ('network',))
  assert jax.tree.map(jnp.shape, params['control']['encoder']) == jax.tree.map(jnp.shape, extra['network']['encoder'])


def test_an_inpainting_network_is_given_the_mask_and_nothing_of_what_is_masked():
  network = unet(
    'mu',
    image_size=8,
    channels=4,
    block_out_channels=(16,),
    depths=(0,),
    layers=1,
    cross_attention_dim=0,
    extra_in_channels=5,
  )
  inpainting = ImageCondition(inpainting=RandomInpaintMask())
  objective = Diffusion(network, latent_space=LatentSpace(CODER, scale=0.5), image_condition=inpainting)
  images = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3))
  extra = {'autoencoder': jax.jit(CODER.init)(jax.random.key(0), images)['params']}
  model = objective.generator({}, extra)
  masks = np.zeros((2, 16, 16), bool)
  masks[0, :, 8:] = True
  other = jnp.where(masks[..., None], 0.9, images)
  inpaint, encode = jax.jit(model.inpaint_condition), jax.jit(model.encode)
  condition = inpaint(images, masks)
  np.testing.assert_array_equal(condition, inpaint(other, masks))
  np.testing.assert_array_equal(condition[..., 0], masks[:, ::2, ::2])
  # Without a mask the condition is the whole image; with one, the image is gray where it is masked.
  np.testing.assert_allclose(condition[1, ..., 1:], encode(images)[1], atol=1e-5)
  gray = jnp.where(masks[..., None], 0.5, images)
  np.testing.assert_allclose(condition[0, ..., 1:], encode(gray)[0], atol=1e-5)


def test_the_best_network_has_no_loss_and_the_error_is_that_of_the_target():
  """A new DiT says zero: its error is the mean square of the target, which for the noise is 1."""
  objective = class_conditional(condition_dropout=0.0)
  params, extra = jax.jit(objective.init)(jax.random.key(0))
  batch = {name: jnp.asarray(x) for name, x in batch_of(objective).items()}
  loss = jax.jit(objective.loss)(params, batch, jax.random.key(1), extra)
  assert float(loss.metrics['denoising'].value) == pytest.approx(1, abs=0.05)


def test_dropped_conditions_are_those_of_no_class_and_of_an_EMPTY():
  tokens = jnp.array([[1, 5, 6, 63, 0], [1, 7, 63, 0, 0]])
  np.testing.assert_array_equal(EMPTY(tokens), [[1, 63, 0, 0, 0]] * 2)
  objective = class_conditional()
  condition = objective.condition({}, {'label': jnp.array([3, 4])}, jnp.array([True, False]))
  np.testing.assert_array_equal(condition['label'], [3, 10])
  objective = text_to_image()
  batch = {'tokens': jnp.asarray([[1, 5, 6, 63, 0, 0, 0, 0]] * 2)}

  @jax.jit
  def conditions(key):
    extra = {'text': TEXT.init(key, batch['tokens'])['params']}
    empty = objective.condition(extra, {'tokens': EMPTY(batch['tokens'])})
    return objective.condition(extra, batch, jnp.array([True, False])), empty

  dropped, empty = conditions(jax.random.key(0))
  np.testing.assert_allclose(dropped['text'][1], empty['text'][1], atol=1e-6)
  np.testing.assert_array_equal(dropped['text_mask'].sum(1), [4, 2])
  assert np.abs(dropped['text'][0] - dropped['text'][1]).max() > 0.1


@pytest.mark.slow
def test_a_text_tower_is_trained_where_that_is_asked_for():
  objective = text_to_image(repa=None, text_condition=TextCondition(TEXT, train=True), condition_dropout=0.0)
  params, extra = jax.jit(objective.init)(jax.random.key(0))
  assert (set(params), set(extra)) == ({'network', 'text'}, {'autoencoder'})
  batch = {name: jnp.asarray(x) for name, x in batch_of(objective).items()}
  gradient = jax.jit(jax.grad(lambda p: objective.loss(p, batch, jax.random.key(1), extra).value))(shaken(params))
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient['text']['blocks']))
  assert objective.generator(params, extra).condition(batch)['text'].shape == (16, 8, 16)


def test_variance_bits_are_the_divergence_of_two_gaussians():
  objective = class_conditional()
  rng = np.random.default_rng(0)
  x0, noise, predicted, between = (rng.normal(size=(3, 4, 4, 3)).astype(np.float32) for _ in range(4))
  time = np.array([10, 400, 900])
  process = objective.process
  x = process.add_noise(x0, noise, jnp.asarray(time, jnp.float32))
  output = jnp.concatenate([predicted, between], axis=-1)
  bits = variance_bits(process, output, x, x0, jnp.asarray(time, jnp.float32))

  table = alphas_cumprod('cosine')
  want = []
  for i, t in enumerate(time):  # Ho et al. 2020, eq. 6 and 7
    alpha_bar, before = table[t], table[t - 1]
    beta = 1 - alpha_bar / before
    small = beta * (1 - before) / (1 - alpha_bar)
    variance = np.exp((between[i] + 1) / 2 * np.log(beta) + (1 - between[i]) / 2 * np.log(small))
    image = (x[i] - np.sqrt(1 - alpha_bar) * predicted[i]) / np.sqrt(alpha_bar)
    means = [
      np.sqrt(before) * beta / (1 - alpha_bar) * target_image
      + np.sqrt(alpha_bar / before) * (1 - before) / (1 - alpha_bar) * x[i]
      for target_image in (x0[i], image)
    ]
    divergence = 0.5 * (np.log(variance / small) - 1 + (small + (means[0] - means[1]) ** 2) / variance)
    want.append(divergence.mean() / np.log(2))
  assert float(bits) == pytest.approx(np.mean(want), rel=1e-3)


def test_validation_errors_by_noise_are_the_same_every_time_and_for_every_batch():
  objective = text_to_image(repa=None)
  params, extra = jax.jit(objective.init)(jax.random.key(0))
  batch = {name: jnp.asarray(x[:4]) for name, x in batch_of(objective).items()} | {'index': jnp.arange(4)}
  function = jax.jit(objective.outputs()['denoising_errors'].call)
  errors = function(params, extra, batch)
  assert errors.shape == (4, 8)
  part = function(params, extra, {name: x[2:3] for name, x in batch.items()})
  np.testing.assert_allclose(part, errors[2:3], rtol=1e-5)


def test_the_generator_decodes_what_it_encodes():
  objective = Diffusion(dit('mu/4', image_size=16, channels=3))
  model = objective.generator(*objective.init(jax.random.key(0)))
  images = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3))
  np.testing.assert_allclose(model.decode(model.encode(images)), images, atol=1e-6)
  assert model.condition_fields == ()
  assert model.input_shape == model.image_shape == (16, 16, 3)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(network=vit('mu/8')), 'needs a denoiser'),
    (dict(process=Process(learned_variance=True)), 'out_channels is 4 for 4 channels'),
    (dict(timestep_sampling='log_normal'), 'timestep_sampling: log_normal is only for the schedule edm'),
    (
      dict(process=Process('edm', 'edm'), timestep_sampling='logit_normal'),
      'timestep_sampling: logit_normal is not for the schedule edm',
    ),
    (
      dict(text_condition=TextCondition()),
      "reads the condition 'text', which nothing provides; set text_condition.encoder",
    ),
    (dict(network=dit('mu/2', image_size=8)), 'text_condition: the network reads no text'),
    (dict(network=unet('mu', extra_in_channels=5)), 'extra_in_channels is 5, but 0 channels are concatenated to x'),
    (
      dict(image_condition=ImageCondition(inpainting=RandomInpaintMask())),
      'extra_in_channels is 0, but 5 channels are concatenated to x',
    ),
    (dict(network=unet('mu', image_size=8)), 'repa: needs the tokens'),
    (
      dict(latent_space=LatentSpace(autoencoder(channels=(8, 8, 8), layers=1, latent_channels=4, image_size=16))),
      'latents of the autoencoder',
    ),
    (dict(repa=REPA(vit('mu/8'), layer=3)), 'repa.layer: 3 is not one of the 2 layers'),
    (dict(image_condition=ImageCondition(control=Edges())), 'control: needs a convolutional network'),
  ],
)
def test_what_does_not_fit_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    text_to_image(**changes)
