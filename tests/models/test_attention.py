import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.common.attention import ring
from fmcv_jax.models.common.attention.dispatch import attention, choose
from fmcv_jax.models.common.attention.masks import PrefixMask
from fmcv_jax.models.common.attention.single_tile import fits
from fmcv_jax.models.common.layers import Attention, BlockConfig
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import Placement

B, T, H, K = 2, 7, 2, 8
MESHES = {
  'one': MeshShape(data=1),
  'tokens': MeshShape(data=1, sequence=4),
  'all': MeshShape(data=2, sequence=2, tensor=2),
  'heads': MeshShape(data=2, tensor=2),
}


def inputs(dtype=jnp.float32, shape=(B, T, H, K)):
  return [jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 3)]


def masks():
  key = jnp.arange(T) < jnp.array([[4], [T]])
  pairs = jax.random.bernoulli(jax.random.key(1), 0.5, (B, H, T, T)) | jnp.eye(T, dtype=bool)
  return {'none': None, 'padding': key[:, None, None, :], 'pairs': pairs}


def placement_of(name):
  shape = MESHES[name]
  return Placement(make_mesh(shape, jax.devices()[: np.prod(shape.sizes())]))


def in_mesh(function, name):
  """`function` compiled under the mesh of that name; as it is for None."""

  def run(*args):
    with placement_of(name).active():
      return function(*args)

  return jax.jit(run if name else function)


CASES = [
  ('xla', None, 'none', False),
  ('xla', None, 'padding', True),
  ('xla', None, 'pairs', False),
  ('xla', None, 'pairs', True),
  ('short', 'one', 'none', False),
  ('short', 'one', 'none', True),
  ('short', 'one', 'padding', False),
  ('short', 'one', 'padding', True),
  ('splash', 'one', 'none', True),
  ('splash', 'one', 'padding', False),
  ('ring', 'one', 'padding', True),
  ('ring', 'tokens', 'none', True),
  ('ring', 'all', 'none', False),
  ('ring', 'all', 'padding', True),
]


@pytest.mark.parametrize(('backend', 'mesh', 'mask', 'causal'), CASES)
def test_outputs_and_gradients_equal_those_of_jax(backend, mesh, mask, causal, monkeypatch):
  monkeypatch.setattr(ring, 'BLOCK', 2)  # several blocks on each device
  q, k, v = inputs()
  weights, mask = jax.random.normal(jax.random.key(2), q.shape), masks()[mask]

  def ours(q, k, v):
    y = attention(q, k, v, causal=causal, mask=mask, backend=backend)
    return (y * weights).sum(), y

  def theirs(q, k, v):
    y = jax.nn.dot_product_attention(q, k, v, is_causal=causal, mask=mask, implementation='xla')
    return (y * weights).sum(), y

  ours = in_mesh(jax.grad(ours, argnums=(0, 1, 2), has_aux=True), mesh)(q, k, v)
  theirs = jax.jit(jax.grad(theirs, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), ours, theirs)


@pytest.mark.parametrize('backend', ['short', 'splash'])
@pytest.mark.parametrize(('prefix', 'softcap'), [(True, None), (False, 0.5), (True, 0.5)])
def test_kernels_of_language_models_equal_plain_attention_with_the_matrix_of_the_mask(backend, prefix, softcap):
  q, k, v = inputs()
  weights = jax.random.normal(jax.random.key(2), q.shape)
  mask = PrefixMask(jnp.arange(T) < jnp.array([[3], [T]])) if prefix else None

  def run(q, k, v, mask, backend):
    y = attention(q, k, v, causal=not prefix, mask=mask, softcap=softcap, backend=backend)
    return (y * weights).sum(), y

  def gradients(mask, backend, mesh):
    function = jax.grad(lambda *args: run(*args, mask, backend), argnums=(0, 1, 2), has_aux=True)
    return in_mesh(function, mesh)(q, k, v)

  kernel, plain = gradients(mask, backend, 'one'), gradients(mask.dense() if prefix else None, 'xla', None)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), kernel, plain)


@pytest.mark.parametrize(('kv_heads', 'mesh'), [(1, 'one'), (2, 'one'), (1, 'heads'), (2, 'heads')])
def test_the_kernel_reads_keys_that_heads_share_once(kv_heads, mesh):
  keys = jax.random.split(jax.random.key(0), 4)
  query, weights = (jax.random.normal(key, (2, 9, 4, 128)) for key in keys[:2])
  key, value = (jax.random.normal(key, (2, 9, kv_heads, 128)) for key in keys[2:])

  def run(query, key, value, backend):
    y = attention(query, key, value, causal=True, backend=backend)
    return (y * weights).sum(), y

  def gradients(backend, mesh):
    function = jax.grad(lambda *args: run(*args, backend), argnums=(0, 1, 2), has_aux=True)
    return in_mesh(function, mesh)(query, key, value)

  kernel, plain = gradients('short', mesh), gradients('xla', None)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-6), kernel, plain)


