import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.parallel.mesh import MeshShape
from fmcv_jax.train.optim import Muon
from fmcv_jax.train.step import moving_average
from tests.train.tiny import Trainer, batch_of, classification, contrastive

MESHES = {
  'data': MeshShape(),
  'fsdp': MeshShape(data=1, fsdp=8),
  'tensor': MeshShape(data=4, tensor=2),
  'fsdp x tensor': MeshShape(data=2, fsdp=2, tensor=2),
}


@pytest.fixture(scope='module')
def single_device_losses():
  objective = contrastive()
  return Trainer(objective, devices=1).run([batch_of(objective, seed) for seed in range(20)])


@pytest.mark.parametrize(
  'mesh', [pytest.param(name, marks=() if name == 'fsdp x tensor' else pytest.mark.slow) for name in MESHES]
)
def test_twenty_contrastive_steps_on_eight_devices_equal_one_device(mesh, single_device_losses):
  objective = contrastive()
  losses = Trainer(objective, MESHES[mesh]).run([batch_of(objective, seed) for seed in range(20)])
  assert losses[0] != losses[-1]
  np.testing.assert_allclose(losses, single_device_losses, rtol=2e-5)


def test_twenty_classification_steps_with_all_randomness_equal_one_device():
  """Mixing, dropout, stochastic depth and patch dropping draw the same numbers on any mesh."""
  network = vit('mu/8', image_size=16, num_classes=10, drop_path=0.2, dropout=0.1, remat='full', layer_scale=1e-2)
  objective = classification(network, mixup=0.2, cutmix=1.0, loss_name='sigmoid', label_smoothing=0.1)
  batches = [batch_of(objective, seed) for seed in range(20)]
  one = Trainer(objective, devices=1).run(batches)
  eight = Trainer(objective, MESHES['fsdp x tensor']).run(batches)
  np.testing.assert_allclose(eight, one, rtol=2e-5)


def test_state_is_sharded_from_initialization_on():
  objective = contrastive()
  trainer = Trainer(objective, MESHES['fsdp x tensor'], ema=0.9, rule=Muon())
  trainer.run([batch_of(objective)])
  for tree in (trainer.state.params, trainer.state.ema):
    up = tree['image']['blocks']['mlp']['up']['kernel']
    assert up.addressable_shards[0].data.shape == (2, 16, 32)
    assert up.shape == (2, 32, 64)
  moments = [x for x in jax.tree.leaves(trainer.state.opt_state) if x.shape == (2, 32, 64)]
  assert moments
  assert all(x.addressable_shards[0].data.shape == (2, 16, 32) for x in moments)


def test_old_state_is_donated():
  objective = contrastive()
  trainer = Trainer(objective)
  old = trainer.state.params['image']['blocks']['mlp']['up']['kernel']
  trainer.run([batch_of(objective)])
  assert old.is_deleted()


def test_non_finite_step_changes_nothing_but_the_counters():
  objective = classification()
  trainer = Trainer(objective, ema=0.9)
  trainer.run([batch_of(objective)])
  good = trainer.state
  bad = good.replace(params=jax.tree.map(jnp.copy, good.params))
  bad.params['head']['bias'] = bad.params['head']['bias'].at[0].set(jnp.nan)
  bad = jax.device_put(bad, trainer.shardings)
  before = jax.device_get(bad)
  trainer.state = bad
  trainer.run([batch_of(objective, 1)])
  after = jax.device_get(trainer.state)
  assert (after.step, after.skipped, after.streak) == (before.step + 1, before.skipped + 1, before.streak + 1)
  for name in ('params', 'opt_state', 'ema', 'extra'):
    for x, y in zip(jax.tree.leaves(getattr(before, name)), jax.tree.leaves(getattr(after, name)), strict=True):
      np.testing.assert_array_equal(x, y)


def test_streak_ends_with_a_finite_step():
  objective = classification()
  trainer = Trainer(objective)
  trainer.state = trainer.state.replace(streak=jax.device_put(jnp.int32(3), trainer.placement.replicated()))
  trainer.run([batch_of(objective)])
  assert (int(trainer.state.streak), int(trainer.state.skipped)) == (0, 0)


def test_average_follows_the_closed_form():
  params = [{'w': jnp.float32(value)} for value in (1.0, 3.0, -2.0)]
  average = params[0]
  expected = 1.0
  for step, new in enumerate(params[1:]):
    average = moving_average(average, new, 0.9, jnp.int32(step))
    decay = min(0.9, (1 + step) / (10 + step))
    expected = decay * expected + (1 - decay) * float(new['w'])
  assert float(average['w']) == pytest.approx(expected, rel=1e-6)


def test_clipping_bounds_the_update_as_in_optax():
  objective = classification()
  trainer = Trainer(objective, clip_norm=1e-3)
  trainer.run([batch_of(objective)])
  assert trainer.metrics['gradient_norm'] > 1e-3
  moments = optax.tree_utils.tree_get(trainer.state.opt_state, 'mu')
  assert float(optax.tree.norm(moments)) == pytest.approx(0.1 * 1e-3, rel=1e-4)


def test_bf16_compute_keeps_float32_parameters_and_comes_close():
  losses = {}
  for dtype in ('float32', 'bfloat16'):
    objective = classification(vit('mu/8', image_size=16, num_classes=10, dtype=dtype))
    trainer = Trainer(objective)
    losses[dtype] = trainer.run([batch_of(objective, seed) for seed in range(3)])
    assert {x.dtype for x in jax.tree.leaves(trainer.state.params)} == {jnp.dtype('float32')}
  np.testing.assert_allclose(losses['bfloat16'], losses['float32'], rtol=2e-2)
  assert (losses['bfloat16'] != losses['float32']).any()
