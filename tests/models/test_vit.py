import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.common.layers import BlockConfig, Mlp
from fmcv_jax.models.common.patches import patchify, random_keep
from fmcv_jax.models.common.positions import resize_grid

SIZE, PATCHES = 32, 16


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(0).normal(size=(3, SIZE, SIZE, 3)).astype(np.float32)


def network(**options):
  return vit('mu/8', **{'image_size': SIZE, **options})


def apply(net, variables, images, **kwargs):
  return jax.tree.map(np.asarray, jax.jit(lambda v, x: net.apply(v, x, **kwargs))(variables, images))


def assert_close(a, b, atol=1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol), a, b)


def test_shapes(images):
  net = network(num_classes=5, registers=4)
  features, variables = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x), images)
  assert jax.tree.map(lambda x: x.shape, tuple(features[:3])) == ((3, 5), (3, 32), (3, 1 + 4 + 16, 32))
  assert variables['params']['position'].shape == (1 + PATCHES, 32)
  assert variables['params']['blocks']['mlp']['up']['kernel'].shape == (2, 32, 64)


def test_patches_are_cut_row_by_row_and_hold_their_pixels_row_by_row(images):
  patches, grid = patchify(images[:, :16], 8)
  assert grid == (2, 4)
  np.testing.assert_array_equal(patches[1, 4 + 2], images[1, 8:16, 16:24].reshape(-1))


POSITIONS = ('learned', 'sincos2d', 'rope2d')


@pytest.mark.parametrize('positions', POSITIONS)
def test_a_permutation_of_all_patches_changes_only_the_order_of_the_tokens(images, positions, random_variables):
  net = network(pos_embed=positions, registers=2)
  variables = random_variables(net, images)
  keep = np.asarray(random_keep(jax.random.key(2), 3, PATCHES, 1.0))  # another order for each image
  assert not (keep == np.arange(PATCHES)).all(axis=1).any()
  whole, permuted = apply(net, variables, images), apply(net, variables, images, keep=keep)
  assert_close(permuted.pooled, whole.pooled)
  assert_close(permuted.tokens[:, :3], whole.tokens[:, :3])
  assert_close(permuted.tokens[:, 3:], np.take_along_axis(whole.tokens[:, 3:], keep[..., None], axis=1))


@pytest.mark.parametrize('positions', POSITIONS)
def test_dropped_patches_have_no_effect_and_the_others_keep_their_positions(images, positions, random_variables):
  net = network(pos_embed=positions)
  variables = random_variables(net, images)
  keep = np.tile(np.array([0, 3, 7]), (3, 1))
  features = apply(net, variables, images, keep=keep)
  assert features.tokens.shape == (3, 4, 32)
  unseen = images.copy()
  unseen[:, 16:] = 9.0  # the lower two rows of patches
  assert_close(apply(net, variables, unseen, keep=keep), features)
  assert np.abs(apply(net, variables, images[:, :, ::-1], keep=keep).pooled - features.pooled).max() > 1e-3
  same = np.ones_like(images)  # only the places differ
  elsewhere = apply(net, variables, same, keep=np.tile(np.array([0, 3, 8]), (3, 1)))
  assert np.abs(elsewhere.pooled - apply(net, variables, same, keep=keep).pooled).max() > 1e-4


def test_a_random_subset_has_the_given_fraction_without_repeats():
  keep = random_keep(jax.random.key(0), 50, PATCHES, 0.25)
  assert keep.shape == (50, 4)
  assert all(len(set(row)) == 4 for row in keep.tolist())
  assert set(keep.flatten().tolist()) == set(range(PATCHES))


