"""Self-distillation against the papers' algorithms written out in torch, and the same on one device and eight."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.self_supervised.dino import PrototypeHead, dino
from fmcv_jax.objectives.block_masks import block_masks, most_hidden
from fmcv_jax.objectives.dino import SelfDistillation
from fmcv_jax.objectives.dino_losses import koleo, patch_loss, sinkhorn, view_loss
from fmcv_jax.parallel.mesh import MeshShape
from fmcv_jax.parallel.rules import path_of
from tests.models.test_tables import count
from tests.train.tiny import Trainer, batch_of

NORMAL = np.random.default_rng(0).normal


def network(**options):
  encoder = vit('mu/8', image_size=32, depth=1, mask_token=True, registers=1)
  return dino(encoder, prototypes=24, hidden=32, bottleneck=16, **options)


def objective(**options):
  defaults = dict(momentum_steps=10, momentum=0.9, local_crops_number=3, local_size=16)
  return SelfDistillation(options.pop('network', network()), **{**defaults, **options})


@pytest.fixture
def torch():
  return pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')


def assert_same(ours, x, theirs, leaf):
  """Checks that ours(x) and its gradient equal the torch scalar `theirs` and its gradient by `leaf`."""
  theirs.backward()
  value, gradient = jax.value_and_grad(ours)(x)
  np.testing.assert_allclose(value, theirs.detach(), rtol=1e-5)
  largest = float(leaf.grad.abs().max())
  np.testing.assert_allclose(gradient, leaf.grad, rtol=0, atol=1e-5 * largest)


def test_view_loss_is_algorithm_1_of_dino(torch):
  """One cross-entropy for each pair of a teacher's crop and another crop of the student, then their mean."""
  student, teacher, center = NORMAL(size=(6, 5, 24)), NORMAL(size=(6, 2, 24)), NORMAL(size=24)
  s = torch.tensor(student, dtype=torch.float32, requires_grad=True)
  t = torch.softmax((torch.tensor(teacher) - torch.tensor(center)) / 0.04, dim=-1).float()
  losses = [
    -(t[:, i] * torch.log_softmax(s[:, v] / 0.1, dim=-1)).sum(-1).mean() for i in range(2) for v in range(5) if v != i
  ]
  assert len(losses) == 8
  targets = jax.nn.softmax((teacher - center) / 0.04)
  assert_same(
    lambda x: view_loss(x / 0.1, targets.astype(jnp.float32)), jnp.float32(student), sum(losses) / len(losses), s
  )


def test_patch_loss_averages_over_each_crops_masked_patches_then_over_all_crops(torch):
  student, teacher = NORMAL(size=(4, 5, 24)), NORMAL(size=(4, 5, 24))
  hidden = [3, 0, 5, 1]
  s = torch.tensor(student, dtype=torch.float32, requires_grad=True)
  total = 0
  for crop, many in enumerate(hidden):
    for patch in range(many):
      target = torch.softmax(torch.tensor(teacher[crop, patch]) / 0.07, dim=-1).float()
      total = total - (target * torch.log_softmax(s[crop, patch] / 0.1, dim=-1)).sum() / many
  valid = jnp.float32(np.arange(5) < np.array(hidden)[:, None])
  targets = jax.nn.softmax(jnp.float32(teacher / 0.07))
  assert_same(lambda x: patch_loss(x / 0.1, targets, valid), jnp.float32(student), total / 4, s)


def test_sinkhorn_is_the_published_iteration_on_the_valid_rows(torch):
  """Appendix of SwAV, as DINOv2 has it: equal rows, then equal columns, of exp(scores).T."""
  scores, valid = NORMAL(size=(12, 7)), np.arange(12) < 9
  q = torch.exp(torch.tensor(scores[valid]) / 0.3).T
  q = q / q.sum()
  for _ in range(3):
    q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
    q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
  ours = sinkhorn(jnp.float32(scores / 0.3), 3, jnp.float32(valid))
  np.testing.assert_allclose(ours[valid], (q * q.shape[1]).T, rtol=1e-5)
  assert bool(jnp.isfinite(sinkhorn(jnp.float32(scores), 3, jnp.zeros(12))).all())


