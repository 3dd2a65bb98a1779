"""Where a network looks, against torch's own attention weights and autograd, and against closed forms."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.interpret import attention_maps
from fmcv_jax.interpret.attention_maps import available_outputs
from fmcv_jax.models.backbones.efficientnet import efficientnet
from fmcv_jax.models.backbones.swin import swin
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.common.outputs import AveragePooledNetwork
from fmcv_jax.models.common.patches import patch_features

NETWORK = vit('mu/8', image_size=32, registers=2)
IMAGES = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)


def test_observing_changes_nothing_and_costs_no_parameters(random_variables):
  variables = random_variables(NETWORK, IMAGES)
  assert set(variables) == {'params'}
  features, projections = jax.jit(lambda p: attention_maps.apply_with_intermediates(NETWORK, p, IMAGES))(
    variables['params']
  )
  np.testing.assert_allclose(features.pooled, jax.jit(NETWORK.apply)(variables, IMAGES).pooled, rtol=1e-6, atol=1e-6)
  weights = projections.weights()
  assert weights.shape == (2, 2, 2, 19, 19)
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
  maps = attention_maps.class_attention(NETWORK, variables['params'], IMAGES)
  np.testing.assert_array_equal(maps.reshape(2, 2, 16), weights[-1, :, :, 0, 3:])


def test_patch_features_stand_at_their_patches():
  """With no attention between tokens and no positions, a feature depends on its own patch alone."""
  network = vit('mu/8', image_size=32, pos_embed='sincos2d')
  shapes = jax.eval_shape(network.init, jax.random.key(0), IMAGES)['params']
  params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  params['patch']['kernel'] = jax.random.normal(jax.random.key(1), params['patch']['kernel'].shape)
  params['norm']['scale'] = jnp.ones(32)
  changed = IMAGES.copy()
  changed[:, 8:16, 24:32] += 1
  read = jax.jit(lambda images: patch_features(network, params, images))
  difference = read(changed) - read(IMAGES)
  expected = np.zeros((4, 4), bool)
  expected[1, 3] = True
  np.testing.assert_array_equal(np.abs(difference).max((0, 3)) > 0, expected)


def test_rollout_by_hand():
  first, second = np.random.default_rng(0).dirichlet(np.ones(3), size=(2, 1, 2, 3))
  mixed = [(layer.mean(1) + np.eye(3)) / 2 for layer in (first, second)]
  np.testing.assert_allclose(attention_maps.rollout(jnp.stack([first, second])), mixed[1] @ mixed[0], rtol=1e-6)


def test_attention_and_relevance_equal_autograd_in_torch():
  torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
  transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')
  from tests.models.test_parity import OURS, TOWER, parameters_of, randomized, to_torch

  config = transformers.ViTConfig(
    **TOWER, intermediate_size=96, image_size=32, patch_size=8, num_labels=7, attn_implementation='eager'
  )
  reference = randomized(transformers.ViTForImageClassification(config))
  network = vit('mu/8', image_size=32, num_classes=7, **OURS)
  params, _ = parameters_of(reference, network, IMAGES)

  theirs = reference(to_torch(IMAGES), output_attentions=True)
  scores = theirs.logits[:, 3]
  gradients = torch.autograd.grad(scores.sum(), theirs.attentions)
  expected = torch.eye(17).expand(2, 17, 17)
  for gradient, weights in zip(gradients, theirs.attentions, strict=True):
    expected = expected + (gradient * weights).clamp(min=0).mean(1) @ expected

  _, projections = attention_maps.apply_with_intermediates(network, params, IMAGES)
  for ours, weights in zip(projections.weights(), theirs.attentions, strict=True):
    np.testing.assert_allclose(ours, weights.detach(), rtol=0, atol=1e-6)
  ours, score = jax.jit(lambda p: attention_maps.relevance(network, p, IMAGES, lambda f: f.output[:, 3]))(params)
  np.testing.assert_allclose(score, scores.detach(), rtol=1e-5)
  off = expected.detach().numpy() - np.eye(17)
  np.testing.assert_allclose(ours - np.eye(17), off, rtol=0, atol=1e-5 * off.max())


def test_mass_masks_take_the_fewest_patches():
  attention = np.array([[[0.5, 0.1], [0.15, 0.25]]])
  assert attention_maps.attention_mass_masks(attention, 0.5).tolist() == [[[True, False], [False, False]]]
  assert attention_maps.attention_mass_masks(attention * 7, 0.6).tolist() == [[[True, False], [False, True]]]
  assert attention_maps.attention_mass_masks(attention, 0.8).tolist() == [[[True, False], [True, True]]]


def test_principal_colors_follow_the_directions_of_largest_variance():
  generator = np.random.default_rng(0)
  sources = generator.exponential(size=(2, 5, 5, 3)) * [10, 3, 1]
  basis = np.linalg.qr(generator.normal(size=(8, 8)))[0][:3]
  colors = attention_maps.pca_rgb(sources @ basis + 4)
  for channel in range(3):
    assert abs(np.corrcoef(colors[..., channel].ravel(), sources[..., channel].ravel())[0, 1]) > 0.9
  assert (colors.min(), colors.max()) == (0, 1)


@pytest.mark.parametrize('pool', ['gap', 'map'])
def test_the_only_patch_of_an_image_is_embedded_as_the_image(pool, random_variables):
  network, images = vit('mu/8', image_size=8, pool=pool, depth=1, num_classes=6, head_bias=False), IMAGES[:, :8, :8]
  variables = random_variables(network, images)
  patches = jax.jit(lambda p: attention_maps.patch_embeddings(network, p, images))(variables['params'])
  output = jax.jit(network.apply)(variables, images).output
  np.testing.assert_allclose(patches[:, 0, 0], output / np.linalg.norm(output, axis=1, keepdims=True), atol=1e-6)


def test_patches_of_a_network_with_a_class_token_are_embedded_by_their_values(random_variables):
  """MaskCLIP written out for one block: head(norm(out(value(norm1(patch)))))."""
  network = vit('mu/8', image_size=32, depth=1, num_classes=6, head_bias=False)
  params = random_variables(network, IMAGES)['params']
  block = jax.tree.map(lambda x: x[0], params['blocks'])

  def norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p['scale'] + p['bias']

  def linear(x, p):
    return x @ p['kernel'] + p['bias']

  x = IMAGES.reshape(2, 4, 8, 4, 8, 3).swapaxes(2, 3).reshape(2, 16, -1)
  x = linear(x, params['patch']) + params['position'][1:]
  x = linear(linear(norm(x, block['norm1']), block['attention']['value']), block['attention']['out'])
  x = norm(x, params['norm']) @ params['head']['kernel']
  ours = jax.jit(lambda p: attention_maps.patch_embeddings(network, p, IMAGES))(params).reshape(2, 16, 6)
  np.testing.assert_allclose(ours, x / np.linalg.norm(x, axis=-1, keepdims=True), atol=1e-5)


def test_a_network_of_another_class_offers_maps_by_its_attributes_alone(random_variables):
  names = ('apply', 'patch_size', 'prefix', 'sows_projections', 'pool', 'stack', 'width', 'num_classes', 'head_bias')
  other = types.SimpleNamespace(**{name: getattr(NETWORK, name) for name in names})
  read = available_outputs(other)
  assert set(read) == set(available_outputs(NETWORK)) == {'patch_features', 'attention'}
  params = random_variables(NETWORK, IMAGES)['params']
  expected = attention_maps.class_attention(NETWORK, params, IMAGES)
  np.testing.assert_array_equal(read['attention'](other, params, IMAGES), expected)


def test_networks_offer_the_maps_that_they_have():
  assert set(available_outputs(swin('mu', image_size=32))) == {'patch_features'}
  assert isinstance(swin('mu', image_size=32), AveragePooledNetwork)
  assert not available_outputs(efficientnet('mu'))
  assert isinstance(efficientnet('mu'), AveragePooledNetwork)
  assert not isinstance(NETWORK, AveragePooledNetwork)
  assert [network.size_multiple for network in (NETWORK, swin('mu', image_size=32), efficientnet('mu'))] == [8, 4, 1]
