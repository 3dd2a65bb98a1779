"""Distillation against the formulas of DeiT's code, written in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.objectives.classification import Classification
from fmcv_jax.objectives.distillation import Distillation, disagreement
from fmcv_jax.parallel.mesh import MeshShape
from tests.train.tiny import Trainer, batch_of

TEACHER = vit('mu/8', image_size=16, num_classes=10, depth=1)


def learner(**options):
  network = vit('mu/8', image_size=16, num_classes=10, distilled=True, depth=1)
  return Classification(network, distillation=Distillation(TEACHER, **options))


@pytest.mark.parametrize(('kind', 'temperature'), [('hard', 1.0), ('soft', 3.0)])
def test_disagreement_and_its_gradient_equal_torchs(kind, temperature):
  torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
  functional = torch.nn.functional
  student, teacher = np.random.default_rng(0).normal(size=(2, 6, 5)).astype(np.float32) * 3
  logits, target = torch.tensor(student, requires_grad=True), torch.tensor(teacher)
  if kind == 'hard':
    theirs = functional.cross_entropy(logits, target.argmax(1))
  else:
    pair = (functional.log_softmax(x / temperature, dim=1) for x in (logits, target))
    theirs = functional.kl_div(*pair, reduction='sum', log_target=True) * temperature**2 / logits.numel()
  theirs.backward()
  ours, gradient = jax.value_and_grad(lambda x: disagreement(x, teacher, kind, temperature).mean())(student)
  np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-5)
  np.testing.assert_allclose(gradient, logits.grad, rtol=1e-4, atol=1e-7)


def test_each_head_learns_from_its_own_teacher_and_both_predictions_are_averaged():
  objective = learner(weight=0.25)
  params, extra = objective.init(jax.random.key(0))
  draw = np.random.default_rng(0)
  params, extra = jax.tree.map(lambda x: x + 0.2 * draw.normal(size=x.shape).astype(x.dtype), (params, extra))
  batch = batch_of(objective)
  loss = objective.loss(params, batch, jax.random.key(1), extra)

  images = objective.normalize(batch['image'].astype(jnp.float32) / 255)
  own, second = objective.network.apply({'params': params}, images).head_outputs
  answers = TEACHER.apply({'params': extra['teacher']}, images).output
  rows = jnp.arange(len(images))
  by_label = -jax.nn.log_softmax(own)[rows, batch['label']].mean()
  by_teacher = -jax.nn.log_softmax(second)[rows, answers.argmax(-1)].mean()
  np.testing.assert_allclose(loss.value, 0.75 * by_label + 0.25 * by_teacher, rtol=1e-5)
  np.testing.assert_allclose(loss.metrics['distillation'].value, by_teacher, rtol=1e-5)
  np.testing.assert_allclose(objective.outputs()['logits'].call(params, extra, batch), (own + second) / 2, atol=1e-6)
  assert objective.update_extra(extra, params, loss.aux, 0) == extra


def test_unfit_pairs_are_refused():
  with pytest.raises(ValueError, match='expected its outputs to be the 7 of the network'):
    Classification(vit('mu/8', image_size=16, num_classes=7), distillation=Distillation(TEACHER))
  with pytest.raises(ValueError, match=r'requires objective\.distillation'):
    Classification(vit('mu/8', image_size=16, num_classes=7, distilled=True))
  with pytest.raises(ValueError, match="pool must be 'cls'"):
    vit('mu/8', distilled=True, pool='gap')


@pytest.mark.slow
def test_training_on_eight_devices_equals_one():
  batches = [batch_of(learner(), seed) for seed in range(3)]
  one = Trainer(learner(), devices=1).run(batches)
  eight = Trainer(learner(), MeshShape(data=2, fsdp=2, tensor=2)).run(batches)
  np.testing.assert_allclose(eight, one, rtol=2e-5)
