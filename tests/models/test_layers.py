import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.diffusion.condition import make_condition
from fmcv_jax.models.common.layers import Block, BlockConfig, Mlp, Stack, dense
from fmcv_jax.models.generative.autoencoder import autoencoder
from fmcv_jax.models.generative.mmdit import mmdit
from fmcv_jax.models.generative.unet import unet
from fmcv_jax.train.flops import matmul_flops

CONFIG = BlockConfig(num_heads=2, mlp_dim=24, layer_scale=0.5)
RNG = {'dropout': jax.random.key(2)}


class Tower(nn.Module):
  stack: Stack

  @nn.compact
  def __call__(self, x, train=False):
    return self.stack(x, train=train)


def tower(depth=3, **options):
  return Tower(Stack(depth, CONFIG, **options))


@pytest.fixture(scope='module')
def x():
  return np.random.default_rng(0).normal(size=(4, 5, 16)).astype(np.float32)


@pytest.fixture(scope='module')
def variables(random_variables, x):
  return random_variables(tower(), x)


def apply(network, variables, x, **kwargs):
  return np.asarray(jax.jit(lambda v, x: network.apply(v, x, **kwargs))(variables, x))


def outputs_and_gradients(network, variables, x):
  def loss(variables):
    y = network.apply(variables, x, train=True, rngs=RNG)
    return (y**2).sum(), y

  return jax.jit(jax.grad(loss, has_aux=True))(variables)


@pytest.fixture(scope='module')
def plain(variables, x):
  return outputs_and_gradients(tower(drop_path=0.5), variables, x)


@pytest.mark.parametrize(
  'options',
  [
    {'unroll': 2},
    {'unroll': 100},
    {'unroll': True},
    {'unroll': False},
    {'remat': 'dots'},
    {'remat': 'full', 'unroll': 3},
  ],
)
def test_unroll_and_remat_change_neither_outputs_nor_gradients(plain, variables, x, options):
  found = outputs_and_gradients(tower(drop_path=0.5, **options), variables, x)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * (1 + np.abs(b).max())), found, plain)


def test_unroll_and_remat_change_no_parameter(x):
  plain, changed = (jax.jit(n.init)(jax.random.key(1), x) for n in (tower(), tower(unroll=3, remat='full')))
  jax.tree.map(np.testing.assert_array_equal, plain, changed)
  kernels = plain['params']['blocks']['mlp']['up']['kernel']
  assert kernels.shape == (3, 16, 24)
  assert not np.allclose(kernels[0], kernels[1])  # each block has its own initial values


IMAGES, LATENT, TEXT = (np.zeros(shape, np.float32) for shape in ((1, 16, 16, 3), (1, 8, 8, 4), (1, 3, 16)))


@pytest.mark.parametrize(
  ('network', 'inputs'),
  [
    (lambda remat: tower(remat=remat, unroll=3), (np.zeros((4, 5, 16), np.float32),)),
    pytest.param(
      lambda remat: unet('mu', remat=remat), (LATENT, np.zeros(1), make_condition(text=TEXT)), marks=pytest.mark.slow
    ),
    (
      lambda remat: mmdit('mu/2', channels=4, depth=2, remat=remat),
      (LATENT, np.zeros(1), make_condition(text=TEXT, pooled_text=TEXT[:, 0])),
    ),
    (lambda remat: autoencoder(channels=(8, 16), layers=3, image_size=16, remat=remat), (IMAGES,)),
  ],
  ids=['unrolled', 'unet', 'mmdit', 'autoencoder'],
)
def test_the_compiler_does_not_undo_remat_where_no_scan_keeps_the_passes_apart(network, inputs):
  def flops(remat):
    module = network(remat)
    variables = jax.eval_shape(lambda: network('none').init(jax.random.key(0), *inputs))
    gradient = jax.grad(lambda variables: jnp.sum(jax.tree.leaves(module.apply(variables, *inputs))[0] ** 2))
    return jax.jit(gradient).lower(variables).compile().cost_analysis()['flops']

  # A forward pass more is a third, but for products that no gradient asks for, such as the last of a residual block.
  assert flops('full') > 1.1 * flops('none')


def test_remat_of_dots_computes_no_convolution_and_no_product_with_weights_again():
  """Without words every product of the small UNet is one with weights."""

  def flops(remat):
    network = unet('mu', remat=remat, cross_attention_dim=0, depths=(0, 0), image_size=16)
    inputs = np.zeros((1, 16, 16, 4), np.float32), np.zeros(1)
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), *inputs))
    return matmul_flops(jax.grad(lambda variables: jnp.sum(network.apply(variables, *inputs) ** 2)), variables)

  logits = 2 * 2 * 64 * 64 * 32  # of the attention in the middle, and their product with values
  assert flops('none') <= flops('dots') <= flops('none') + logits
  assert flops('full') > 1.1 * flops('none')


def block_of(variables, i):
  return {'params': jax.tree.map(lambda p: p[i], variables['params']['blocks'])}


def test_the_blocks_of_a_stack_run_in_order(variables, x):
  y, block = x, jax.jit(Block(CONFIG).apply)
  for i in range(3):
    y, _ = block(block_of(variables, i), y)
  np.testing.assert_allclose(apply(tower(), variables, x), y, rtol=1e-4, atol=1e-5)


