import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.models.layers import Block, BlockConfig, Mlp, Stack

CONFIG = BlockConfig(heads=2, mlp_dim=24, layer_scale=0.5)


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
    y = network.apply(variables, x, train=True, rngs={'dropout': jax.random.key(2)})
    return (y**2).sum(), y

  return jax.jit(jax.grad(loss, has_aux=True))(variables)


@pytest.fixture(scope='module')
def plain(variables, x):
  return outputs_and_gradients(tower(drop_path=0.5), variables, x)


@pytest.mark.parametrize('options', [{'unroll': 2}, {'unroll': 100}, {'remat': 'dots'}, {'remat': 'full', 'unroll': 3}])
def test_unroll_and_remat_change_neither_outputs_nor_gradients(plain, variables, x, options):
  found = outputs_and_gradients(tower(drop_path=0.5, **options), variables, x)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, plain)


def test_unroll_and_remat_change_no_parameter(variables, x):
  found = jax.jit(tower(unroll=3, remat='full').init)(jax.random.key(1), x)
  jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_blocks_of_a_stack_start_different_and_run_in_order(variables, x):
  kernels = variables['params']['blocks']['mlp']['up']['kernel']
  assert kernels.shape == (3, 16, 24)
  assert not jnp.allclose(kernels[0], kernels[1])
  y = x
  for i in range(3):
    y, _ = Block(CONFIG).apply({'params': jax.tree.map(lambda p, i=i: p[i], variables['params']['blocks'])}, y)
  np.testing.assert_allclose(tower().apply(variables, x), y, rtol=1e-4, atol=1e-5)


def test_drop_path_is_off_in_evaluation_and_needs_no_rng_there(variables, x):
  np.testing.assert_array_equal(tower(drop_path=0.9).apply(variables, x), tower().apply(variables, x))


def test_drop_path_skips_whole_branches_of_examples_and_keeps_the_expectation(x):
  rate, many = 0.3, jnp.broadcast_to(x[:1], (4000, *x.shape[1:]))
  block = Block(CONFIG, train=True)
  params = block.init(jax.random.key(1), x[:1])['params']
  params['mlp']['down'] = jax.tree.map(jnp.zeros_like, params['mlp']['down'])  # only the attention branch is left
  branch = block.apply({'params': params}, x[:1])[0] - x[:1]
  y = jax.jit(lambda x: block.apply({'params': params}, x, rate, rngs={'dropout': jax.random.key(2)})[0])(many)

  skipped = jnp.isclose(y, many, atol=1e-6).all(axis=(1, 2))
  kept = jnp.isclose(y, many + branch / (1 - rate), atol=1e-5).all(axis=(1, 2))
  assert (skipped ^ kept).all()
  sigma = (rate * (1 - rate) / len(many)) ** 0.5
  assert abs(skipped.mean() - rate) < 4 * sigma
  np.testing.assert_allclose(y.mean(axis=0), (many + branch)[0], atol=6 * sigma * float(jnp.abs(branch).max()))


def test_drop_path_rises_from_nothing_in_the_first_block_to_its_rate_in_the_last(variables, x):
  two = {'params': {'blocks': jax.tree.map(lambda p: p[:2], variables['params']['blocks'])}}
  network = tower(depth=2, drop_path=1 - 1e-6)
  y = jax.jit(lambda x: network.apply(two, x, train=True, rngs={'dropout': jax.random.key(2)}))(x)
  first = jax.tree.map(lambda p: p[0], variables['params']['blocks'])
  np.testing.assert_allclose(y, Block(CONFIG).apply({'params': first}, x)[0], rtol=1e-4, atol=1e-5)


def test_dropout_is_off_in_evaluation(variables, x):
  noisy = Tower(Stack(3, BlockConfig(heads=2, mlp_dim=24, layer_scale=0.5, dropout=0.5)))
  np.testing.assert_array_equal(noisy.apply(variables, x), tower().apply(variables, x))
  trained = noisy.apply(variables, x, train=True, rngs={'dropout': jax.random.key(2)})
  assert not jnp.allclose(trained, tower().apply(variables, x), atol=1e-3)


def test_a_gated_mlp_multiplies_the_activated_gate_with_up(x):
  mlp = Mlp(BlockConfig(heads=2, mlp_dim=24, gated=True, activation='silu'))
  y, variables = mlp.init_with_output(jax.random.key(0), x)
  p = variables['params']
  up, gate = (x @ p[name]['kernel'] + p[name]['bias'] for name in ('up', 'gate'))
  expected = (gate / (1 + jnp.exp(-gate)) * up) @ p['down']['kernel'] + p['down']['bias']
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
