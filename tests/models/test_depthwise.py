import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.models.common.depthwise import Depthwise
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import Placement


@pytest.mark.parametrize(
  ('side', 'size', 'stride'), [(16, 3, 1), (16, 3, 2), (9, 5, 1), (9, 5, 2), (10, 5, 2), (1, 5, 2)]
)
def test_shifted_maps_sum_to_the_convolution(side, size, stride):
  layer = Depthwise(size, stride, 'float32')
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(2, side, side + 3, 6)), rng.normal(size=(size, size, 1, 6))

  def with_gradients(form):
    gradients = jax.grad(lambda x, kernel: jnp.sum(jnp.sin(form(x, kernel))), (0, 1))
    return jax.jit(lambda x, kernel: (form(x, kernel), *gradients(x, kernel)))(x, kernel)

  for ours, theirs in zip(with_gradients(layer.sum_of_shifts), with_gradients(layer.convolution), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize('channels', [None, 'mlp'])
@pytest.mark.parametrize('form', ['convolution', 'sum_of_shifts'])
def test_gradients_on_a_mesh_that_does_not_split_the_batch_everywhere_are_those_of_one_device(form, channels):
  """Where every device convolves its own examples; XLA's partitioner alone doubles the gradient of the kernel here."""
  function = getattr(Depthwise(3, 1, 'float32', channels), form)
  rng = np.random.default_rng(0)
  x, kernel, weights = (rng.normal(size=s).astype(np.float32) for s in ((8, 5, 6, 4), (3, 3, 1, 4), (8, 5, 6, 4)))
  placement = Placement(make_mesh(MeshShape(data=2, fsdp=2, tensor=2)))

  def loss(x, kernel):
    return jnp.sum(jnp.tanh(function(x, kernel)) * weights)

  def on_mesh(x, kernel):
    with placement.active():
      return jax.grad(loss, (0, 1))(x, kernel)

  spread = jax.device_put(x, placement.sharding(('batch', None, None, None), x.shape, 'x'))
  ours = jax.jit(on_mesh)(spread, jax.device_put(kernel, placement.replicated()))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, jax.grad(loss, (0, 1))(x, kernel))
