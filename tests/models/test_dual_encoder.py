import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.models.backbones.text import text_transformer
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.multimodal.dual_encoder import clip, dual_encoder, l2_normalize, siglip

IMAGES, TOKENS = jnp.ones((2, 16, 16, 3)), jnp.array([[1, 2, 9, 0], [1, 9, 0, 0]])


def pair(**options):
  image = vit('mu/8', image_size=16, num_classes=12, head_bias=False, dtype='bfloat16')
  return dual_encoder(image, text_transformer(10, 4, 16, 1, 2, num_classes=12, dtype='bfloat16'), **options)


@pytest.fixture(scope='module')
def variables():
  return jax.jit(pair().init)(jax.random.key(0), IMAGES, TOKENS)


def test_embeddings_are_unit_vectors_in_float32_even_from_bfloat16_towers(variables):
  for x in jax.jit(pair().apply)(variables, IMAGES, TOKENS):
    assert (x.shape, x.dtype) == ((2, 12), jnp.dtype('float32'))
    np.testing.assert_allclose(jnp.linalg.norm(x, axis=1), 1, rtol=1e-5)


def test_a_zero_vector_has_no_direction_but_a_finite_gradient():
  assert (l2_normalize(jnp.zeros((1, 4))) == 0).all()
  assert jnp.isfinite(jax.grad(lambda x: l2_normalize(x)[0, 0])(jnp.zeros((1, 4)))).all()


def test_the_temperature_starts_as_published_and_never_scales_by_more_than_a_hundred(variables):
  def scale_and_bias(net, params):
    return net.apply({'params': params}, method='logit_scale_and_bias')

  scale, bias = scale_and_bias(pair(), variables['params'])
  np.testing.assert_allclose((scale, bias), (1 / 0.07, 0), rtol=1e-6)
  hot = {**variables['params'], 'temperature': jnp.array(9.0)}
  np.testing.assert_allclose(scale_and_bias(pair(), hot)[0], 100, rtol=1e-6)
  assert 'bias' not in variables['params']

  net = pair(initial_scale=10.0, initial_bias=-10.0)
  params = jax.jit(net.init)(jax.random.key(0), IMAGES, TOKENS)['params']
  np.testing.assert_allclose(scale_and_bias(net, params), (10, -10), rtol=1e-6)
  assert (siglip().initial_scale, siglip().initial_bias) == (10, -10)


def test_an_unknown_name_is_a_clear_error():
  with pytest.raises(ValueError, match=r"unknown CLIP variant 'B/34'; did you mean 'B/32'\?"):
    clip('B/34')
  with pytest.raises(ValueError, match='unknown SigLIP variant'):
    siglip('H/14')
