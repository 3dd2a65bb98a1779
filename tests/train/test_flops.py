import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec

from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.common.attention.fused import splash_attention
from fmcv_jax.train.flops import matmul_flops


def array(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def convolve(x, kernel, stride=1, padding='SAME', **kwargs):
  numbers = ('NHWC', 'HWIO', 'NHWC')
  return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=numbers, **kwargs)


def test_a_matrix_product_is_two_operations_per_multiply_add():
  assert matmul_flops(jnp.matmul, array(5, 7), array(7, 11)) == 2 * 5 * 7 * 11
  assert matmul_flops(jnp.dot, array(7), array(7)) == 2 * 7


def test_batched_and_contracted_axes_each_count_once():
  assert matmul_flops(lambda q, k: jnp.einsum('bqhd,bkhd->bhqk', q, k), array(2, 5, 3, 8), array(2, 7, 3, 8)) == (
    2 * 2 * 3 * 5 * 7 * 8
  )
  assert matmul_flops(lambda a, b: jnp.einsum('xyz,yzw->xw', a, b), array(2, 3, 4), array(3, 4, 5)) == 2 * 2 * 12 * 5


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_a_grouped_convolution_sums_over_the_channels_of_one_group(groups):
  flops = matmul_flops(
    lambda x, k: convolve(x, k, feature_group_count=groups), array(2, 8, 10, 4), array(3, 5, 4 // groups, 12)
  )
  assert flops == 2 * (2 * 8 * 10 * 12) * (3 * 5 * 4 // groups)


def test_stride_and_dilation_change_only_the_number_of_outputs():
  kernel = array(3, 3, 4, 6)
  assert matmul_flops(lambda x, k: convolve(x, k, stride=2), array(1, 8, 8, 4), kernel) == 2 * 16 * 6 * 36
  dilated = matmul_flops(lambda x, k: convolve(x, k, padding='VALID', rhs_dilation=(2, 2)), array(1, 8, 8, 4), kernel)
  assert dilated == 2 * 16 * 6 * 36


@pytest.mark.parametrize(('stride', 'groups'), [(1, 1), (2, 1), (2, 2), (1, 4)])
def test_each_gradient_of_a_convolution_costs_as_much_as_the_convolution(stride, groups):
  x, kernel = array(2, 8, 8, 4), array(2, 2, 4 // groups, 8)

  def loss(x, kernel):
    return convolve(x, kernel, stride, 'VALID', feature_group_count=groups).sum()

  forward = matmul_flops(loss, x, kernel)
  assert matmul_flops(jax.grad(loss, argnums=1), x, kernel) == 2 * forward
  if stride == 2:  # with stride 1 the gradient by x is padded, and padding counts
    assert matmul_flops(jax.grad(loss, argnums=0), x, kernel) == 2 * forward


def test_a_scan_counts_every_pass():
  def chain(x, weights):
    return lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

  assert matmul_flops(chain, array(3, 8), array(6, 8, 8)) == 6 * 2 * 3 * 8 * 8
  nested = jax.vmap(chain, in_axes=(0, None))
  assert matmul_flops(nested, array(5, 3, 8), array(6, 8, 8)) == 5 * 6 * 2 * 3 * 8 * 8


def test_a_loop_with_constant_bounds_counts_every_pass():
  assert matmul_flops(lambda x: lax.fori_loop(0, 7, lambda _, x: x @ x, x), array(4, 4)) == 7 * 2 * 4**3


def test_a_while_loop_over_matrix_products_is_an_error_and_one_without_is_free():
  with pytest.raises(ValueError, match='while loop'):
    matmul_flops(lambda x: lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x), array(4, 4))
  assert matmul_flops(lambda x: lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x + 1, x) @ x, array(4, 4)) == 2 * 4**3


def test_a_conditional_counts_its_most_expensive_branch():
  def either(which, x):
    return lax.switch(which, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

  assert matmul_flops(either, jax.ShapeDtypeStruct((), jnp.int32), array(4, 4)) == 2 * 2 * 4**3


def test_flops_inside_jit_and_custom_derivatives_are_counted():
  @jax.custom_jvp
  def square(x):
    return x @ x

  square.defjvp(lambda primals, tangents: (square(*primals), tangents[0] @ primals[0] + primals[0] @ tangents[0]))

  @jax.custom_vjp
  def cube(x):
    return x @ x @ x

  cube.defvjp(lambda x: (cube(x), x), lambda x, g: (g,))
  assert matmul_flops(jax.jit(lambda x: jax.jit(square)(x)), array(4, 4)) == 2 * 4**3
  assert matmul_flops(lambda x: cube(square(x)), array(4, 4)) == 3 * 2 * 4**3


def test_a_shard_map_counts_all_its_devices():
  mesh = Mesh(jax.devices()[:1], ('data',))
  spec = PartitionSpec('data')
  sharded = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
  assert matmul_flops(sharded, array(4, 5), array(5, 6)) == 2 * 4 * 5 * 6

  auto = jax.sharding.AxisType.Auto
  wide = jax.sharding.AbstractMesh((4, 2), ('data', 'tensor'), axis_types=(auto, auto))
  in_specs, out_specs = (spec, PartitionSpec(None, 'tensor')), PartitionSpec('data', 'tensor')
  sharded = jax.shard_map(jnp.matmul, mesh=wide, in_specs=in_specs, out_specs=out_specs)
  assert matmul_flops(sharded, array(4, 5), array(5, 6)) == 2 * 4 * 5 * 6


def mlp_loss(weights, x):
  for w in weights:
    x = jnp.tanh(x @ w)
  return x.sum()


def test_a_gradient_costs_three_forward_passes_less_the_gradient_by_the_input():
  weights, x = [array(8, 16), array(16, 16), array(16, 4)], array(5, 8)
  forward = matmul_flops(mlp_loss, weights, x)
  assert forward == 2 * 5 * (8 * 16 + 16 * 16 + 16 * 4)
  assert matmul_flops(jax.grad(mlp_loss), weights, x) == 3 * forward - 2 * 5 * 8 * 16
  assert matmul_flops(jax.grad(mlp_loss, argnums=(0, 1)), weights, x) == 3 * forward


def test_rematerialization_adds_one_forward_pass():
  weights, x = [array(8, 16), array(16, 16), array(16, 4)], array(5, 8)
  again = jax.checkpoint(mlp_loss)  # tanh's derivative needs its own output, so the last product is computed again too
  forward, plain = matmul_flops(mlp_loss, weights, x), matmul_flops(jax.grad(mlp_loss), weights, x)
  assert matmul_flops(jax.grad(again), weights, x) == plain + forward


def test_the_networks_cost_the_same_however_their_depth_is_laid_out():
  images = array(1, 16, 16, 3)
  counts = set()
  for unroll in (1, 2):
    network = vit('mu/8', image_size=16, unroll=unroll)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    counts.add(matmul_flops(network.apply, variables, images))
  tokens, width, hidden = 5, 32, 64
  block = 4 * tokens * width**2 + 2 * tokens * width * hidden + 2 * tokens**2 * width
  assert counts == {2 * (4 * 8 * 8 * 3 * width + 2 * block)}


def test_a_kernel_counts_every_point_of_its_grid():
  def matmul(x, y):
    def tile(x, y, z):
      z[...] = x[...] @ y[...]

    return pl.pallas_call(
      tile,
      grid=(4, 3),
      in_specs=[pl.BlockSpec((8, 16), lambda i, j: (i, 0)), pl.BlockSpec((16, 8), lambda i, j: (0, j))],
      out_specs=pl.BlockSpec((8, 8), lambda i, j: (i, j)),
      out_shape=array(32, 24),
    )(x, y)

  assert matmul_flops(matmul, array(32, 16), array(16, 24)) == 2 * 32 * 16 * 24


def test_tiled_attention_computes_its_logits_again_for_each_gradient():
  x = array(3, 2048, 2, 64)
  product = 2 * 3 * 2 * 2048**2 * 64
  assert matmul_flops(splash_attention, x, x, x) == 2 * product
  loss = jax.grad(lambda *x: splash_attention(*x).sum(), argnums=(0, 1, 2))
  # Forwards two; by queries the logits, those of the weights, and the gradient; by keys and values the logits, the
  # weights', and two gradients; in addition, a sum for each query.
  assert matmul_flops(loss, x, x, x) == pytest.approx((2 + 3 + 4) * product, rel=1e-3)


def test_a_function_that_is_jitted_with_options_for_its_compiler_is_counted():
  options = {'xla_cpu_enable_fast_math': True}
  assert matmul_flops(jax.jit(jnp.matmul, compiler_options=options), array(5, 7), array(7, 11)) == 2 * 5 * 7 * 11