@pytest.mark.slow
@pytest.mark.parametrize('dim', [64, 72, 80, 128])
@pytest.mark.parametrize('tokens', [196, 197, 257, 576, 1024, 4096])
@pytest.mark.parametrize(('backend', 'mesh'), [('short', 'one'), ('splash', 'one'), ('ring', 'tokens')])
def test_real_token_counts_and_head_dimensions(backend, mesh, tokens, dim):
  args = inputs(shape=(1, tokens, 1, dim))
  if backend == 'short' and not fits(tokens, tokens, 1, dim):
    with pytest.raises(ValueError, match=f'{tokens} tokens and heads of {dim} are too many for one block'):
      in_mesh(lambda *args: attention(*args, backend=backend), mesh)(*args)
    return
  y = in_mesh(lambda *args: attention(*args, backend=backend), mesh)(*args)
  np.testing.assert_allclose(y, attention(*args), rtol=0, atol=2e-6)


@pytest.mark.parametrize(('backend', 'mesh'), [('xla', None), ('ring', 'tokens'), ('short', 'one'), ('splash', 'one')])
def test_a_fully_masked_query_gives_a_finite_output_and_finite_gradients(backend, mesh):
  q, k, v = inputs()
  mask = jnp.ones((B, 1, 1, T), bool).at[1].set(False)

  def total(q, k, v):
    y = attention(q, k, v, mask=mask, backend=backend)
    return y.sum(), y

  gradients, y = in_mesh(jax.grad(total, argnums=(0, 1, 2), has_aux=True), mesh)(q, k, v)
  if backend == 'xla':
    np.testing.assert_allclose(y[1], jnp.broadcast_to(v[1].mean(axis=0), y[1].shape), atol=1e-6)
  assert all(jnp.isfinite(x).all() for x in (y, *gradients))


@pytest.mark.parametrize(('backend', 'mesh'), [('xla', None), ('ring', 'tokens'), ('short', 'one'), ('splash', 'one')])
def test_logits_and_softmax_are_float32_whatever_the_inputs_are(backend, mesh):
  q, k, v = inputs(jnp.bfloat16)
  q = 10 * q  # logits of some tens, which bfloat16 would round by a tenth
  exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)))
  y = in_mesh(lambda *args: attention(*args, backend=backend), mesh)(q, k, v)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=0.01, atol=0.02)


def test_large_logits_do_not_overflow():
  q, k, v = inputs()
  assert jnp.isfinite(attention(1e4 * q, 1e4 * k, v)).all()


def test_the_ring_holds_no_matrix_of_queries_and_keys():
  """Four times the tokens on four times the devices: the temporaries of one device stay what they were."""
  sizes = {}
  for devices in (2, 8):
    placement = Placement(make_mesh(MeshShape(data=1, sequence=devices), jax.devices()[:devices]))
    shape = jax.ShapeDtypeStruct((1, 64 * devices, 2, 8), jnp.float32)
    split = placement.sharding(('batch', 'tokens', None, None), shape.shape, 'q')

    def run(q, k, v, placement=placement):
      with placement.active():
        return jax.grad(lambda q, k, v: attention(q, k, v).sum(), argnums=(0, 1, 2))(q, k, v)

    compiled = jax.jit(run, in_shardings=(split,) * 3, out_shardings=(split,) * 3).lower(*(shape,) * 3).compile()
    sizes[devices] = compiled.memory_analysis().temp_size_in_bytes
  assert sizes[8] <= 1.05 * sizes[2]


def test_a_network_over_split_tokens_equals_the_whole_one():
  """17 tokens (a class token) over 2 devices: the partitioner pads a size that is not divisible."""
  network = vit('Ti/16', image_size=64, depth=2, width=32, num_heads=2)
  images = jax.random.normal(jax.random.key(0), (4, 64, 64, 3))
  params = network.init(jax.random.key(1), images)

  def loss(params, images):
    return (network.apply(params, images).output ** 2).mean()

  plain, split = (in_mesh(jax.value_and_grad(loss), mesh)(params, images) for mesh in (None, 'all'))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, split)


