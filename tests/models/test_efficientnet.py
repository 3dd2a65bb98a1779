import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.models.backbones.efficientnet import EfficientNet, Row, efficientnet
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.parameter_axes import trace_init
from fmcv_jax.parallel.rules import Placement

NET = EfficientNet((Row(1, 16, 3, 1, 1), Row(3, 24, 5, 2, 6)), stem=8, top=32, image_size=16, drop_path=0.5)
IMAGES = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)


def test_training_uses_the_batchs_statistics_and_hands_back_the_running_ones():
  variables = jax.jit(NET.init)(jax.random.key(0), IMAGES)
  assert jax.tree.leaves(variables['batch_stats']['norm']['mean'])[0].max() == 0  # init uses no data

  def train(variables):
    return NET.apply(variables, IMAGES, train=True, rngs={'dropout': jax.random.key(1)}, mutable=['batch_stats'])

  _, new = jax.jit(train)(variables)
  kernel = np.asarray(variables['params']['conv']['kernel'], np.float64)
  padded = np.pad(IMAGES.astype(np.float64), ((0, 0), (0, 1), (0, 1), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::2, ::2]
  stem = np.einsum('brcdij,ijdk->brck', windows, kernel)
  for name, start, now in (('mean', 0, stem.mean((0, 1, 2))), ('var', 1, stem.var((0, 1, 2)))):
    expected = 0.99 * start + 0.01 * now
    np.testing.assert_allclose(new['batch_stats']['norm'][name], expected, rtol=1e-5, atol=1e-7)
  assert all(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(variables['batch_stats'])))


def test_statistics_on_a_mesh_are_those_of_the_whole_batch():
  network = EfficientNet((Row(1, 8, 3, 2, 2),), stem=8, top=0, image_size=16)
  images = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)
  images *= np.arange(1, 9)[:, None, None, None]  # no part of the batch is like another
  placement = Placement(make_mesh(MeshShape(data=2, fsdp=2, tensor=2)))
  variables = jax.jit(network.init)(jax.random.key(0), images)

  def train(variables, images):
    return network.apply(variables, images, train=True, mutable=['batch_stats'])

  def on_mesh(variables, images):
    with placement.active():
      return train(variables, images)

  features, statistics = jax.jit(train)(variables, images)
  _, rows = trace_init(lambda: network.init(jax.random.key(0), images))
  params = jax.device_put(variables['params'], placement.parameters(variables['params'], rows))
  spread = jax.device_put(images, placement.batch({'image': images})['image'])
  on_eight, theirs = jax.jit(on_mesh)({**variables, 'params': params}, spread)
  np.testing.assert_allclose(on_eight.pooled, features.pooled, rtol=1e-4, atol=1e-5)
  for a, b in zip(jax.tree.leaves(statistics), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-7)


def test_any_size_of_image_and_bfloat16():
  net = efficientnet('mu', num_classes=5, dtype='bfloat16')
  shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}
  features = jax.eval_shape(net.apply, shapes, jnp.zeros((2, 33, 50, 3)))
  assert (features.output.shape, features.tokens.shape) == ((2, 5), (2, 2 * 2, net.width))
  assert features.output.dtype == jnp.bfloat16


def test_an_unknown_name_is_a_clear_error():
  with pytest.raises(ValueError, match="unknown EfficientNet variant 'B8'; known: B0"):
    efficientnet('B8')


@pytest.mark.parametrize('output_stride', [4, 8, 16, 32])
def test_maps_of_small_images_need_not_shrink_to_a_point(output_stride):
  net = efficientnet('mu', output_stride=output_stride)
  features, _ = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), jnp.zeros((2, 32, 32, 3))))
  assert net.patch_size == output_stride
  assert features.tokens.shape[1] == (32 // output_stride) ** 2
  with pytest.raises(ValueError, match='output_stride 12 is none of 2, 4, 8, 16, 32'):
    efficientnet('mu', output_stride=12)