def test_koleo_is_the_log_distance_to_the_nearest_other(torch):
  features = NORMAL(size=(9, 5))
  x = torch.tensor(features, dtype=torch.float32, requires_grad=True)
  unit = torch.nn.functional.normalize(x, dim=-1)
  distances = (unit[:, None] - unit[None]).square().sum(-1) + 10 * torch.eye(9)
  nearest = distances.argmin(dim=1)
  assert_same(koleo, jnp.float32(features), -torch.log((unit - unit[nearest]).norm(dim=1) + 1e-8).mean(), x)
  assert bool(jnp.isfinite(jax.grad(koleo)(jnp.ones((4, 5)))).all())


def test_head_equals_torch_with_weight_norm(torch):
  nn = torch.nn
  torch.manual_seed(0)
  layers = [nn.Linear(10, 20), nn.GELU(), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 8)]
  last = nn.utils.parametrizations.weight_norm(nn.Linear(8, 15, bias=False))
  last.parametrizations.weight.original0.data.uniform_(0.5, 2)
  x = NORMAL(size=(6, 10)).astype(np.float32)
  theirs = last(nn.functional.normalize(nn.Sequential(*layers)(torch.from_numpy(x)), dim=-1))
  take = lambda parameter: parameter.detach().numpy().T  # noqa: E731
  params = {
    name: {'kernel': take(layer.weight), 'bias': take(layer.bias)}
    for name, layer in zip(('hidden1', 'hidden2', 'bottleneck'), layers[::2])
  }
  norm = last.parametrizations.weight
  params |= {'prototypes': take(norm.original1), 'lengths': take(norm.original0)[0]}
  ours = PrototypeHead(15, 20, 8, 3, True, 'float32').apply({'params': params}, x)
  np.testing.assert_allclose(ours, theirs.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(('variant', 'parameters'), [('S/16', 22_352_128), ('B/16', 23_138_560)])
def test_published_head_sizes(variant, parameters):
  """Counted with the lengths, which the B/16 recipe keeps at 1 and does not train."""
  model = dino(vit(variant), learn_prototype_norms=True)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3))))
  assert count(shapes['params']['head']) == parameters


@pytest.mark.parametrize('centering', ['centering', pytest.param('sinkhorn_knopp', marks=pytest.mark.slow)])
def test_training_on_eight_devices_equals_one(centering):
  options = dict(
    # Small crops only where there is time.
    local_crops_number=2 if centering == 'sinkhorn_knopp' else 0,
    centering=centering,
    ibot_loss_weight=1.0,
    koleo_weight=0.1,
    teacher_temperature=(0.04, 0.07),
    temperature_steps=3,
  )
  learner = objective(network=network(separate_patch_head=True, learn_prototype_norms=True), **options)
  batches = [batch_of(learner, seed) for seed in range(3)]
  one, eight = Trainer(learner, devices=1), Trainer(learner, MeshShape(data=2, fsdp=2, tensor=2))
  losses = [trainer.run(batches) for trainer in (one, eight)]
  np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)
  assert len(set(losses[0])) == 3
  for name in one.metrics:
    assert eight.metrics[name] == pytest.approx(one.metrics[name], rel=1e-4), name
  for (path, a), b in zip(jax.tree.leaves_with_path(one.state.extra), jax.tree.leaves(eight.state.extra), strict=True):
    if 'key/bias' not in path_of(path):  # its gradient is zero but for rounding, of which Adam takes whole steps
      np.testing.assert_allclose(b, a, rtol=0, atol=1e-4 * np.abs(a).max() + 1e-7, err_msg=path_of(path))