def test_a_parallel_block_adds_attention_of_normalized_queries_and_keys_and_mlp_of_one_norm(random_variables, x):
  """Dehghani et al. 2023, section 2.1: x + MLP(LN(x)) + softmax(LN(XQ) LN(XK)^T / sqrt(d)) XV, in numpy float64."""
  block = Block(BlockConfig(num_heads=2, mlp_dim=24, activation='relu', parallel=True, qk_norm=True))
  variables = random_variables(block, x)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables['params'])
  assert p.keys() == {'norm1', 'attention', 'mlp'}

  def norm(y, p):
    centered = y - y.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6) * p['scale'] + p['bias']

  def project(y, p):
    return y @ p['kernel'] + p['bias']

  y, attention = norm(x.astype(np.float64), p['norm1']), p['attention']
  query, key, value = (project(y, attention[name]).reshape(4, 5, 2, 8) for name in ('query', 'key', 'value'))
  query, key = norm(query, attention['query_norm']), norm(key, attention['key_norm'])
  logits = np.einsum('bqhk,bthk->bhqt', query, key) / 8**0.5
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  mixed = project(np.einsum('bhqt,bthk->bqhk', weights, value).reshape(4, 5, 16), attention['out'])
  mlp = project(np.maximum(project(y, p['mlp']['up']), 0), p['mlp']['down'])
  np.testing.assert_allclose(jax.jit(block.apply)(variables, x)[0], x + mixed + mlp, rtol=1e-4, atol=1e-5)


def test_drop_path_is_off_in_evaluation_and_needs_no_rng_there(variables, x):
  np.testing.assert_array_equal(apply(tower(drop_path=0.9), variables, x), apply(tower(), variables, x))


def test_drop_path_skips_whole_branches_of_examples_and_keeps_the_expectation(variables, x):
  rate, many = 0.3, np.broadcast_to(x[:1], (4000, *x.shape[1:]))
  params = block_of(variables, 0)['params']
  params['mlp'] = {**params['mlp'], 'down': jax.tree.map(np.zeros_like, params['mlp']['down'])}  # attention is left

  def run(x, rate=None):
    block = Block(CONFIG, train=rate is not None)
    return np.asarray(jax.jit(lambda x: block.apply({'params': params}, x, rate, rngs=RNG)[0])(x))

  branch, y = run(x[:1]) - x[:1], run(many, rate)
  skipped = np.isclose(y, many, atol=1e-6).all(axis=(1, 2))
  kept = np.isclose(y, many + branch / (1 - rate), rtol=1e-4, atol=1e-5).all(axis=(1, 2))
  assert (skipped ^ kept).all()
  sigma = (rate * (1 - rate) / len(many)) ** 0.5
  assert abs(skipped.mean() - rate) < 4 * sigma
  np.testing.assert_allclose(y.mean(axis=0), (many + branch)[0], atol=6 * sigma * np.abs(branch).max())


def test_drop_path_rises_from_zero_in_the_first_block_to_its_rate_in_the_last(variables, x):
  one, two = (jax.tree.map(lambda p, n=n: p[:n], variables) for n in (1, 2))
  y = apply(tower(depth=2, drop_path=1 - 1e-6), two, x, train=True, rngs=RNG)
  np.testing.assert_allclose(y, apply(tower(depth=1), one, x), rtol=1e-4, atol=1e-5)


def test_dropout_is_off_in_evaluation(variables, x):
  noisy, plain = Tower(Stack(3, dataclasses.replace(CONFIG, dropout=0.5))), apply(tower(), variables, x)
  np.testing.assert_array_equal(apply(noisy, variables, x), plain)
  assert not np.allclose(apply(noisy, variables, x, train=True, rngs=RNG), plain, atol=1e-3)


def test_a_gated_mlp_multiplies_the_activated_gate_with_up(random_variables, x):
  mlp = Mlp(BlockConfig(num_heads=2, mlp_dim=24, gated_mlp=True, activation='silu'))
  variables = random_variables(mlp, x)
  p = variables['params']
  up, gate = (x @ p[name]['kernel'] + p[name]['bias'] for name in ('up', 'gate'))
  expected = (gate / (1 + np.exp(-gate)) * up) @ p['down']['kernel'] + p['down']['bias']
  np.testing.assert_allclose(apply(mlp, variables, x), expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_bias_is_a_sum_in_float32_whatever_the_products_are_in():
  layer, x = dense(2, 'bfloat16', 'layer'), jnp.ones((1, 257, 4), jnp.bfloat16)  # bfloat16 knows 256 and 258
  variables = layer.init(jax.random.key(0), x)
  gradient = jax.grad(lambda variables: layer.apply(variables, x).astype(jnp.float32).sum())(variables)
  np.testing.assert_array_equal(gradient['params']['bias'], [257, 257])


def test_a_dense_layer_is_flax_s():
  x = jax.random.normal(jax.random.key(0), (3, 5, 4))
  ours, theirs = dense(6, 'float32', 'layer'), nn.Dense(6)
  variables = theirs.init(jax.random.key(1), x)
  assert jax.tree.map(jnp.shape, ours.init(jax.random.key(1), x)) == jax.tree.map(jnp.shape, variables)
  np.testing.assert_array_equal(ours.apply(variables, x), theirs.apply(variables, x))
