"""The ring of pairs against the whole matrix of logits, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.objectives import ring_contrastive
from fmcv_jax.objectives.ring_contrastive import pair_loss
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import Placement

B, E = 48, 12
KINDS = [('softmax', 0.0), ('softmax', 0.1), ('sigmoid', 0.0)]


def inputs():
  generator = np.random.default_rng(0)
  image, text = generator.normal(size=(2, B, E))
  text += image  # so that some images find their text and others do not
  return [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text)] + [7.0, -3.0]


def whole(image, text, scale, bias, kind, smoothing):
  """The definition, with every logit in memory."""
  logits = scale * image @ text.T + bias
  count = len(logits)
  if kind == 'sigmoid':
    signs = 2 * jnp.eye(count) - 1
    return jnp.log1p(jnp.exp(-signs * logits)).sum() / count
  targets = (1 - smoothing) * jnp.eye(count) + smoothing / count
  rows, columns = (jax.nn.log_softmax(logits, axis) for axis in (1, 0))
  return -((rows + columns) * targets).sum() / (2 * count)


@functools.cache
def reference(kind, smoothing):
  with jax.enable_x64(True):
    args = [jnp.asarray(x, jnp.float64) for x in inputs()]
    fn = jax.jit(jax.value_and_grad(whole, argnums=(0, 1, 2, 3)), static_argnums=(4, 5))
    value, gradients = jax.device_get(fn(*args, kind, smoothing))
  image, text, *_ = inputs()
  return value, gradients, np.mean((image @ text.T).argmax(1) == np.arange(B))


@pytest.mark.parametrize('mesh', [None, MeshShape(), MeshShape(data=2, fsdp=2, tensor=2)], ids=['none', 'data', 'both'])
@pytest.mark.parametrize(('kind', 'smoothing'), KINDS)
def test_loss_accuracy_and_gradients_equal_the_whole_matrix(kind, smoothing, mesh, monkeypatch):
  monkeypatch.setattr(ring_contrastive, 'BLOCK', 4)  # several blocks on each device
  placement = mesh and Placement(make_mesh(mesh, jax.devices()))

  def ours(*args):
    return pair_loss(*args, kind, smoothing)

  def run(*args):
    if placement is None:
      return jax.value_and_grad(ours, argnums=(0, 1, 2, 3), has_aux=True)(*args)
    with placement.active():
      return jax.value_and_grad(ours, argnums=(0, 1, 2, 3), has_aux=True)(*args)

  args = [jnp.asarray(x, jnp.float32) for x in inputs()]
  if placement:
    args[:2] = jax.device_put(args[:2], placement.batch(args[:2]))
  (loss, accuracy), gradients = jax.jit(run)(*args)
  value, expected, share = reference(kind, smoothing)
  assert float(loss) == pytest.approx(value, rel=1e-6)
  assert 0.2 < share < 1
  assert float(accuracy) == pytest.approx(share)
  for got, want in zip(gradients, expected, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * max(abs(want).max(), 0.1))


def test_equal_logits_give_log_batch_and_a_strong_diagonal_zero():
  same = jnp.zeros((32, 32))
  assert float(pair_loss(same, same, 1.0, 0.0, 'softmax')[0]) == pytest.approx(np.log(32), rel=1e-6)
  assert float(pair_loss(jnp.eye(32), jnp.eye(32), 100.0, 0.0, 'softmax')[0]) == pytest.approx(0, abs=1e-6)


def test_no_device_holds_the_matrix_and_none_holds_all_texts():
  """Twice the devices with as many pairs each: the temporaries of one device stay what they were."""
  sizes = {}
  for devices in (2, 4, 8):
    placement = Placement(make_mesh(MeshShape(), jax.devices()[:devices]))
    shape = jax.ShapeDtypeStruct((128 * devices, 64), jnp.float32)

    def run(image, text, placement=placement):
      with placement.active():
        return jax.grad(lambda i, t: pair_loss(i, t, 7.0, 0.0, 'softmax')[0], argnums=(0, 1))(image, text)

    placed = tuple(placement.batch([shape, shape]))
    compiled = jax.jit(run, in_shardings=placed, out_shardings=placed).lower(shape, shape).compile()
    sizes[devices] = compiled.memory_analysis().temp_size_in_bytes
  assert sizes[8] <= 1.05 * sizes[2]
