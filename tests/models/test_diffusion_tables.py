"""Parameters and multiply-adds of the named denoisers and autoencoders against the published implementations.

The references are the authors' DiT, CompVis' latent-diffusion and stable-diffusion, and diffusers; fixed tables of
positions, which ours compute, do not count.
"""

import jax
import jax.numpy as jnp
import pytest

from fmcv_jax.diffusion.condition import make_condition
from fmcv_jax.models.generative.autoencoder import autoencoder
from fmcv_jax.models.generative.controlnet import controlnet
from fmcv_jax.models.generative.dit import dit
from fmcv_jax.models.generative.mmdit import mmdit
from fmcv_jax.models.generative.unet import unet
from tests.models.test_tables import assert_gmac, count


def abstract(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
  ('variant', 'size', 'parameters', 'gmac'),
  [
    ('S/2', 32, 32_963_360 - 256 * 384, '6.056'),
    ('S/4', 32, 32_945_024 - 64 * 384, '1.413'),
    ('S/8', 32, 33_148_160 - 16 * 384, '0.358'),
    ('B/2', 32, 130_512_416 - 256 * 768, '23.005'),
    ('B/4', 32, 130_475_648 - 64 * 768, '5.565'),
    ('B/8', 32, 130_881_536 - 16 * 768, '1.418'),
    ('L/2', 32, 458_102_816 - 256 * 1024, '80.698'),
    ('L/4', 32, 458_053_760 - 64 * 1024, '19.696'),
    ('L/8', 32, 458_594_816 - 16 * 1024, '5.011'),
    ('XL/2', 32, 674_834_720, '118.621'),
    ('XL/4', 32, 675_074_432 - 64 * 1152, '29.044'),
    ('XL/8', 32, 675_683_072 - 16 * 1152, '7.392'),
    ('XL/2', 64, 676_014_368 - 1024 * 1152, '524.538'),
  ],
)
def test_dit_with_a_thousand_classes_and_a_learned_variance(variant, size, parameters, gmac):
  network = dit(variant, image_size=size, out_channels=8, num_classes=1000)
  inputs = abstract(1, size, size, 4), abstract(1), make_condition(label=abstract(1, dtype=jnp.int32))
  variables = jax.eval_shape(network.init, jax.random.key(0), *inputs)
  assert count(variables) == parameters
  assert_gmac(gmac, network.apply, variables, *inputs)


@pytest.mark.parametrize(
  ('variant', 'encoder', 'decoder', 'quantize'),
  [
    ('kl-f4', 22_351_238, 32_960_771, 6 * 6 + 6 + 3 * 3 + 3),
    ('kl-f8', 34_163_592, 49_490_179, 72 + 20),
    ('kl-f16', 28_265_760, 41_343_875, 32 * 33 + 16 * 17),
    ('kl-f32', 42_614_656, 61_244_803, 128 * 129 + 64 * 65),
    ('f8-16ch', None, None, None),
  ],
)
def test_autoencoders(variant, encoder, decoder, quantize):
  network = autoencoder(variant)
  params = jax.eval_shape(network.init, jax.random.key(0), abstract(1, 256, 256, 3))['params']
  if encoder is None:
    assert count(params) == 83_819_683
    return
  assert count(params['encoder']) == encoder
  assert count(params['decoder']) + count(params['conv_out']) == decoder
  assert count(params) == encoder + decoder + quantize


@pytest.mark.parametrize(('size', 'encode', 'decode'), [(256, '136.36', '311.09'), (512, '558.33', '1257.26')])
def test_work_of_stable_diffusions_autoencoder(size, encode, decode):
  network = autoencoder('kl-f8', image_size=size)
  images = abstract(1, size, size, 3)
  variables = jax.eval_shape(network.init, jax.random.key(0), images)
  assert_gmac(encode, lambda v, x: network.apply(v, x, method='encode'), variables, images)
  latent = abstract(1, size // 8, size // 8, 4)
  assert_gmac(decode, lambda v, z: network.apply(v, z, method='decode'), variables, latent)


@pytest.mark.parametrize(
  ('variant', 'options', 'parameters', 'size', 'words', 'gmac'),
  [
    ('ddpm-32', {}, 35_746_307, 32, 0, '6.222'),
    ('sd1', {}, 859_520_964, 64, 77, '401.637'),
    pytest.param('ddpm-256', {}, 113_673_219, 256, 0, None, marks=pytest.mark.slow),
    pytest.param('ldm4', {}, 274_056_163, 64, 0, '101.200', marks=pytest.mark.slow),
    pytest.param('ldm4-classes', {'num_classes': 1000}, 400_920_579 + 1001 * 512, 64, 0, None, marks=pytest.mark.slow),
    pytest.param('ldm8-classes', {'num_classes': 1000}, 394_984_196 + 1001 * 512, 32, 0, None, marks=pytest.mark.slow),
    pytest.param('ldm8-text', {}, 872_300_484, 32, 77, '91.037', marks=pytest.mark.slow),
    pytest.param('sd1', {'extra_in_channels': 5}, 859_535_364, 64, 77, None, marks=pytest.mark.slow),
    pytest.param('sd1', {'extra_in_channels': 4}, 859_532_484, 64, 77, None, marks=pytest.mark.slow),
    pytest.param('sd2', {}, 865_910_724, 64, 77, None, marks=pytest.mark.slow),
    pytest.param('sdxl', {}, 2_567_463_684, 128, 77, None, marks=pytest.mark.slow),
  ],
)
def test_unets(variant, options, parameters, size, words, gmac):
  """The embedding of classes is not part of LDM's UNet. SDXL's whole text comes with its six sizes, 2816 wide."""
  network = unet(variant, **options)
  label = abstract(1, dtype=jnp.int32)
  text = abstract(1, words, network.config.cross_attention_dim) if words else None
  concatenated = abstract(1, size, size, network.extra_in_channels)
  inputs = (
    abstract(1, size, size, network.channels),
    abstract(1),
    make_condition(label=label, text=text, pooled_text=abstract(1, 2816), image=concatenated),
  )
  variables = jax.eval_shape(network.init, jax.random.key(0), *inputs)
  assert count(variables) == parameters
  if gmac:
    assert_gmac(gmac, network.apply, variables, *inputs)


@pytest.mark.slow
def test_controlnet_of_stable_diffusion():
  network = controlnet(unet('sd1'), 8)
  condition = make_condition(text=abstract(1, 77, 768), control=abstract(1, 512, 512, 3))
  inputs = abstract(1, 64, 64, 4), abstract(1), condition
  variables = jax.eval_shape(network.init, jax.random.key(0), *inputs)
  assert count(variables) == 361_279_120
  assert_gmac('141.646', network.apply, variables, *inputs)
  assert count(variables['params']['hint']) == 1_086_480
  assert_gmac('141.646', network.apply, variables, *inputs)


@pytest.mark.parametrize(
  ('variant', 'qk_norm', 'parameters'),
  [
    ('d15/2', False, 496_066_624),
    ('d18/2', False, 856_159_552),
    ('d24/2', False, 2_028_328_000),  # Stable Diffusion 3 medium
    ('d38/2', True, 8_056_627_520),  # 3.5 large
  ],
)
def test_mmdit_with_the_text_towers_of_stable_diffusion_3(variant, qk_norm, parameters):
  condition = make_condition(text=abstract(1, 154, 4096), pooled_text=abstract(1, 2048))
  network = mmdit(variant, qk_norm=qk_norm, positions=(64, 192))
  inputs = abstract(1, 128, 128, 16), abstract(1), condition
  assert count(jax.eval_shape(network.init, jax.random.key(0), *inputs)) == parameters