@pytest.mark.parametrize('shape', [(48, 48), (16, 40)])
def test_another_image_size_interpolates_the_learned_table(shape, random_variables):
  images = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32)
  net = network(registers=1)
  variables = random_variables(net, np.zeros((1, SIZE, SIZE, 3)))
  grid, params = (shape[0] // 8, shape[1] // 8), variables['params']
  table = params['position']
  places = np.asarray(resize_grid(jnp.asarray(table[1:]), (4, 4), grid))
  assert places.shape == (grid[0] * grid[1], 32)
  # By hand: a network without a table, to whose patches the places are added through their bias.
  tokens = np.asarray(patchify(images, 8)[0]) @ params['patch']['kernel'] + params['patch']['bias'] + places
  patchless = {**params, 'patch': {'kernel': np.eye(32), 'bias': np.zeros(32)}, 'position': table * 0}
  patchless['class_token'] = params['class_token'] + table[:1]
  one_pixel = vit('mu/1', image_size=4, registers=1)
  features = apply(one_pixel, {'params': patchless}, tokens.reshape(2, *grid, 32))
  assert_close(apply(net, variables, images), features, atol=1e-4)


@pytest.mark.parametrize('positions', ['sincos2d', 'rope2d'])
def test_computed_positions_take_any_image_size_with_the_same_parameters(images, positions, random_variables):
  net = network(pos_embed=positions)
  variables = random_variables(net, images)
  assert 'position' not in variables['params']
  larger = np.zeros((1, 48, 64, 3), np.float32)
  assert apply(net, variables, larger).tokens.shape == (1, 1 + 48, 32)
  assert_close(
    apply(net, variables, larger), apply(network(pos_embed=positions, image_size=48), variables, larger), atol=0
  )


def test_pooling_reads_what_it_says(images, random_variables):
  features = apply(network(), random_variables(network(), images), images)
  assert_close(features.pooled, features.tokens[:, 0])
  net = network(pool='gap', registers=2)
  features = apply(net, random_variables(net, images), images)
  assert features.tokens.shape == (3, 2 + PATCHES, 32)
  assert_close(features.pooled, features.tokens[:, 2:].mean(axis=1))


def test_map_pooling_is_attention_of_one_learned_query_over_the_patches(images, random_variables):
  net = network(pool='map', registers=2)
  variables = random_variables(net, images)
  features, p = apply(net, variables, images), variables['params']['map_pool']
  x, a = features.tokens[:, 2:], p['attention']

  def heads(x, name):
    return (x @ a[name]['kernel'] + a[name]['bias']).reshape(*x.shape[:-1], 2, 16)

  query, key, value = heads(p['probe'][0], 'query'), heads(x, 'key'), heads(x, 'value')
  weights = np.exp(np.einsum('hk,bthk->bht', query, key) / 4)
  weights /= weights.sum(-1, keepdims=True)
  y = np.einsum('bht,bthk->bhk', weights, value).reshape(3, 32) @ a['out']['kernel'] + a['out']['bias']
  normed = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
  normed = normed * p['norm']['scale'] + p['norm']['bias']
  mlp = Mlp(BlockConfig(num_heads=2, mlp_dim=64)).apply({'params': p['mlp']}, normed)
  assert_close(features.pooled, y + mlp, atol=1e-4)


def test_bfloat16_is_close_to_float32_and_leaves_parameters_and_gradients_in_float32(images, random_variables):
  options = {'depth': 1, 'num_classes': 5, 'registers': 2, 'layer_scale': 1.0}
  variables = random_variables(network(**options), images)
  half = network(dtype='bfloat16', **options)
  shapes = jax.eval_shape(half.init, jax.random.key(0), images)
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}

  def loss(net, variables):
    features = net.apply(variables, images)
    return (features.output.astype(jnp.float32) ** 2).mean(), features

  gradients, features = jax.jit(jax.grad(lambda v: loss(half, v), has_aux=True))(variables)
  exact_gradients, exact = jax.jit(jax.grad(lambda v: loss(network(**options), v), has_aux=True))(variables)
  assert features.tokens.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype('float32')}
  jax.tree.map(  # features are of unit variance; bfloat16 has 8 bits
    lambda a, b: np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0, atol=0.1), features, exact
  )
  ours, theirs = (np.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in (gradients, exact_gradients))
  assert np.linalg.norm(ours - theirs) < 0.05 * np.linalg.norm(theirs)


def test_an_untrained_classifier_gives_equal_logits(images):
  net = network(num_classes=5)
  features = apply(net, jax.jit(net.init)(jax.random.key(0), images), images)
  np.testing.assert_array_equal(features.output, 0)


@pytest.mark.parametrize(
  ('build', 'message'),
  [
    (lambda: vit('Bb/16'), r"unknown ViT variant 'Bb/16'; did you mean 'B/16'\?"),
    (lambda: vit('B16'), 'unknown ViT variant'),
    (lambda: vit('B/16', image_size=100), 'image_size 100 is not divisible by the patch size 16'),
  ],
)
def test_a_wrong_name_or_size_is_a_clear_error(build, message):
  with pytest.raises(ValueError, match=message):
    build()


def test_a_wrong_input_or_number_of_heads_is_a_clear_error(images):
  with pytest.raises(ValueError, match='images of 30 x 32 pixels are not divisible by the patch size 8'):
    jax.eval_shape(network().init, jax.random.key(0), images[:, :30])
  with pytest.raises(ValueError, match='width 32 is not divisible by 3 heads'):
    jax.eval_shape(network(num_heads=3).init, jax.random.key(0), images)
  with pytest.raises(ValueError, match='head dimension divisible by 4, got 2'):
    jax.eval_shape(network(num_heads=16, pos_embed='rope2d').init, jax.random.key(0), images)


def test_taps_are_the_tokens_of_shorter_networks(random_variables):
  images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
  network = vit('mu/8', image_size=16, depth=4, registers=1)
  params = random_variables(network, images)['params']
  found = jax.jit(lambda params: network.apply({'params': params}, images, taps=(1, 3, 4)))(params)
  assert found.taps.shape[0] == 3
  for depth, tokens in zip((1, 3, 4), found.taps, strict=True):
    short = vit('mu/8', image_size=16, depth=depth, registers=1)
    own = {**params, 'blocks': jax.tree.map(lambda x, depth=depth: x[:depth], params['blocks'])}
    np.testing.assert_allclose(tokens, short.apply({'params': own}, images).tokens, atol=1e-5)
  np.testing.assert_array_equal(found.taps[2], found.tokens)
  with pytest.raises(ValueError, match=r'taps: expected increasing numbers of blocks from 1 to 4, got \(2, 5\)'):
    network.apply({'params': params}, images, taps=(2, 5))