def test_teacher_and_center_follow_their_closed_forms():
  learner = objective()
  params = {'w': jnp.float32(3.0)}
  extra = {'teacher': {'w': jnp.float32(1.0)}, 'step': jnp.int32(0), 'centre': {'image': jnp.float32(2.0)}}
  teacher, center = 1.0, 2.0
  for step in range(11):
    extra = learner.update_extra(extra, params, {'image': jnp.float32(5.0)}, jnp.int32(step))
    momentum = 1 - 0.1 * (math.cos(math.pi * step / 10) + 1) / 2
    teacher, center = momentum * teacher + (1 - momentum) * 3, 0.9 * center + 0.1 * 5
  assert (float(extra['teacher']['w']), float(extra['centre']['image'])) == (
    pytest.approx(teacher),
    pytest.approx(center),
  )
  assert int(extra['step']) == 11
  before = float(extra['teacher']['w'])
  extra = learner.update_extra(extra, {'w': jnp.float32(-9.0)}, {'image': jnp.float32(0)}, jnp.int32(99))
  assert float(extra['teacher']['w']) == before  # momentum 1 from the end of the schedule on


def test_momentum_schedule_spans_the_run_by_default():
  assert objective(momentum_steps=None).with_total_steps(70).momentum_steps == 70
  assert objective(momentum_steps=10).with_total_steps(70).momentum_steps == 10


def test_teacher_gets_warmer_and_prototypes_thaw():
  learner = objective(teacher_temperature=(0.04, 0.07), temperature_steps=30)
  temperatures = [float(learner.temperature_at(step)) for step in (0, 10, 30, 100)]
  np.testing.assert_allclose(temperatures, [0.04, 0.05, 0.07, 0.07], rtol=1e-6)
  learner = objective(freeze_last_layer_steps=5, local_crops_number=0)
  generator = np.random.default_rng(0)
  params, extra = jax.tree.map(
    lambda s: (0.2 * generator.normal(size=s.shape)).astype(s.dtype), jax.eval_shape(learner.init, jax.random.key(0))
  )
  batch = {k: v[:2] for k, v in batch_of(learner).items()}
  gradient = jax.jit(
    lambda step: jax.grad(lambda p: learner.loss(p, batch, jax.random.key(1), {**extra, 'step': step}).value)(params)
  )
  early, late = gradient(4)['head'], gradient(5)['head']
  assert float(jnp.abs(early['prototypes']).max()) == 0
  assert float(jnp.abs(late['prototypes']).max()) > 0
  np.testing.assert_array_equal(early['bottleneck']['kernel'], late['bottleneck']['kernel'])


def test_masks_are_blocks_of_the_given_fraction():
  grid, share = (14, 14), (0.1, 0.5)
  masks = np.asarray(block_masks(jax.random.key(0), 400, grid, share, 0.5)).reshape(400, *grid)
  hidden = masks.sum((1, 2))
  assert hidden.max() <= most_hidden(grid, share) == 98
  some = hidden > 0
  assert abs(some.mean() - 0.5) < 4 * 0.5 / 20
  # Shares uniform within (0.1, 0.5), of which the last rectangles leave a little over.
  assert hidden[some].mean() / 196 == pytest.approx(0.3, abs=0.03)
  assert hidden[some].min() >= 0.08 * 196
  adjacent = (masks[:, 1:] & masks[:, :-1]).sum() / masks[:, 1:].sum()
  assert adjacent > 0.6  # 0.3 if patches were drawn one by one
  assert len(np.unique(masks[some], axis=0)) == some.sum()


def test_masked_patches_equal_those_of_dinov2_in_transformers(torch):
  transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')
  from tests.models.test_parity import IMAGES, OURS, TOWER, parameters_of, randomized, to_torch

  config = transformers.Dinov2Config(**TOWER, mlp_ratio=2, image_size=32, patch_size=8)
  reference = randomized(transformers.Dinov2Model(config))
  model = vit('mu/8', image_size=32, layer_scale=1.0, mask_token=True, **OURS)
  params, _ = parameters_of(reference, model, IMAGES)
  masked = np.random.default_rng(0).random((4, 16)) < 0.4
  theirs = reference(to_torch(IMAGES), bool_masked_pos=torch.from_numpy(masked)).last_hidden_state
  ours = jax.jit(lambda p: model.apply({'params': p}, IMAGES, masked=masked).tokens)(params)
  np.testing.assert_allclose(ours, theirs.detach(), rtol=0, atol=1e-5)
