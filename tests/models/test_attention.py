import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.models.attention import ATTENTION, xla_attention
from fmcv_jax.models.layers import Attention, BlockConfig

B, T, H, K = 2, 7, 3, 8


def inputs(dtype=jnp.float32, shape=(B, T, H, K)):
  return [jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 3)]


def masks():
  key = jnp.arange(T) < jnp.array([[4], [T]])
  pairs = jax.random.bernoulli(jax.random.key(1), 0.5, (B, H, T, T)) | jnp.eye(T, dtype=bool)
  return {'none': None, 'padding': key[:, None, None, :], 'pairs': pairs}


@pytest.mark.parametrize('mask', ['none', 'padding', 'pairs'])
@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('name', sorted(ATTENTION))
def test_outputs_and_gradients_equal_those_of_jax(name, causal, mask):
  q, k, v = inputs()
  weights, mask = jax.random.normal(jax.random.key(2), q.shape), masks()[mask]

  def ours(q, k, v):
    y = ATTENTION[name](q, k, v, causal=causal, mask=mask)
    return (y * weights).sum(), y

  def theirs(q, k, v):
    y = jax.nn.dot_product_attention(q, k, v, is_causal=causal, mask=mask, implementation='xla')
    return (y * weights).sum(), y

  ours, theirs = (jax.jit(jax.grad(f, argnums=(0, 1, 2), has_aux=True))(q, k, v) for f in (ours, theirs))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), ours, theirs)


def test_a_query_that_may_look_nowhere_gives_the_mean_of_the_values_and_finite_gradients():
  q, k, v = inputs()
  mask = jnp.ones((1, 1, T, T), bool).at[:, :, 2].set(False)

  def total(q, k, v):
    y = xla_attention(q, k, v, mask=mask)
    return y.sum(), y

  gradients, y = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  np.testing.assert_allclose(y[:, 2], v.mean(axis=1), atol=1e-6)
  assert all(jnp.isfinite(g).all() for g in gradients)


def test_logits_and_softmax_are_float32_whatever_the_inputs_are():
  q, k, v = inputs(jnp.bfloat16)
  q = 10 * q  # logits of some tens, which bfloat16 would round by a tenth
  exact = xla_attention(*(x.astype(jnp.float32) for x in (q, k, v)))
  y = xla_attention(q, k, v)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=0.01, atol=0.01)


def test_large_logits_do_not_overflow():
  q, k, v = inputs()
  assert jnp.isfinite(xla_attention(1e4 * q, 1e4 * k, v)).all()


def test_attention_over_a_context_of_another_length():
  x, context = jnp.ones((B, 3, 16)), jax.random.normal(jax.random.key(0), (B, 5, 16))
  layer = Attention(BlockConfig(heads=2, mlp_dim=32))
  y, _ = layer.init_with_output(jax.random.key(1), x, context)
  assert y.shape == x.shape


def test_heads_that_do_not_divide_the_width_are_an_error():
  with pytest.raises(ValueError, match='width of 16 does not divide into 3 heads'):
    Attention(BlockConfig(heads=3, mlp_dim=32)).init(jax.random.key(0), jnp.ones((1, 2, 16)))