def test_auto_chooses_by_platform_mesh_and_shapes():
  q, k, _ = inputs(shape=(B, 1024, 2, 64))
  pairs = jnp.ones((B, 1, 1024, 1024), bool)
  assert choose(q, k, None)[0] == 'xla'
  with placement_of('tokens').active():
    assert choose(q, k, None) == ('ring', 'the mesh splits the tokens')
    assert choose(q, k, pairs)[0] == 'xla'
    with pytest.raises(ValueError, match="attention='splash' needs all tokens on each device"):
      attention(q, k, k, backend='splash')
    with pytest.raises(ValueError, match=r"attention='ring' takes masks of shape \[B, 1, 1, T\]"):
      attention(q, k, k, mask=pairs, backend='ring')


@pytest.mark.parametrize(
  ('platform', 'tokens', 'dtype', 'dim', 'backend'),
  [
    ('tpu', 1281, 'bfloat16', 64, 'splash'),
    ('tpu', 1025, 'bfloat16', 64, 'short'),
    ('tpu', 1024, 'bfloat16', 72, 'splash'),
    ('tpu', 576, 'bfloat16', 72, 'short'),
    ('tpu', 729, 'bfloat16', 72, 'xla'),
    ('tpu', 1024, 'bfloat16', 64, 'short'),
    ('tpu', 256, 'bfloat16', 64, 'short'),
    ('tpu', 256, 'float32', 64, 'xla'),
    ('tpu', 1, 'bfloat16', 64, 'xla'),
    ('gpu', 256, 'bfloat16', 64, 'cudnn'),
    ('gpu', 256, 'float32', 64, 'xla'),
    ('gpu', 256, 'bfloat16', 256, 'xla'),
  ],
)
def test_auto_on_accelerators(monkeypatch, platform, tokens, dtype, dim, backend):
  monkeypatch.setattr('fmcv_jax.models.common.attention.dispatch.platform', lambda: platform)
  x = jax.ShapeDtypeStruct((1, tokens, 16, dim), dtype)
  assert choose(x, x, None)[0] == backend


@pytest.mark.parametrize(
  ('platform', 'tokens', 'backend'),
  [('tpu', 304, 'short'), ('tpu', 1072, 'short'), ('tpu', 4144, 'splash'), ('gpu', 304, 'xla')],
)
def test_auto_of_a_language_model_that_reads_images_is_a_kernel_on_tpus(monkeypatch, platform, tokens, backend):
  monkeypatch.setattr('fmcv_jax.models.common.attention.dispatch.platform', lambda: platform)
  query, key = (jax.ShapeDtypeStruct((1, tokens, heads, 256), 'bfloat16') for heads in (8, 1))
  mask = PrefixMask(jnp.ones((1, tokens), bool))
  assert choose(query, key, mask, 50.0)[0] == backend
  assert choose(query, key, mask)[0] == backend


def test_attention_over_a_context_of_another_length():
  x, context = jnp.ones((B, 3, 16)), jax.random.normal(jax.random.key(0), (B, 5, 16))
  layer = Attention(BlockConfig(num_heads=2, mlp_dim=32))
  y, _ = layer.init_with_output(jax.random.key(1), x, context)
  assert y.shape == x.shape


def test_heads_that_do_not_divide_the_width_are_an_error():
  with pytest.raises(ValueError, match='width 16 is not divisible by 3 heads'):
    Attention(BlockConfig(num_heads=3, mlp_dim=32)).init(jax.random.key(0), jnp.ones((1, 2, 16)))


def test_causal_config_masks_self_attention_but_not_a_context():
  torch = pytest.importorskip('torch')
  x, context = (np.random.default_rng(seed).normal(size=(B, n, 16)).astype(np.float32) for seed, n in ((0, 3), (1, 5)))
  layer = Attention(BlockConfig(num_heads=2, mlp_dim=32, causal=True))
  params = layer.init(jax.random.key(2), x, context)['params']

  def reference(keys, causal):
    def project(name, inputs):
      y = torch.from_numpy(inputs) @ torch.tensor(np.array(params[name]['kernel']))
      return y.reshape(B, -1, 2, 8).transpose(1, 2)

    query, key, value = project('query', x), project('key', keys), project('value', keys)
    y = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
    return y.transpose(1, 2).reshape(B, -1, 16) @ torch.tensor(np.array(params['out']['kernel']))

  for inputs, keys, causal in (((x, context), context, False), ((x,), x, True)):
    np.testing.assert_allclose(layer.apply({'params': params}, *inputs), reference(keys, causal), atol=1e-5)


def test_shapes_in_annotations_are_checked_in_tests():
  q, k, v = inputs()
  with pytest.raises(jaxtyping.TypeCheckError, match='key'):
    attention(q, k[..., :-1], v)
  with pytest.raises(jaxtyping.TypeCheckError, match='mask'):
    attention(q, k, v, mask=jnp.ones((1, 1, 1, k.shape[1]), jnp.float32))
